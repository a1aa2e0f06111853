"""The projection Omega, which merges what layer 1 and layer 2 saw in the window before.

A projection is a function ``omega(a, b, theta)`` of two membranes of equal shape and of the radian factor theta, a
scalar tensor in units of pi. A new one is a function in this file and a line in :data:`PROJECTIONS`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PROJECTIONS", "mean", "sine"]


def sine(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = 2 sin(pi theta a cos(pi theta b))``, the projection of Yao et al. (arXiv 2401.10843).

    Bounded to [-2, 2]; ``Omega(0, b) = 0``.

    Args:
        a: Membrane of layer 1 in the window before, any shape.
        b: Membrane of layer 2 in the window before, shape of ``a``.
        theta: Radian factor in units of pi, a scalar tensor.

    Returns:
        The merged membrane, shape of ``a``.
    """
    angle = math.pi * theta
    return 2.0 * torch.sin(angle * a * torch.cos(angle * b))


def mean(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """``Omega(a, b) = (a + b) / 2``, which the authors' CIFAR-100 program uses; not bounded, theta plays no part.

    Args:
        a: Membrane of layer 1 in the window before, any shape.
        b: Membrane of layer 2 in the window before, shape of ``a``.
        theta: Not used; every projection takes the same arguments.

    Returns:
        The merged membrane, shape of ``a``.
    """
    return (a + b) * 0.5


PROJECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sine": sine, "mean": mean}
"""Projections by the name that configurations use."""
