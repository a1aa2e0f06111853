"""A layer of neurons, from a synapse's current to spikes: norm, scan over windows, merge, spike.

With *shared* context the windows of a map are cut from a current that was computed for the whole map, their membranes
are merged (mean where windows overlap), and the merged membrane fires. With *isolated* context the windows are a batch
of their own, and each fires for itself. Both are one function here: a :class:`~lightning_msnn.kernels.geometry.Layer`
says where the windows of the current and of the spikes lie. Kernels run the four steps as one where they cover a layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.functional.windows import WINDOWS, count, merge, split
from lightning_msnn.kernels import native
from lightning_msnn.kernels.geometry import KINDS, OMEGAS, SURROGATE, Layer
from lightning_msnn.kernels.layer import kernels_of, neurons
from lightning_msnn.nn.neuron import FixedDecay, LearntDecay, Membrane, Spike
from lightning_msnn.nn.projection import LearntProjection, Projection

__all__ = ["Layer", "cut_windows", "fire", "join_windows", "normalise"]

WHOLE = Layer()


def fire(
    current: Tensor,
    norm: nn.Module | None,
    spike: nn.Module,
    membrane: Membrane | None = None,
    other: Tensor | None = None,
    *,
    cut: Layer = WHOLE,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run a layer of neurons.

    Args:
        current: What the synapse returned, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        norm: Batch norm, None or an identity for none.
        spike: The threshold.
        membrane: What carries membranes from window to window; None where the map is not cut.
        other: Membranes that these are coupled with: those that layer 1 handed on, or the map ``(B, C, H, W)`` that a
            recurrent layer receives.
        cut: Where the windows lie, and which membranes are returned; the rest is read from the modules.
        size: Height and width of the map in pixels, those of ``current`` if None.

    Returns:
        Spikes ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; the membranes of all windows but the last,
        ``((n - 1) B, cut.handed, h, w)``; the membranes that fired, of the shape of the spikes. What was not asked
        for is None, and so are the membranes of a map that is one window.
    """
    size = size or (current.shape[2], current.shape[3])
    if _covered(current, norm, spike, membrane, cut.kind):
        return _on_kernels(current, norm, spike, membrane, cut, size, other)
    x = current if norm is None else normalise(current, norm)
    membranes = [x] if membrane is None else _scan(x, membrane, other, cut, size)
    merged = torch.cat(membranes) if cut.windows_out or len(membranes) == 1 else merge(membranes, cut.kind, *size)
    spikes: Tensor = spike(merged)
    before = [u[:, u.shape[1] - cut.handed :] for u in membranes[:-1]] if cut.handed else []
    return spikes, torch.cat(before) if before else None, merged if cut.keeps else None


def normalise(current: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Apply a batch norm or an identity to a current ``(B, C, H, W)``, and add a residual stream of that shape."""
    if type(norm) is not nn.Identity and _covered(current, norm):
        size = (current.shape[2], current.shape[3])
        return _on_kernels(current, norm, None, None, WHOLE, size, residual=residual)[0]
    out: Tensor = norm(current)
    return out if residual is None else residual + out


def _scan(x: Tensor, membrane: Membrane, other: Tensor | None, layer: Layer, size: tuple[int, int]) -> list[Tensor]:
    """Return the membranes of all windows of a normalised current."""
    n = count(layer.kind, *size)
    currents = _windows(x, n) if layer.windows_in else split(x, layer.kind)
    if other is None:
        return list(membrane(currents))
    received = split(other, layer.kind) if membrane.form == "recurrent" else _windows(other, n - 1)
    return list(membrane(currents, received))


def _windows(batch: Tensor, windows: int) -> list[Tensor]:
    """Take a batch of windows ``(windows B, C, h, w)`` apart, a view ``(B, C, h, w)`` for each."""
    # Not chunk, which rounds and so ties an exported program to the batch that it was traced with.
    return list(torch.unflatten(batch, 0, [windows, -1]).unbind(0))


def cut_windows(x: Tensor, kind: str) -> Tensor:
    """Cut a map ``(B, C, H, W)`` into its windows ``(n B, C, h, w)``, one after another on the batch axis."""
    if _covered(x, kind=kind):
        layer = Layer(kind=kind, windows_out=True)
        return _on_kernels(x, None, None, None, layer, (x.shape[2], x.shape[3]))[0]
    return torch.cat(split(x, kind))


def join_windows(windows: Tensor, kind: str, size: tuple[int, int], residual: Tensor | None = None) -> Tensor:
    """Put a batch of windows ``(n B, C, h, w)`` back on the map ``(B, C, *size)``, their mean where they overlap.

    The residual stream, of the map's shape, is added.
    """
    if _covered(windows, kind=kind):
        layer = Layer(kind=kind, windows_in=True)
        joined = _on_kernels(windows, None, None, None, layer, size, residual=residual)[0]
        return joined if residual is None else joined.to(residual.dtype)
    joined = merge(_windows(windows, count(kind, *size)), kind, *size)
    return joined if residual is None else residual + joined


# Kernels


def _covered(
    current: Tensor,
    norm: nn.Module | None = None,
    spike: nn.Module | None = None,
    membrane: Membrane | None = None,
    kind: str = "single",
) -> bool:
    """Whether kernels cover a layer: its parts are this package's own, and no hook watches what they return."""
    kernels = kernels_of(current)
    return (
        kernels is not None
        and (kind in KINDS and KINDS[kind] is WINDOWS[kind])
        and (norm is None or _covers_norm(norm, current, kernels is native))
        and (spike is None or _covers_spike(spike, kernels is native))
        and (membrane is None or _covers_membrane(membrane))
    )


def _plain(module: nn.Module, *classes: type) -> bool:
    """Whether a module is of one of these very classes, and nothing watches it or takes its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in classes and not hooks and "forward" not in module.__dict__


def _covers_membrane(membrane: Membrane) -> bool:
    if not (_plain(membrane, Membrane) and _plain(membrane.decay, FixedDecay, LearntDecay)):
        return False
    omega: Any = membrane.projection
    return omega is None or (_plain(omega, Projection, LearntProjection) and OMEGAS.get(omega.name) is omega.omega)


def _covers_spike(spike: nn.Module, on_cpu: bool) -> bool:
    if type(spike) is not Spike or spike.surrogate is not SURROGATE or "forward" in spike.__dict__:
        return False
    if spike._forward_pre_hooks or spike._backward_hooks or spike._backward_pre_hooks:
        return False  # hooks on what it returns see what kernels compute
    return on_cpu or not spike.bytes


def _covers_norm(norm: nn.Module, current: Tensor, on_cpu: bool) -> bool:
    if _plain(norm, nn.Identity):
        return True
    if not _plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm):
        return False
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    channels = current.shape[1]
    # A strategy may have taken parameters apart; what does not fit, torch's own module refuses.
    vectors = (norm.weight, norm.bias)
    whole = all(p is None or (type(p) in (nn.Parameter, Tensor) and len(p) == channels) for p in vectors)
    enough = not _takes_statistics(norm) or current.numel() > channels
    alone = not _is_synchronised(norm) or (on_cpu and norm.process_group is None)
    return whole and norm.num_features == channels and enough and alone


def _takes_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _is_synchronised(norm: nn.Module) -> bool:
    return isinstance(norm, nn.SyncBatchNorm) and _takes_statistics(norm) and torch.distributed.is_initialized()


def _on_kernels(
    current: Tensor,
    norm: nn.Module | None,
    spike: nn.Module | None,
    membrane: Membrane | None,
    layer: Layer,
    size: tuple[int, int],
    other: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run a layer that is covered; see :func:`fire`."""
    flags: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        tensors = {"weight": norm.weight, "bias": norm.bias}
        flags = {"training": _takes_statistics(norm), "synchronised": _is_synchronised(norm), "eps": norm.eps}
        if not flags["training"]:
            tensors |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    if isinstance(spike, Spike):
        tensors |= {"level": spike.level, "anneal": spike.share(current)}
        flags |= {"fires": True, "threshold": spike.threshold, "bytes": spike.bytes, "levels": spike.levels}
    if membrane is not None:
        flags["form"], tensors["tau"] = membrane.form, membrane.decay()
        if membrane.projection is not None:
            flags["omega"], tensors["theta"] = membrane.projection.name, membrane.projection.radian()
    layer = layer._replace(**flags)
    made: list[Tensor | None] = []

    def spikes() -> Tensor:
        out, *rest = neurons(current, layer, size, residual=residual, other=other, **tensors)
        made.extend(rest)
        return out

    out = spikes() if spike is None else spike(current, spikes)
    handed_on, merged, statistics = made
    if layer.training:
        _track(norm, statistics, current.numel() // current.shape[1])
    return out, handed_on, merged


@torch.no_grad()
def _track(norm: Any, found: Tensor | None, rows: int) -> None:
    """Move the running statistics of a norm as it would itself, by what kernels found in ``rows`` places."""
    if not norm.training or norm.running_mean is None or not norm.track_running_stats or norm.momentum == 0.0:
        return
    assert found is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.to(torch.float32)
    dtype = norm.running_mean.dtype
    norm.running_mean.lerp_(found[0].to(dtype), share)
    unbiased = found[1] * (rows / (rows - 1)) if len(found) == 4 else found[1] * found[4] / (found[4] - 1.0)
    norm.running_var.lerp_(unbiased.to(dtype), share)
