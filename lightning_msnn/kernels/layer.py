"""A layer of neurons as one operation, from a synapse's current to spikes, and the table of what runs where.

Batch norm, scan over windows, merge and threshold are one pass forward, after one for the statistics, and two passes
backward, which recompute from the current. :mod:`lightning_msnn.functional` says what a layer computes. CPUs run C
(:mod:`~lightning_msnn.kernels.native`), CUDA runs what ``torch.compile`` writes (:mod:`~lightning_msnn.kernels.fused`).
The C kernels have no second derivative.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import fused, native
from lightning_msnn.kernels.geometry import Layer, Made, Shapes, Tensors, shapes

__all__ = ["eager", "kernels_of", "neurons"]

_NAMES = tuple(Tensors.__annotations__)
LAST = torch.channels_last
_SMALL = 2**17  # elements of a map for which torch's comparison is faster than a kernel


def eager(x: Tensor) -> bool:
    """Whether nothing compiles, exports, traces, transforms (``torch.func``), differentiates forwards or watches.

    A kernel reads memory, which none of these see: what is traced would be what the memory held before.

    Args:
        x: A tensor that a kernel would read; a subclass may keep its values elsewhere.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:  # type: ignore[no-untyped-call]
        return False
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return torch._C._has_storage(x)  # gradients of several losses at once have none


def kernels_of(x: Tensor) -> ModuleType | None:
    """Return the kernels for a current; None is torch's own operations, where something compiles or traces, too."""
    if not eager(x) or x.numel() == 0:
        return None
    if x.dtype in fused.DTYPES and x.device.type in fused.devices():
        return fused
    return native if x.is_cpu and x.dtype in native.DTYPES and native.library() else None


def neurons(current: Tensor, layer: Layer, size: tuple[int, int], **given: Unpack[Tensors]) -> Made:
    """Run a layer of neurons on the kernels that :func:`kernels_of` returns for its current.

    Args:
        current: Synaptic current, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        layer: What the layer is.
        size: Height and width of the map in pixels.
        **given: Those of :class:`~lightning_msnn.kernels.geometry.Tensors`.

    Returns:
        Spikes or membranes, ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; the windows' own membranes
        ``((n - 1) B, handed, h, w)``; the merged membranes, of the shape of the first; the norm's mean, variance,
        scale and shift, ``(4, C)``.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    if current.device.type in fused.devices():
        return fused.run(layer, size, current, given)
    if torch.is_grad_enabled():
        made: Made = _Neurons.apply(layer, size, current, *map(given.get, _NAMES))  # type: ignore[no-untyped-call]
        return made
    if layer.form == "still" and current.numel() <= _SMALL and given.get("running_mean") is None:
        level, share = given.get("level"), given.get("anneal")
        alike = share is None and (level is None or level.dtype == current.dtype)
        if alike and _is_one_comparison(layer, current.dtype):
            return _compare(layer, current, level), None, None, None
    return _run(layer, size, current, given)


@lru_cache(maxsize=1024)
def _is_one_comparison(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether all that a layer without a norm does is to compare with a threshold, which is a number of a type."""
    threshold = torch.tensor(layer.threshold, dtype=torch.float32, device="cpu")
    bare = layer.kind == "single" and layer.levels == 1 and not (layer.training or layer.keeps or layer.handed)
    return layer.fires and bare and bool(threshold.to(dtype) == threshold)


def _compare(layer: Layer, current: Tensor, level: Tensor | None) -> Tensor:
    """Return the spikes of a layer that is one comparison: torch's operator takes less time to start than a kernel."""
    threshold = layer.threshold if level is None else level.view(-1, 1, 1)
    if layer.bytes:
        return torch.ge(current.contiguous(memory_format=LAST), threshold).view(torch.uint8)
    return torch.ge(current, threshold, out=torch.empty_like(current, memory_format=LAST))


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


def _run(layer: Layer, size: tuple[int, int], current: Tensor, given: Tensors) -> Made:
    """Run a layer in C, without gradients; see :func:`neurons`."""
    if layer.bytes and (not layer.fires or given.get("anneal") is not None):
        raise ValueError("spikes are bytes in inference alone")
    current, dtype = current.contiguous(memory_format=LAST), current.dtype
    if (residual := given.get("residual")) is not None:
        given["residual"] = residual = residual.to(dtype).contiguous(memory_format=LAST)
    if (other := given.get("other")) is not None:
        given["other"] = other = other.to(dtype).contiguous(memory_format=LAST)
    at = _checked(layer, size, current.shape, getattr(residual, "shape", None), getattr(other, "shape", None))
    out = _empty(at.out, current, torch.uint8 if layer.bytes else dtype)
    handed = None if at.handed is None else _empty(at.handed, current, dtype)
    merged = _empty(at.out, current, dtype) if layer.keeps else None
    norm = native.forward(layer, size, current, given, out, handed, merged)
    return out, handed, merged, norm


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Make an uninitialised map in channels-last order."""
    if like.shape == shape:  # takes half the time
        return torch.empty_like(like, dtype=dtype, memory_format=LAST)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=LAST)


class _Neurons(torch.autograd.Function):
    """A layer in C, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, size: tuple[int, int], current: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        given: Any = dict(zip(_NAMES, tensors, strict=True))
        made = _run(layer, size, current, given.copy())
        ctx.layer, ctx.size = layer, size
        given["running_mean"] = given["running_var"] = None  # the norm has them, and they may move
        given["residual"] = None
        ctx.save_for_backward(current, made[3], *given.values())
        ctx.set_materialize_grads(False)
        if made[3] is not None:
            ctx.mark_non_differentiable(made[3])
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
        layer: Layer = ctx.layer
        current, norm, *tensors = ctx.saved_tensors
        given: Any = dict(zip(_NAMES, tensors, strict=True))
        if grad is None:
            grad = current.new_zeros(shapes(layer, ctx.size, current.shape).out)
        if not eager(grad):
            raise ConfigurationError(
                "kernels compute one gradient at a time: LIGHTNING_MSNN_NATIVE=0 leaves several at once to torch"
            )
        kept, other = current.contiguous(memory_format=LAST), given.pop("other")
        maps = (grad, *more[:2], other)
        read: list[Any] = [x if x is None else x.to(kept.dtype).contiguous(memory_format=LAST) for x in maps]
        upstream, handed, merged, seen = read
        grad_current, grad_other, sums = native.backward(
            layer, ctx.size, upstream, handed, merged, seen, kept, norm, given
        )
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
        needs = zip(("current", *_NAMES), ctx.needs_input_grad[2:], strict=True)
        return None, None, *(found[name]() if needed else None for name, needed in needs)


def _sum_to(by_channel: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient by channel over all that share a parameter."""
    total = by_channel if parameter.numel() > 1 else by_channel.sum()
    return total.reshape(parameter.shape).to(parameter.dtype)
