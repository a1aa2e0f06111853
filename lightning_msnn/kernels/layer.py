"""A layer of neurons as one operation, from a synapse's current to spikes.

Batch norm, scan over windows, merge and threshold run in one pass forward, after one that takes the statistics, and in
two passes backward, which recompute from the current. :mod:`lightning_msnn.functional` says what a layer computes;
:func:`covered` which layers run here, on which kernels; all others run on the reference. Compilers see operators that
are registered with torch once, for autograd too; any other training does without, as torch's dispatcher takes longer
than a kernel on small maps. There is no second derivative.

Maps are in channels-last order in memory, whatever order they come in. Windows are given to the kernels as tables of
pixels, which are made by cutting a map of numbers.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import native
from lightning_msnn.kernels.eager import eager
from lightning_msnn.kernels.geometry import SUMS, Layer, Parameters, Shapes, last, layer_of, outputs, shapes

__all__ = ["covered", "kernels_of", "neurons"]


def kernels_of(x: Tensor) -> ModuleType | None:
    """The kernels for tensors like one: the table of what runs where. None is the reference."""
    return native if x.is_cpu and x.dtype in native.DTYPES and native.available() else None


def covered(x: Tensor) -> bool:
    """Whether a layer runs on a kernel.

    Not in an exported program, which is to run where this package is not installed, and but for compilers not where
    something traces, transforms or watches each operation.

    Args:
        x: Its current.
    """
    if type(x) is not Tensor or x.numel() == 0 or torch.compiler.is_exporting():
        return False
    if not (torch.compiler.is_compiling() or eager(x)):
        return False
    return kernels_of(x) is not None


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


_SMALL = 2**17  # elements of a map for which torch's comparison is faster than a kernel

_INPUTS = ("current", "residual", "other", *Parameters.__annotations__)


def _neurons_of(*inputs: Any) -> tuple[Tensor, ...]:
    """See :func:`neurons`; the last output is the norm: mean, variance, scale and shift by channel."""
    current, residual, other, *tensors, spec, threshold, eps, height, width = inputs
    given: Any = dict(zip(Parameters.__annotations__, tensors, strict=True))
    return _filled(*_run(layer_of(spec, threshold, eps), (height, width), current, residual, other, given))


_neurons = torch.library.custom_op(
    "lightning_msnn::neurons",
    _neurons_of,
    mutates_args=(),
    schema=f"(Tensor {', Tensor? '.join(_INPUTS)}, str spec, float threshold, float eps, SymInt height, SymInt width)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def _filled(out: Tensor, handed: Tensor | None, merged: Tensor | None, norm: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: an empty one for what there is not."""
    return (
        out,
        out.new_empty(0) if handed is None else handed,
        out.new_empty(0) if merged is None else merged,
        out.new_empty(0, dtype=torch.float32) if norm is None else norm,
    )


def _run(
    layer: Layer,
    size: tuple[int, int],
    current: Tensor,
    residual: Tensor | None,
    other: Tensor | None,
    given: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    kernels: Any = kernels_of(current)
    if layer.bytes and (kernels is not native or not layer.surrogate or given.get("anneal") is not None):
        raise ValueError("spikes are bytes on CPUs and in inference alone")
    current = last(current)
    maps = [None if x is None else last(x, current.dtype) for x in (residual, other)]
    at = _checked(layer, size, current.shape, *(None if x is None else x.shape for x in maps))
    norm = None
    if layer.training and layer.synchronised:
        weight, bias = given.get("weight"), given.get("bias")
        norm = kernels.statistics(current, weight, bias, layer.eps)
        norm = _synchronise(norm, weight, bias, current.numel() // current.shape[1], layer.eps)
    made = outputs(layer, at, current)
    return *made, kernels.forward(layer, size, current, *maps, norm, given, *made)


@lru_cache(maxsize=2048)
def _checked(
    layer: Layer,
    size: tuple[int, int],
    current: torch.Size,
    residual: torch.Size | None,
    other: torch.Size | None,
) -> Shapes:
    """Shapes of a layer; refuses what would be read beyond its end.

    Raises:
        ValueError: If a shape is not what the others make it.
    """
    at = shapes(layer, size, current)
    if layer.handed and layer.form != "first":
        raise ValueError(f"only a first layer hands its membranes on, not one whose form is {layer.form!r}")
    coupled = layer.form == "coupled"
    if at.other is not None and other is None:
        raise ValueError(f"a {layer.form} layer needs the membranes that it is coupled with")
    for shape, expected, what in (
        (current, at.current, "the current"),
        (residual, at.out, "the residual stream"),
        (other, at.other, "membranes of layer 1" if coupled else "the map that was received"),
    ):
        if shape is not None and expected is not None and shape != expected:
            raise ValueError(f"{what} must have the shape {expected}, not {tuple(shape)}")
    return at


@_neurons.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    given, (spec, _, _, height, width) = dict(zip(_INPUTS, inputs, strict=False)), inputs[-5:]
    layer, current, norm = layer_of(spec), given["current"], None
    if layer.training or given["running_mean"] is not None:
        shape = (4 + layer.synchronised, current.shape[1])
        norm = torch.empty(shape, dtype=torch.float32, device=current.device)
    return _filled(*outputs(layer, shapes(layer, (height, width), current.shape), current), norm)


def _run_backward(
    grad: Tensor,
    grad_handed: Tensor | None,
    grad_merged: Tensor | None,
    current: Tensor,
    other: Tensor | None,
    norm: Tensor,
    tau: Tensor | None,
    theta: Tensor | None,
    level: Tensor | None,
    anneal: Tensor | None,
    spec: str,
    threshold: float,
    eps: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the current and of ``other``, and sums by channel: see the kernels."""
    layer = layer_of(spec, threshold, eps)
    given = Parameters(tau=tau, theta=theta, level=level, anneal=anneal)
    kernels: Any = kernels_of(current)
    current, grad = last(current), last(grad, current.dtype)
    # Of what a layer does not hand on, a compiler gives an empty gradient.
    grads = [None if g is None or not g.numel() else last(g, current.dtype) for g in (grad_handed, grad_merged)]
    seen = None if other is None else last(other, current.dtype)
    by_current, by_other, sums = kernels.backward(
        layer, (height, width), grad, *grads, current, seen, norm, given, not layer.synchronised
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


_backward = torch.library.custom_op("lightning_msnn::neurons_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    current, other = args[2:4]
    sums = torch.empty((SUMS + 2, current.shape[1]), dtype=torch.float32, device=current.device)
    by_other = current.new_empty(0) if other is None else torch.empty_like(other, memory_format=torch.channels_last)
    return torch.empty_like(current, memory_format=torch.channels_last), by_other, sums


def _no_second(*_: Any) -> NoReturn:
    raise ConfigurationError(
        "kernels of layers of neurons have no second derivative: LIGHTNING_MSNN_NATIVE=0 leaves them to torch on a CPU"
    )


_backward.register_autograd(_no_second)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, ctx.layer = dict(zip(_INPUTS, inputs, strict=False)), inputs[-5:]
    kept = ("current", "other", "weight", "tau", "theta", "level", "anneal")
    ctx.save_for_backward(output[3], *(given[name] for name in kept))
    ctx.of_norm = None if given["bias"] is None else given["bias"].dtype
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any,
    grad: Tensor | None,
    grad_handed: Tensor | None,
    grad_merged: Tensor | None,
    _: Any,
) -> tuple[Any, ...]:
    norm, current, other, weight, tau, theta, level, anneal = ctx.saved_tensors
    spec, _, eps, *size = ctx.layer
    needs = dict(zip(_INPUTS, ctx.needs_input_grad, strict=False))
    if grad is None:
        layer = layer_of(spec)
        grad = outputs(layer, shapes(layer, (size[0], size[1]), current.shape), current)[0].zero_()
    parameters = (tau, theta, level, anneal)
    # The operator is what compilers see, refuses a second derivative, and takes several gradients at once.
    backward: Any = _run_backward if eager(grad) and not torch.is_grad_enabled() else _backward
    by_current, by_other, sums = backward(grad, grad_handed, grad_merged, current, other, norm, *parameters, *ctx.layer)
    grads: dict[str, Callable[[], Tensor]] = {
        "current": lambda: by_current,
        "residual": lambda: grad,
        "other": lambda: by_other,
        "weight": lambda: (sums[1] * torch.rsqrt(norm[1] + eps)).to(weight.dtype),
        "bias": lambda: sums[0].to(ctx.of_norm),
        "tau": lambda: _sum_to(sums[2], tau),
        "theta": lambda: _sum_to(sums[3] * torch.pi, theta),
        "level": lambda: _sum_to(sums[4], level),
    }
    return *(grads[name]() if needs[name] else None for name in _INPUTS), *[None] * len(ctx.layer)


def _sum_to(by_channel: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient by channel over all that share a parameter."""
    total = by_channel if parameter.numel() > 1 else by_channel.sum()
    return total.reshape(parameter.shape).to(parameter.dtype)


_neurons.register_autograd(_autograd, setup_context=_setup)


class _Neurons(torch.autograd.Function):
    """The operator, without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        out = _neurons_of(*inputs)
        _setup(ctx, inputs, out)
        return out

    backward = staticmethod(_autograd)


@lru_cache(maxsize=1024)
def _compares(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether all that a layer without a norm does is to compare with a threshold, which is a number of a type."""
    threshold = torch.tensor(layer.threshold, dtype=torch.float32, device="cpu")
    bare = layer.form == "still" and layer.kind == "single" and not (layer.training or layer.keeps or layer.handed)
    return bool(layer.surrogate) and bare and bool(threshold.to(dtype) == threshold)


def _compare(layer: Layer, current: Tensor, given: Parameters) -> Tensor | None:
    """Spikes of a layer that is one comparison; None for others.

    Torch's own operator takes less time to start than a kernel, and more for a large map.
    """
    if given.get("running_mean") is not None or given.get("anneal") is not None or not _compares(layer, current.dtype):
        return None
    level = given.get("level")
    if level is not None and (level.dtype != current.dtype or level.numel() not in (1, current.shape[1])):
        return None
    threshold = layer.threshold if level is None else level.view(-1, 1, 1)
    if layer.bytes:
        return torch.ge(last(current), threshold).view(torch.uint8)
    return torch.ge(current, threshold, out=torch.empty_like(current, memory_format=torch.channels_last))


def neurons(
    current: Tensor,
    layer: Layer,
    size: tuple[int, int],
    *,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    **parameters: Unpack[Parameters],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer of neurons that is :func:`covered`.

    Args:
        current: Synaptic current, ``(B, C, H, W)``, or a batch of windows ``(n B, C, h, w)``.
        layer: What the layer is.
        size: Height and width of the map in pixels.
        residual: What is added to the membranes that a layer without spikes returns, of their shape.
        other: Membranes of layer 1, ``((n - 1) B, C, h, w)``, or the map ``(B, C, H, W)`` that a recurrent layer
            receives.
        **parameters: Those of :class:`~lightning_msnn.kernels.geometry.Parameters`.

    Returns:
        What the layer returns: spikes or membranes, ``(B, C, H, W)``, or the windows' ``(n B, C, h, w)``; the windows'
        own membranes ``((n - 1) B, handed, h, w)``; the merged membranes, of the shape of the first; the norm's mean,
        variance, scale and shift, ``(4, C)``, and if they are of all processes a row of the number of places. What
        there is not is None, or with gradients an empty tensor.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or torch.is_grad_enabled():
        given = {"current": current, "residual": residual, "other": other, **parameters}
        operator: Any = _neurons if compiling else _Neurons.apply
        what = layer.spec(), layer.threshold, layer.eps, *size
        out, handed, merged, norm = operator(*[given.get(name) for name in _INPUTS], *what)
        return out, handed, merged, norm
    if layer.form == "still" and current.numel() <= _SMALL:
        spikes = _compare(layer, current, parameters)
        if spikes is not None:
            return spikes, None, None, None
    return _run(layer, size, current, residual, other, parameters)
