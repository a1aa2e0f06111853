"""A layer of neurons as one operation, from a synapse's current to spikes.

Batch norm, scan over windows, merge and threshold run in one pass forward, after one that takes the statistics, and in
two passes backward, which recompute from the current. :mod:`lightning_msnn.functional` says what a layer computes;
:func:`covered` which layers run here, on which kernels; all others run on the reference. The operators are registered
with torch once, for autograd and for ``torch.compile``. They have no second derivative.

Maps are in channels-last order in memory, whatever order they come in. Windows are given to the kernels as tables of
pixels, which are made by cutting a map of numbers.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_msnn.kernels import native
from lightning_msnn.kernels.geometry import SUMS, Layer, batches, empty, last, layer_of, outputs, sizes

__all__ = ["covered", "kernels_of", "neurons"]


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    """The kernels for CUDA, None where Triton is not installed."""
    try:
        from lightning_msnn.kernels import triton
    except ImportError:
        return None
    return triton


def kernels_of(x: Tensor) -> ModuleType | None:
    """The kernels for tensors like one: the table of what runs where. None is the reference."""
    if x.device.type == "cpu":
        return native if x.dtype in native.DTYPES and native.available() else None
    triton = _triton() if x.is_cuda else None
    return triton if triton is not None and x.dtype in triton.DTYPES else None


def covered(x: Tensor, *parts: tuple[str, tuple[str, ...]]) -> bool:
    """Whether a layer runs on a kernel.

    Not in an exported program, which is to run where this package is not installed, and not where something traces or
    watches each operation.

    Args:
        x: Its current.
        *parts: Names of what the layer is made of, each with those that kernels know.
    """
    if type(x) is not Tensor or x.numel() == 0 or torch.compiler.is_exporting() or is_in_torch_dispatch_mode():
        return False
    return all(name in known for name, known in parts) and kernels_of(x) is not None


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


@torch.library.custom_op("lightning_msnn::neurons", mutates_args=())
def _neurons(
    current: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tau: Tensor | None,
    other: Tensor | None,
    theta: Tensor | None,
    level: Tensor | None,
    anneal: Tensor | None,
    spec: str,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`neurons`; the last output is the norm: mean, variance, scale and shift by channel."""
    return _run(
        current, residual, weight, bias, running_mean, running_var, tau, other, theta, level, anneal, layer_of(spec),
        height, width,
    )  # fmt: skip


def _run(
    current: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tau: Tensor | None,
    other: Tensor | None,
    theta: Tensor | None,
    level: Tensor | None,
    anneal: Tensor | None,
    layer: Layer,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels: Any = kernels_of(current)
    size, current = (height, width), last(current)
    _check(layer, current, residual, other, size)
    norm = None
    if layer.training and layer.synchronised:
        norm = kernels.statistics(current, weight, bias, layer.eps)
        norm = _synchronise(norm, weight, bias, current.numel() // current.shape[1], layer.eps)
    residual = None if residual is None else last(residual, current.dtype)
    other = None if other is None else last(other, current.dtype)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.forward(
        layer, size, current, residual, norm, weight, bias, running_mean, running_var, tau, other, theta, level, anneal
    )
    return result


def _check(layer: Layer, current: Tensor, residual: Tensor | None, other: Tensor | None, size: tuple[int, int]) -> None:
    """Refuse what would be read beyond its end.

    Raises:
        ValueError: If a shape is not what the others make it.
    """
    channels, at = current.shape[1], sizes(layer, *size)
    images, after, before = batches(layer, at.windows, current)
    if layer.handed and layer.form != "first":
        raise ValueError(f"only a first layer hands its membranes on, not one whose form is {layer.form!r}")
    begin = images * at.windows if at.windows and layer.windows_in else images
    expected = [(current, (begin, channels, *at.current), "the current")]
    if residual is not None:
        expected.append((residual, (after, channels, *at.out), "the residual stream"))
    if at.windows and layer.form in ("coupled", "recurrent"):
        coupled = layer.form == "coupled"
        shape = (before, channels, *at.window) if coupled else (images, channels, *size)
        if other is None:
            raise ValueError(f"a {layer.form} layer needs the membranes that it is coupled with")
        expected.append((other, shape, "membranes of layer 1" if coupled else "the map that was received"))
    for x, shape, what in expected:
        if x.shape != shape:
            raise ValueError(f"{what} must have the shape {tuple(shape)}, not {tuple(x.shape)}")


@_neurons.register_fake
def _(current: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer, height, width = layer_of(args[-3]), args[-2], args[-1]
    at = sizes(layer, height, width)
    has_norm = layer.training or args[3] is not None
    shape = (4 + layer.synchronised, current.shape[1]) if has_norm else (0,)
    norm = torch.empty(shape, dtype=torch.float32, device=current.device)
    return *outputs(layer, at, current), norm


@torch.library.custom_op("lightning_msnn::neurons_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_handed: Tensor | None,
    grad_merged: Tensor | None,
    current: Tensor,
    norm: Tensor,
    tau: Tensor | None,
    other: Tensor | None,
    theta: Tensor | None,
    level: Tensor | None,
    anneal: Tensor | None,
    spec: str,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the current, of ``other``, and sums by channel: see the kernels."""
    layer = layer_of(spec)
    kernels: Any = kernels_of(current)
    current, grad = last(current), last(grad, current.dtype)
    grads = [None if g is None else last(g, current.dtype) for g in (grad_handed, grad_merged)]
    seen = None if other is None else last(other, current.dtype)
    by_current, by_other, sums = kernels.backward(
        layer, (height, width), grad, *grads, current, norm, tau, seen, theta, level, anneal, not layer.synchronised
    )
    if layer.training and layer.synchronised:
        channels = current.shape[1]
        owed = torch.cat([sums[:2].flatten(), sums.new_tensor([float(current.numel() // channels)])]).double()
        torch.distributed.all_reduce(owed)
        totals = sums.clone()
        totals[:2] = owed[:-1].view(2, channels)
        kernels.settle(by_current, current, norm, totals, owed[-1:], layer.eps)
    if other is not None and by_other.dtype != other.dtype:
        by_other = by_other.to(other.dtype)
    return by_current, by_other, sums


@_backward.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    current, other = args[2], args[5]
    sums = torch.empty((SUMS + 2, current.shape[1]), dtype=torch.float32, device=current.device)
    by_current = torch.empty_like(current, memory_format=torch.channels_last)
    if other is None:
        return by_current, current.new_empty(0), sums
    return by_current, torch.empty_like(other, memory_format=torch.channels_last), sums


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    current, _, weight, bias, _, _, tau, other, theta, level, anneal, ctx.spec, ctx.height, ctx.width = inputs
    ctx.save_for_backward(current, output[3], weight, tau, other, theta, level, anneal)
    ctx.of_norm = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad: Tensor | None, grad_handed: Tensor | None, grad_merged: Tensor | None, _: Any
) -> tuple[Any, ...]:
    current, norm, weight, tau, other, theta, level, anneal = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad is None:
        layer = layer_of(ctx.spec)
        at = sizes(layer, ctx.height, ctx.width)
        grad = empty(current, batches(layer, at.windows, current)[1], current.shape[1], at.out).zero_()
    by_current, by_other, sums = _backward(
        grad, grad_handed, grad_merged, current, norm, tau, other, theta, level, anneal,
        ctx.spec, ctx.height, ctx.width,
    )  # fmt: skip
    by_weight = None
    if needs[2]:
        by_weight = (sums[1] * torch.rsqrt(norm[1] + layer_of(ctx.spec).eps)).to(weight.dtype)
    return (
        by_current,
        grad if needs[1] else None,
        by_weight,
        sums[0].to(ctx.of_norm) if needs[3] else None,
        None,
        None,
        _sum_to(sums[2], tau) if needs[6] else None,
        by_other if needs[7] else None,
        _sum_to(sums[3] * torch.pi, theta) if needs[8] else None,
        _sum_to(sums[4], level) if needs[9] else None,
        *[None] * 4,
    )


def _sum_to(by_channel: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient by channel over all that share a parameter."""
    total = by_channel if parameter.numel() > 1 else by_channel.sum()
    return total.reshape(parameter.shape).to(parameter.dtype)


_neurons.register_autograd(_autograd, setup_context=_setup)


def neurons(
    current: Tensor,
    layer: Layer,
    size: tuple[int, int],
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    tau: Tensor | None = None,
    other: Tensor | None = None,
    theta: Tensor | None = None,
    level: Tensor | None = None,
    anneal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a layer of neurons that is :func:`covered`.

    Args:
        current: Synaptic current, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        layer: What the layer is.
        size: Height and width of the map in pixels.
        residual: What is added to the membranes that a layer without spikes returns, of their shape.
        weight: Scale of the norm by channel, if it has one.
        bias: Shift of the norm by channel, if it has one.
        running_mean: Mean by channel that a norm takes which is not ``layer.training``; without it there is no norm.
        running_var: Variance by channel, likewise.
        tau: Decay from window to window, a scalar or ``(C, 1, 1)``.
        other: Membranes of layer 1, ``((n - 1) B, C, h, w)``, or the map ``(B, C, H, W)`` that a recurrent layer
            receives.
        theta: Radian factor in units of pi, a scalar tensor.
        level: Learnt threshold, one number or one for each channel.
        anneal: Share of the step in what neurons return, a scalar tensor; the rest is ``layer.soft``. None is the step.

    Returns:
        What the layer returns: spikes or membranes, ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; the windows'
        own membranes ``((n - 1) B, handed, h, w)``; the merged membranes, of the shape of the first; the norm's mean,
        variance, scale and shift, ``(4, C)``, and if they are of all processes a row of the number of places. What
        there is not is an empty tensor.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _neurons(
            current, residual, weight, bias, running_mean, running_var, tau, other, theta, level, anneal,
            layer.spec(), *size,
        )  # fmt: skip
        return result
    return _run(
        current, residual, weight, bias, running_mean, running_var, tau, other, theta, level, anneal, layer, *size
    )
