"""The projection Omega as a module, which holds its radian factor theta."""

import math

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional.projection import PROJECTIONS

__all__ = ["Projection"]


class Projection(nn.Module):
    """Merge the membranes that layers 1 and 2 had in the window before: ``Omega(a, b)``.

    Args:
        name: Name of the projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        theta: Radian factor in units of pi, a finite number in [0, 1]; a buffer, which a schedule can move.

    Raises:
        ConfigurationError: If the name is not known or theta is not in [0, 1].
    """

    theta: Tensor

    def __init__(self, name: str = "sine", theta: float = 0.25) -> None:
        super().__init__()
        self.name = name
        self.omega = choose(PROJECTIONS, name, "projection")
        if not (math.isfinite(theta) and 0.0 <= theta <= 1.0):
            raise ConfigurationError(f"theta must be a finite number in [0, 1], not {theta}")
        self.register_buffer("theta", torch.tensor(float(theta)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Project two membranes of equal shape onto one."""
        return self.omega(first, second, self.theta)

    def extra_repr(self) -> str:
        """Show the name; theta is a buffer and may move."""
        return f"{self.name!r}"
