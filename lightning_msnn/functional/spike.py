"""The Heaviside step and the surrogate gradients that stand in for its derivative.

A surrogate is a function ``h(x)`` of the distance ``x = u - V`` between membrane and threshold. The forward pass is the
exact step; only the backward pass uses ``h`` in place of the Dirac delta (Neftci et al., *Surrogate Gradient Learning
in Spiking Neural Networks*, IEEE Signal Processing Magazine 2019). Every surrogate here is even, integrates to 1, so
that it is a density as the delta is, and is evaluated in the data type of its input.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.functional.native_scan import triangular_backward

__all__ = ["SURROGATES", "arctan", "heaviside", "rectangular", "sigmoid", "triangular"]


def rectangular(x: Tensor) -> Tensor:
    """Rectangle of width 1 and height 1, the paper's choice: ``h(x) = 1 if |x| < 1/2 else 0``.

    Source: Wu et al., *Spatio-Temporal Backpropagation for Training High-Performance Spiking Neural Networks*, 2018.

    Args:
        x: Membrane less threshold, any shape.

    Returns:
        The surrogate derivative, shape and data type of ``x``.
    """
    return (x.abs() < 0.5).to(x.dtype)


def triangular(x: Tensor) -> Tensor:
    """Triangle of width 2 and height 1: ``h(x) = max(0, 1 - |x|)`` (Bellec et al. 2018, without its damping factor).

    Args:
        x: Membrane less threshold, any shape.

    Returns:
        The surrogate derivative, shape and data type of ``x``.
    """
    return (1.0 - x.abs()).clamp(min=0.0)


def arctan(x: Tensor) -> Tensor:
    """Derivative of a scaled arctangent: ``h(x) = 1 / (1 + (pi x)^2)`` (Fang et al. 2021 with alpha = 2).

    Args:
        x: Membrane less threshold, any shape.

    Returns:
        The surrogate derivative, shape and data type of ``x``.
    """
    return 1.0 / (1.0 + (math.pi * x) * (math.pi * x))


def sigmoid(x: Tensor) -> Tensor:
    """Derivative of a logistic function of slope 4: ``h(x) = 4 S(4x) (1 - S(4x))``, of height 1.

    Args:
        x: Membrane less threshold, any shape.

    Returns:
        The surrogate derivative, shape and data type of ``x``.
    """
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

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, threshold: float, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(membrane)
        ctx.threshold, ctx.surrogate = threshold, surrogate
        if torch.compiler.is_compiling():
            return (membrane >= threshold).to(membrane.dtype)
        # Written as numbers at once: on a CPU in bf16 twenty times as fast as truth values that are converted.
        return torch.ge(membrane, threshold, out=torch.empty_like(membrane))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (membrane,) = ctx.saved_tensors
        once = ctx.surrogate is triangular and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if once and (by_membrane := triangular_backward(grads[0], membrane, ctx.threshold)) is not None:
            return by_membrane, None, None
        x = membrane - ctx.threshold
        if once:
            # The same in fewer passes over memory: g (1 - min(|x|, 1)).
            return torch.addcmul(grads[0], grads[0], x.abs_().clamp_(max=1.0), value=-1.0), None, None
        return grads[0] * ctx.surrogate(x), None, None


def heaviside(membrane: Tensor, surrogate: Callable[[Tensor], Tensor] = triangular, threshold: float = 0.0) -> Tensor:
    """Fire where the membrane has reached its threshold: ``s = 1 if u >= V else 0``.

    Args:
        membrane: Membrane ``u``, any shape.
        surrogate: The derivative that the backward pass uses, a function of ``u - V``, one of :data:`SURROGATES` or any
            like them.
        threshold: Threshold ``V``.

    Returns:
        Spikes, exactly 0 or 1, shape and data type of ``membrane``. NaN does not fire.
    """
    spikes: Tensor = _Heaviside.apply(membrane, threshold, surrogate)  # type: ignore[no-untyped-call]
    return spikes
