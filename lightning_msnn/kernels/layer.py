"""A layer of neurons as one operation, from a synapse's current to spikes, and the table of what runs where.

Batch norm, scan over windows, merge and threshold run in one pass forward, after one that takes the statistics, and in
two passes backward, which recompute from the current. :mod:`lightning_msnn.functional` says what a layer computes. On
CPUs that is C (:mod:`~lightning_msnn.kernels.native`), on CUDA what ``torch.compile`` writes
(:mod:`~lightning_msnn.kernels.fused`). The C kernels have no second derivative.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import fused, native
from lightning_msnn.kernels.eager import eager
from lightning_msnn.kernels.geometry import Layer, Parameters, Shapes, channels_last, outputs, shapes

__all__ = ["kernels_of", "neurons"]

_SMALL = 2**17  # elements of a map for which torch's comparison is faster than a kernel


def kernels_of(x: Tensor) -> ModuleType | None:
    """Return the kernels for a current; None is torch's own operations, where something compiles or traces, too."""
    if not eager(x) or x.numel() == 0:
        return None
    return fused if fused.covers(x) else native if native.covers(x) else None


def neurons(
    current: Tensor,
    layer: Layer,
    size: tuple[int, int],
    *,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    **parameters: Unpack[Parameters],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer of neurons on kernels.

    Args:
        current: Synaptic current, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        layer: What the layer is.
        size: Height and width of the map in pixels.
        residual: What is added to the membranes that a layer without spikes returns, of their shape.
        other: Membranes of layer 1, ``((n - 1) B, C, h, w)``, or the map ``(B, C, H, W)`` that a recurrent layer
            receives.
        **parameters: Those of :class:`~lightning_msnn.kernels.geometry.Parameters`.

    Returns:
        Spikes or membranes, ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; the windows' own membranes
        ``((n - 1) B, handed, h, w)``; the merged membranes, of the shape of the first; the norm's mean, variance,
        scale and shift, ``(4, C)``, and if they are of all processes a row of the number of places.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    if fused.covers(current):
        return fused.run(layer, size, current, residual, other, parameters)
    if torch.is_grad_enabled():
        given = [parameters.get(name) for name in Parameters.__annotations__]
        found: Any = _Neurons.apply(layer, size, current, residual, other, *given)  # type: ignore[no-untyped-call]
        out, handed, merged, norm = found
        return out, handed, merged, norm
    if layer.form == "still" and current.numel() <= _SMALL and _compares(layer, current.dtype, parameters):
        return _compare(layer, current, parameters.get("level")), None, None, None
    return _run(layer, size, current, residual, other, parameters)


@lru_cache(maxsize=1024)
def _is_one_comparison(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether all that a layer without a norm does is to compare with a threshold, which is a number of a type."""
    threshold = torch.tensor(layer.threshold, dtype=torch.float32, device="cpu")
    bare = layer.kind == "single" and layer.levels == 1 and not (layer.training or layer.keeps or layer.handed)
    return layer.fires and bare and bool(threshold.to(dtype) == threshold)


def _compares(layer: Layer, dtype: torch.dtype, given: Parameters) -> bool:
    level = given.get("level")
    more = given.get("running_mean") is not None or given.get("anneal") is not None
    return not more and (level is None or level.dtype == dtype) and _is_one_comparison(layer, dtype)


def _compare(layer: Layer, current: Tensor, level: Tensor | None) -> Tensor:
    """Return the spikes of a layer that is one comparison: torch's operator takes less time to start than a kernel."""
    threshold = layer.threshold if level is None else level.view(-1, 1, 1)
    if layer.bytes:
        return torch.ge(channels_last(current), threshold).view(torch.uint8)
    return torch.ge(current, threshold, out=torch.empty_like(current, memory_format=torch.channels_last))


@lru_cache(maxsize=2048)
def _checked(
    layer: Layer, size: tuple[int, int], current: torch.Size, residual: torch.Size | None, other: torch.Size | None
) -> Shapes:
    """Return the shapes of a layer; refuse what a kernel would read beyond its end.

    Raises:
        ValueError: If a shape is not what the others make it.
    """
    at = shapes(layer, size, current)
    if layer.handed and layer.form != "first":
        raise ValueError(f"only a first layer hands its membranes on, not one whose form is {layer.form!r}")
    given = {"the current": current, "the residual stream": residual, "the other membranes": other}
    for (what, shape), expected in zip(given.items(), (at.current, at.out, at.other), strict=True):
        if expected is not None and shape != expected and not (shape is None and what == "the residual stream"):
            raise ValueError(f"{what} must have the shape {expected}, not {shape and tuple(shape)}")
    return at


def _run(
    layer: Layer,
    size: tuple[int, int],
    current: Tensor,
    residual: Tensor | None,
    other: Tensor | None,
    given: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer in C, without gradients; see :func:`neurons`."""
    if layer.bytes and (not layer.fires or given.get("anneal") is not None):
        raise ValueError("spikes are bytes in inference alone")
    current = channels_last(current)
    residual, other = (None if x is None else channels_last(x, current.dtype) for x in (residual, other))
    sizes = (None if x is None else x.shape for x in (residual, other))
    made = outputs(layer, _checked(layer, size, current.shape, *sizes), current)
    norm = None
    if layer.training and layer.synchronised:
        weight, bias = given.get("weight"), given.get("bias")
        norm = native.statistics(current, weight, bias, layer.eps)
        norm = _synchronise(norm, weight, bias, current.numel() // current.shape[1], layer.eps)
    return *made, native.forward(layer, size, current, residual, other, norm, given, *made)


def _synchronise(norm: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int, eps: float) -> Tensor:
    """From the statistics of this process to those of all, and in a fifth row of how many places they are."""
    mean, var = norm[:2].double()
    sums = torch.cat([rows * mean, rows * (var + mean * mean), mean.new_tensor([float(rows)])])
    torch.distributed.all_reduce(sums)
    total, channels = sums[-1], len(mean)
    mean = sums[:channels] / total
    var = (sums[channels:-1] / total - mean * mean).clamp(min=0.0)
    scale = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    return torch.stack([mean, var, scale, shift, total.expand_as(mean)]).to(norm.dtype)


class _Neurons(torch.autograd.Function):
    """A layer in C, with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        size: tuple[int, int],
        current: Tensor,
        residual: Tensor | None,
        other: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        given: Any = dict(zip(Parameters.__annotations__, tensors, strict=True))
        made = _run(layer, size, current, residual, other, given)
        ctx.layer, ctx.size = layer, size
        given["running_mean"] = given["running_var"] = None  # the norm has them, and they may move
        ctx.save_for_backward(current, other, made[3], *given.values())
        ctx.set_materialize_grads(False)
        if made[3] is not None:
            ctx.mark_non_differentiable(made[3])
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
        layer: Layer = ctx.layer
        current, other, norm, *tensors = ctx.saved_tensors
        given: Any = dict(zip(Parameters.__annotations__, tensors, strict=True))
        if grad is None:
            grad = current.new_zeros(shapes(layer, ctx.size, current.shape).out)
        if not eager(grad):
            raise ConfigurationError(
                "kernels compute one gradient at a time: LIGHTNING_MSNN_NATIVE=0 leaves several at once to torch"
            )
        kept = channels_last(current)
        handed, merged, seen = (None if g is None else channels_last(g, kept.dtype) for g in (*more[:2], other))
        whole = not layer.synchronised
        grad_current, grad_other, sums = native.backward(
            layer, ctx.size, channels_last(grad, kept.dtype), handed, merged, seen, kept, norm, given, whole
        )
        if layer.training and layer.synchronised:
            rows = sums.new_tensor([float(kept.numel() // kept.shape[1])])
            owed = torch.cat([sums[:2].flatten(), rows]).double()
            torch.distributed.all_reduce(owed)
            totals = sums.clone()
            totals[:2] = owed[:-1].view(2, -1)
            native.settle(grad_current, kept, norm, totals, owed[-1:], layer.eps)
        found: dict[str, Callable[[], Tensor]] = {
            "current": lambda: grad_current,
            "residual": lambda: grad,
            "other": lambda: grad_other.to(other.dtype),  # type: ignore[union-attr]
            "weight": lambda: _sum_to(sums[1] * torch.rsqrt(norm[1] + layer.eps), given["weight"]),
            "bias": lambda: _sum_to(sums[0], given["bias"]),
            "tau": lambda: _sum_to(sums[2], given["tau"]),
            "theta": lambda: _sum_to(sums[3] * torch.pi, given["theta"]),
            "level": lambda: _sum_to(sums[4], given["level"]),
        }
        names = ("current", "residual", "other", *given)
        needs = zip(names, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(found[name]() if needed else None for name, needed in needs)


def _sum_to(by_channel: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient by channel over all that share a parameter."""
    total = by_channel if parameter.numel() > 1 else by_channel.sum()
    return total.reshape(parameter.shape).to(parameter.dtype)
