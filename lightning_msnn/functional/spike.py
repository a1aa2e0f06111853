"""The Heaviside step and the surrogate gradients that stand in for its derivative.

A surrogate is a function ``h(x)`` of the distance ``x = u - V`` between membrane and threshold, of any shape. The
forward pass is the exact step; only the backward pass uses ``h`` in place of the Dirac delta (Neftci et al., *Surrogate
Gradient Learning in Spiking Neural Networks*, IEEE Signal Processing Magazine 2019). Every surrogate here is even,
integrates to 1, so that it is a density as the delta is, and is evaluated in the data type of its input.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

__all__ = ["SURROGATES", "anneal", "arctan", "heaviside", "rectangular", "sigmoid", "triangular"]


def rectangular(x: Tensor) -> Tensor:
    """Rectangle of width 1 and height 1, the paper's choice: ``h(x) = 1 if |x| < 1/2 else 0`` (Wu et al. 2018)."""
    return (x.abs() < 0.5).to(x.dtype)


def triangular(x: Tensor) -> Tensor:
    """Triangle of width 2 and height 1: ``h(x) = max(0, 1 - |x|)`` (Bellec et al. 2018, without its damping factor)."""
    return (1.0 - x.abs()).clamp_(min=0.0)


def arctan(x: Tensor) -> Tensor:
    """Derivative of a scaled arctangent: ``h(x) = 1 / (1 + (pi x)^2)`` (Fang et al. 2021 with alpha = 2)."""
    return 1.0 / (1.0 + (math.pi * x) * (math.pi * x))


def sigmoid(x: Tensor) -> Tensor:
    """Derivative of a logistic function of slope 4: ``h(x) = 4 S(4x) (1 - S(4x))``, of height 1."""
    s = torch.sigmoid(4.0 * x)
    return 4.0 * s * (1.0 - s)


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "rectangular": rectangular,
    "triangular": triangular,
    "arctan": arctan,
    "sigmoid": sigmoid,
}
"""Surrogate gradients by the name that configurations use."""


class _Heaviside(torch.autograd.Function):
    """The step forward, the surrogate backward; of the forward pass it keeps the membrane alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(membrane: Tensor, threshold: float, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        return (membrane >= threshold).to(membrane.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        membrane, ctx.threshold, ctx.surrogate = inputs
        ctx.save_for_backward(membrane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (membrane,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate(membrane - ctx.threshold), None, None


def heaviside(
    membrane: Tensor,
    surrogate: Callable[[Tensor], Tensor] = triangular,
    threshold: Tensor | float = 0.0,
    levels: int = 1,
) -> Tensor:
    """Fire where the membrane has reached its threshold: ``s = 1 if u >= V else 0``.

    With several levels spikes are graded: how many of the thresholds ``V, 2 V, ..., D V`` the membrane has reached. In
    the backward pass each threshold has its surrogate; in between the triangles of ``V = 0.5`` sum to the slope
    ``1 / V``.

    Args:
        membrane: Membrane ``u``, any shape.
        surrogate: The derivative that the backward pass uses, a function of ``u - V``, one of :data:`SURROGATES` or any
            like them.
        threshold: Threshold ``V``, a number or a tensor that fits the membrane, which may be learnt.
        levels: Number of levels ``D``.

    Returns:
        Spikes, exactly 0, 1, ... or ``D``, shape and data type of ``membrane``. NaN does not fire.
    """
    if levels > 1:
        steps = [heaviside(membrane, surrogate, k * threshold) for k in range(1, levels + 1)]
        return sum(steps[1:], steps[0])
    given: Any = membrane
    if isinstance(given, Proxy):  # a tracer would look into the step, and leave out the surrogate
        name = next(name for name, known in SURROGATES.items() if known is surrogate)
        traced: Any = given.tracer.create_proxy("call_function", _heaviside, (given, name, threshold), {})
        return traced  # type: ignore[no-any-return]
    if isinstance(threshold, Tensor):
        membrane, threshold = membrane - threshold, 0.0
    if not torch.is_grad_enabled() and torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return _Heaviside.forward(membrane, threshold, surrogate)  # plain operations, which it can write to a file
    spikes: Tensor = _Heaviside.apply(membrane, threshold, surrogate)  # type: ignore[no-untyped-call]
    return spikes


def _heaviside(membrane: Tensor, surrogate: str, threshold: Tensor | float) -> Tensor:
    """:func:`heaviside` with the name of a surrogate, as the graph of a traced network takes it."""
    return heaviside(membrane, SURROGATES[surrogate], threshold)


def anneal(membrane: Tensor, spikes: Tensor, share: Tensor | float) -> Tensor:
    """Return ``a s + (1 - a) max(u, 0)``: spikes that sharpen while a network trains; its gradient is mixed likewise.

    Args:
        membrane: Membrane ``u``, any shape.
        spikes: Its spikes ``s``, as :func:`heaviside` returns them, shape of ``membrane``.
        share: Share ``a`` of the step, in [0, 1].
    """
    return share * spikes + (1.0 - share) * torch.relu(membrane)
