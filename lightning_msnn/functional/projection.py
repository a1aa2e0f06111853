"""The projection Omega, which merges what layer 1 and layer 2 saw in the window before.

A projection is a function ``omega(a, b, theta)`` of the membranes that layers 1 and 2 had in the window before, of
equal shape, and of the radian factor theta, a scalar tensor in units of pi. It returns the merged membrane, of that
shape. A new one is a line in :data:`PROJECTIONS`. Below, ``c = pi theta``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PROJECTIONS", "WITHOUT_THETA", "exponential", "mean", "none", "piecewise_linear", "polynomial", "sine"]
__all__ += ["tanh"]


def sine(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = 2 sin(c a cos(c b))``, the projection of Yao et al. (arXiv 2401.10843).

    Range [-2, 2]; the derivative with respect to ``a`` is in [-2 c, 2 c], that with respect to ``b`` in
    [-2 c^2 |a|, 2 c^2 |a|]; ``Omega(0, b) = 0``.
    """
    angle = math.pi * theta
    return 2.0 * torch.sin(angle * a * torch.cos(angle * b))


def mean(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = (a + b) / 2``, which the authors' CIFAR-100 program uses; theta plays no part.

    Range unbounded; both derivatives 1/2; ``Omega(0, 0) = 0``.
    """
    return (a + b) * 0.5


def tanh(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """Twice the hyperbolic tangent of ``c (a + b) / 2``: bounded as the sine is, without its folds.

    Range (-2, 2); both derivatives in (0, c]; ``Omega(0, 0) = 0``.
    """
    return 2.0 * torch.tanh(0.5 * math.pi * theta * (a + b))


def exponential(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = 2 sign(x) (1 - exp(-c |x|))`` with ``x = (a + b) / 2``.

    Range (-2, 2); both derivatives in (0, c]; ``Omega(0, 0) = 0``.
    """
    x = 0.5 * (a + b)
    negative = x < 0  # torch.abs has no slope at 0
    y = -2.0 * torch.expm1(-math.pi * theta * torch.where(negative, -x, x))
    return torch.where(negative, -y, y)


def polynomial(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = y (3 - y^2)`` with ``y = c (a + b) / 2`` cut to [-1, 1]: it reaches its bounds with slope 0.

    Range [-2, 2]; both derivatives in [0, 3 c / 2]; ``Omega(0, 0) = 0``.
    """
    y = (0.5 * math.pi * theta * (a + b)).clamp(-1.0, 1.0)
    return y * (3.0 - y * y)


def piecewise_linear(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = c (a + b)`` cut to [-2, 2]: no transcendental function to evaluate.

    Range [-2, 2]; both derivatives 0 or c; ``Omega(0, 0) = 0``.
    """
    return (math.pi * theta * (a + b)).clamp(-2.0, 2.0)


def none(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = b``: no recurrence from layer to layer, the ablation; theta plays no part.

    Range unbounded; derivatives 0 and 1; ``Omega(0, 0) = 0``.
    """
    return b


PROJECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sine": sine,
    "mean": mean,
    "tanh": tanh,
    "exponential": exponential,
    "polynomial": polynomial,
    "piecewise_linear": piecewise_linear,
    "none": none,
}
"""Projections by the name that configurations use."""

WITHOUT_THETA = {"mean", "none"}
"""Projections in which theta plays no part."""
