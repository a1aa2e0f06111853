"""A layer of neurons, from a synapse's current to spikes: by a kernel where one covers it, else by the equations.

With *shared* context the windows of a map are cut from a current that was computed for the whole map, their membranes
are merged (mean where windows overlap), and the merged membrane fires. With *isolated* context the windows are a batch
of their own, and each fires for itself. Both are one function here: what differs is where the windows of the current
and of the spikes lie, which a :class:`Cut` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lightning_msnn.functional.membrane import isolated, shared
from lightning_msnn.functional.projection import PROJECTIONS
from lightning_msnn.functional.spike import SOFT, SURROGATES
from lightning_msnn.functional.windows import WINDOWS, count, merge, split
from lightning_msnn.kernels import geometry
from lightning_msnn.kernels.geometry import Layer
from lightning_msnn.kernels.layer import covered, neurons
from lightning_msnn.nn.neuron import ByteSpike, FixedDecay, LearntDecay, Membrane, Spike
from lightning_msnn.nn.projection import LearntProjection, Projection

__all__ = ["Cut", "cut_windows", "fire", "join_windows", "normalise", "watched"]

Membranes = Tensor | list[Tensor]
"""Membranes of windows that one layer hands to the next: one after another as a batch, or a list over the windows."""


@dataclass(frozen=True)
class Cut:
    """Where the windows of a layer of neurons lie.

    Args:
        kind: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        windows_in: Whether the current is a batch of windows ``(n B, C, h, w)``, not a map ``(B, C, H, W)``.
        windows_out: Whether the windows fire, not the merged map.
    """

    kind: str = "single"
    windows_in: bool = False
    windows_out: bool = False


WHOLE = Cut()

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

Watcher = Callable[[str, dict[str, Any], Any], None]
"""What is told of each call of :func:`fire`, :func:`normalise` and :func:`join_windows`: name, arguments, output."""

_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell of every layer that runs here, however its modules hang together; a compiled network tells nothing."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def _tells(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Tell the watcher, if there is one, of each call of a function."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        out = function(*args, **kwargs)
        watcher = None if torch.compiler.is_dynamo_compiling() else _WATCHER.get()
        if watcher is not None:
            bound = signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            watcher(function.__name__, dict(bound.arguments), out)
        return out

    return call


# What the kernels compute, by the names that they know it by. Another definition under one of the names is not it.
_OMEGAS = {name: PROJECTIONS[name] for name in geometry.OMEGAS}
_SURROGATES = {name: SURROGATES[name] for name in geometry.SURROGATES}
_SOFT = {name: SOFT[name] for name in geometry.SOFT}
_KINDS = {name: WINDOWS[name] for name in geometry.KINDS}
_MODULES = (Membrane, FixedDecay, LearntDecay, Projection, LearntProjection)


def _plain(classes: tuple[type, ...], *modules: nn.Module | None) -> bool:
    """Whether modules are of one of these very classes, and nothing watches them or takes their place."""
    for module in modules:
        if module is None:
            continue
        if type(module) not in classes or "forward" in module.__dict__:
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    return True


def _norm_arguments(norm: nn.Module | None, current: Tensor) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What the kernels take of a norm: flags of the layer, and tensors; None where they do not cover it."""
    if _plain((nn.Identity,), norm):
        return {}, {}
    if not _plain((nn.BatchNorm2d, nn.SyncBatchNorm), norm):
        return None
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    channels = current.shape[1]
    given: dict[str, Any] = {"weight": norm.weight, "bias": norm.bias}
    if any(p is not None and (type(p) not in (nn.Parameter, Tensor) or p.numel() != channels) for p in given.values()):
        return None  # parameters that a strategy has taken apart
    training = norm.training or norm.running_mean is None
    together = training and isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized()
    if together and (norm.process_group is not None or torch.compiler.is_compiling()):
        return None
    if training and (norm.num_features != channels or current.numel() <= channels):
        return None  # torch's own module says what is wrong
    if not training:
        given |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {"training": training, "synchronised": together, "eps": norm.eps}, given


@torch.no_grad()
def _track(norm: nn.Module | None, found: Tensor | None, rows: int) -> None:
    """Move the running statistics of a norm as it would itself.

    Args:
        norm: The norm.
        found: Mean and variance by channel, ``(4, C)``; in a fifth row of how many places, if of several processes.
        rows: Places in this process.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.training or norm.running_mean is None:
        return
    if not norm.track_running_stats or norm.momentum == 0.0:
        return
    assert found is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: Any = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.to(torch.float32)
    dtype = norm.running_mean.dtype
    norm.running_mean.lerp_(found[0].to(dtype), share)
    unbiased = found[1] * (rows / (rows - 1)) if len(found) == 4 else found[1] * found[4] / (found[4] - 1.0)
    norm.running_var.lerp_(unbiased.to(dtype), share)


def _kernel(
    current: Tensor,
    norm: nn.Module | None,
    spike: nn.Module | None,
    membrane: Membrane | None,
    cut: Cut,
    size: tuple[int, int],
    other: Tensor | None = None,
    handed: int = 0,
    keeps: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Run a layer on a kernel; None where none covers it."""
    if _KINDS.get(cut.kind) is not WINDOWS.get(cut.kind):
        return None
    form, omega, surrogate, soft, threshold = "still", "none", "", "rectifier", 0.0
    decay: Any = None
    projection: Any = None
    if membrane is not None:
        form, decay, projection = membrane.form, membrane.decay, membrane.projection
        if not _plain(_MODULES, membrane, decay, projection):
            return None
    if projection is not None:
        omega = projection.name
        if _OMEGAS.get(omega) is not projection.omega:
            return None
    if spike is not None:
        if not isinstance(spike, Spike) or type(spike) not in (Spike, ByteSpike) or "forward" in spike.__dict__:
            return None
        surrogate, soft, threshold = spike.name, spike.soft, spike.threshold
        known = _SURROGATES.get(surrogate) is spike.surrogate and _SOFT.get(soft) is SOFT.get(soft)
        if not known:
            return None
        if spike._forward_pre_hooks or spike._backward_hooks or spike._backward_pre_hooks:
            return None  # hooks on what it returns see what a kernel has computed
    if not covered(current) or (type(spike) is ByteSpike and not current.is_cpu):
        return None
    of_norm = _norm_arguments(norm, current)
    if of_norm is None:
        return None
    flags, tensors = of_norm
    if spike is not None:
        tensors["level"], tensors["anneal"] = spike.level, spike.share(current)
    if decay is not None:
        tensors["tau"] = decay.forward()  # which nothing watches
    if projection is not None:
        tensors["theta"] = projection.radian()
    layer = Layer(
        form, omega, cut.kind, surrogate, soft, cut.windows_in, cut.windows_out, handed, keeps,
        bytes=type(spike) is ByteSpike, threshold=threshold, **flags,
    )  # fmt: skip
    out, membranes, merged, found = neurons(current, layer, size, residual=residual, other=other, **tensors)
    if layer.training:
        _track(norm, found, current.numel() // current.shape[1])
    if spike is not None:
        out = spike(current, fired=out)
    return out, membranes, merged


Step = tuple[Tensor, Membranes, Tensor | None]
"""What a layer returns: spikes, the membranes that it hands on, the membranes that fired if they are kept."""


def _equations(
    currents: list[Tensor],
    spike: nn.Module,
    membrane: Membrane | None,
    other: Membranes | None,
    cut: Cut,
    size: tuple[int, int],
    handed: int,
) -> Step:
    """Run a layer after its norm on :mod:`lightning_msnn.functional`, on the currents of its windows."""
    if membrane is None:
        return spike(currents[0]), [], currents[0]
    n = len(currents)
    if isinstance(other, Tensor):
        of_map = membrane.form == "recurrent"
        other = split(other, cut.kind) if of_map else _windows(other, n - 1) if n > 1 else []
    carry = partial(membrane, other=other or [])
    if cut.windows_out:
        spikes, merged, membranes = isolated(currents, carry, spike)
    else:
        spikes, merged, membranes = shared(currents, carry, partial(_merge, kind=cut.kind, size=size), spike)
    if handed == currents[0].shape[1]:
        return spikes, membranes[:-1], merged
    return spikes, [u[:, u.shape[1] - handed :] for u in membranes[:-1]] if handed else [], merged


def _merge(windows: list[Tensor], kind: str, size: tuple[int, int]) -> Tensor:
    """Put windows back on the map."""
    return windows[0] if len(windows) == 1 else join_windows(torch.cat(windows), kind, size)


def _batch(other: Membranes | None) -> Tensor | None:
    """Membranes of windows as a batch; None for those of a map that is one window, which hands nothing on."""
    batch = torch.cat(other) if isinstance(other, list) and other else other
    return batch if isinstance(batch, Tensor) and batch.dim() == 4 else None


@_tells
def fire(
    current: Tensor,
    norm: nn.Module | None,
    spike: nn.Module,
    membrane: Membrane | None = None,
    other: Any = None,
    *,
    cut: Cut = WHOLE,
    size: tuple[int, int] | None = None,
    handed: int = 0,
    keeps: bool = False,
) -> tuple[Tensor, Any, Tensor | None]:
    """Run a layer of neurons.

    Args:
        current: What the synapse returned, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        norm: Batch norm, None or an identity for none.
        spike: The threshold.
        membrane: What carries membranes from window to window; None where the map is not cut.
        other: Membranes that these are coupled with: of layer 1, as it handed them on, or the map ``(B, C, H, W)``
            that a recurrent layer receives.
        cut: Where the windows lie.
        size: Height and width of the map in pixels, those of ``current`` if None.
        handed: Of how many of the last channels the windows' membranes are handed on.
        keeps: Whether the membranes that fire are returned.

    Returns:
        Spikes ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; membranes for the layer after; the membranes that
        fired, of the shape of the spikes. What was not asked for is empty or None.
    """
    size = size or (current.shape[2], current.shape[3])
    n = 1 if membrane is None else count(cut.kind, *size)
    found = _kernel(current, norm, spike, membrane, cut, size, _batch(other), handed, keeps)
    if found is not None:
        return found
    x = current if norm is None else normalise(current, norm)
    currents = _windows(x, n) if cut.windows_in else split(x, cut.kind)
    return _equations(currents, spike, membrane, other, cut, size, handed)


@_tells
def normalise(current: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Apply batch norm, and add the residual stream.

    Args:
        current: What a synapse returned, ``(B, C, H, W)``.
        norm: Batch norm or an identity.
        residual: Residual stream, of that shape.
    """
    if type(norm) is not nn.Identity:
        found = _kernel(current, norm, None, None, WHOLE, (current.shape[2], current.shape[3]), residual=residual)
        if found is not None:
            return found[0]
    out: Tensor = norm(current)
    return out if residual is None else residual + out


def _windows(batch: Tensor, windows: int) -> list[Tensor]:
    """Take a batch of windows ``(windows B, C, h, w)`` apart, a view ``(B, C, h, w)`` for each."""
    # Not chunk, which rounds and so ties an exported program to the batch that it was traced with.
    return list(torch.unflatten(batch, 0, [windows, -1]).unbind(0))


def cut_windows(x: Tensor, kind: str) -> Tensor:
    """Cut a map into its windows, as a batch.

    Args:
        x: Map ``(B, C, H, W)``.
        kind: Kind of windows.

    Returns:
        Windows ``(n B, C, h, w)``, one after another on the batch axis.
    """
    cut = Cut(kind, False, True)
    found = _kernel(x, None, None, None, cut, (x.shape[2], x.shape[3]))
    return torch.cat(split(x, kind)) if found is None else found[0]


@_tells
def join_windows(windows: Tensor, kind: str, size: tuple[int, int], residual: Tensor | None = None) -> Tensor:
    """Put a batch of windows back on the map, their mean where they overlap, and add the residual stream.

    Args:
        windows: Windows ``(n B, C, h, w)``, one after another on the batch axis.
        kind: Kind of windows.
        size: Height and width of the map in pixels.
        residual: Residual stream ``(B, C, H, W)``.
    """
    found = _kernel(windows, None, None, None, Cut(kind, True, False), size, residual=residual)
    if found is not None:
        return found[0] if residual is None else found[0].to(residual.dtype)
    joined = merge(_windows(windows, count(kind, *size)), kind, *size)
    return joined if residual is None else residual + joined
