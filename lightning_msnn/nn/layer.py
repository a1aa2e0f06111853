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
from lightning_msnn.kernels import fused
from lightning_msnn.kernels.geometry import KINDS, OMEGAS, SURROGATE, Layer
from lightning_msnn.kernels.layer import kernels_of, neurons
from lightning_msnn.nn.neuron import FixedDecay, LearntDecay, Membrane, Spike
from lightning_msnn.nn.projection import LearntProjection, Projection

__all__ = ["Layer", "covered", "cut_windows", "fire", "join_windows", "normalise"]

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
    if layer := covered(current, cut, norm, spike, membrane):
        return _on_kernels(layer, size, current, norm, spike, membrane, other)
    if norm is not None:  # it may be all that is not covered
        return fire(normalise(current, norm), None, spike, membrane, other, cut=cut, size=size)
    membranes = [current] if membrane is None else _scan(current, membrane, other, cut, size)
    merged = torch.cat(membranes) if cut.windows_out or len(membranes) == 1 else merge(membranes, cut.kind, *size)
    spikes: Tensor = spike(merged)
    before = [u[:, u.shape[1] - cut.handed :] for u in membranes[:-1]] if cut.handed else []
    return spikes, torch.cat(before) if before else None, merged if cut.keeps else None


def normalise(current: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Apply a batch norm or an identity to a current ``(B, C, H, W)``, and add a residual stream of that shape."""
    if type(norm) is not nn.Identity and (layer := covered(current, WHOLE, norm)):
        size = (current.shape[2], current.shape[3])
        return _on_kernels(layer, size, current, norm, residual=residual)[0]
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
    if layer := covered(x, Layer(kind=kind, windows_out=True)):
        return neurons(x, layer, (x.shape[2], x.shape[3]))[0]
    return torch.cat(split(x, kind))


def join_windows(windows: Tensor, kind: str, size: tuple[int, int], residual: Tensor | None = None) -> Tensor:
    """Put a batch of windows ``(n B, C, h, w)`` back on the map ``(B, C, *size)``, their mean where they overlap.

    The residual stream, of the map's shape, is added.
    """
    if layer := covered(windows, Layer(kind=kind, windows_in=True)):
        joined = neurons(windows, layer, size, residual=residual)[0]
        return joined if residual is None else joined.to(residual.dtype)
    joined = merge(_windows(windows, count(kind, *size)), kind, *size)
    return joined if residual is None else residual + joined


# Kernels


def covered(
    current: Tensor,
    cut: Layer,
    norm: nn.Module | None = None,
    spike: nn.Module | None = None,
    membrane: Any = None,
) -> Layer | None:
    """Return a layer as kernels take it; None where they do not cover it.

    They do where its parts are this package's own and no hook watches what these return.
    """
    kernels = kernels_of(current)
    if kernels is None or KINDS.get(cut.kind) is not WINDOWS.get(cut.kind):
        return None
    form, omega, eps, training = "still", "none", 0.0, False
    fires, stores_bytes, levels, threshold = False, False, 1, 0.0
    if norm is not None:
        if not _plain(norm, nn.Identity, nn.BatchNorm2d, nn.SyncBatchNorm):
            return None
        if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            eps, training = norm.eps, norm.training or norm.running_mean is None
            if training and type(norm) is nn.SyncBatchNorm and torch.distributed.is_initialized():
                return None
            if not _fits(norm, current.shape[1]) or (training and current.numel() <= norm.num_features):
                return None  # torch's own module refuses it
    if spike is not None:
        if type(spike) is not Spike or spike.surrogate is not SURROGATE or "forward" in spike.__dict__:
            return None
        if spike._forward_pre_hooks or spike._backward_hooks or spike._backward_pre_hooks:
            return None  # hooks on what it returns see what kernels compute
        fires, stores_bytes, levels, threshold = True, spike.bytes, spike.levels, spike.threshold
        if stores_bytes and kernels is fused:
            return None
    if membrane is not None:
        if not (_plain(membrane, Membrane) and _plain(membrane.decay, FixedDecay, LearntDecay)):
            return None
        projection = membrane.projection
        if projection is not None:
            known = _plain(projection, Projection, LearntProjection)
            if not known or OMEGAS.get(projection.name) is not projection.omega:
                return None
            omega = projection.name
        form = membrane.form
    if cut.handed and form != "first":
        return None
    return Layer(
        form, omega, cut.kind, fires, cut.windows_in, cut.windows_out, cut.handed, cut.keeps, training, stores_bytes,
        levels, threshold, eps,
    )  # fmt: skip


def _plain(module: Any, *classes: type) -> bool:
    """Whether a module is of one of these very classes, and nothing watches it or takes its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in classes and not hooks and "forward" not in module.__dict__


def _fits(norm: Any, channels: int) -> bool:
    """Whether a batch norm is for so many channels, and no strategy has taken its parameters apart."""
    for vector in (norm.weight, norm.bias):
        if vector is not None and (type(vector) not in (nn.Parameter, Tensor) or len(vector) != channels):
            return False
    return bool(norm.num_features == channels)


def _on_kernels(
    layer: Layer,
    size: tuple[int, int],
    current: Tensor,
    norm: Any,
    spike: Any = None,
    membrane: Any = None,
    other: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run a layer that is covered; see :func:`fire`."""
    tensors: dict[str, Any] = {"residual": residual, "other": other}
    if norm is not None and type(norm) is not nn.Identity:
        tensors |= {"weight": norm.weight, "bias": norm.bias}
        if not layer.training:
            tensors |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    if membrane is not None:
        tensors["tau"] = membrane.decay.forward()  # which nothing watches
        if membrane.projection is not None:
            tensors["theta"] = membrane.projection.radian()
    rest: list[Tensor | None] = []

    def made() -> Tensor:
        nonlocal rest
        out, *rest = neurons(current, layer, size, **tensors)
        return out

    if spike is None:
        out = made()
    else:
        tensors["level"], tensors["anneal"] = spike.level, spike.share(current)
        out = spike(current, made)
    handed_on, merged, statistics = rest
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
    unbiased = found[1] * (rows / (rows - 1))
    norm.running_var.lerp_(unbiased.to(dtype), share)
