"""The projection Omega as a module, which holds its radian factor theta."""

import math

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional.projection import PROJECTIONS, WITHOUT_THETA

__all__ = ["LearntProjection", "Projection", "make_projection"]


class _Omega(nn.Module):
    """A projection by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.omega = choose(PROJECTIONS, name, "projection")

    def radian(self) -> Tensor:
        """Return theta, a scalar, in units of pi."""
        raise NotImplementedError

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Merge the membranes that layers 1 and 2 had in the window before, of equal shape: ``Omega(a, b)``."""
        return self.omega(first, second, self.radian())

    def extra_repr(self) -> str:
        """Show the name; theta may move."""
        return f"{self.name!r}"


class Projection(_Omega):
    """A projection whose radian factor is a buffer, which a schedule can move.

    Args:
        name: Name of the projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        theta: Radian factor in units of pi, a finite number in [0, 1].

    Raises:
        ConfigurationError: If the name is not known or theta is not in [0, 1].
    """

    theta: Tensor

    def __init__(self, name: str = "sine", theta: float = 0.25) -> None:
        super().__init__(name)
        if not (math.isfinite(theta) and 0.0 <= theta <= 1.0):
            raise ConfigurationError(f"theta must be a finite number in [0, 1], not {theta}")
        self.register_buffer("theta", torch.tensor(float(theta)))

    def radian(self) -> Tensor:
        """Return theta, a scalar, in units of pi."""
        return self.theta


class LearntProjection(_Omega):
    """A projection whose radian factor is learnt; its logit is the parameter, so that theta stays in (0, 1).

    Args:
        name: Name of the projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        theta: Initial radian factor in units of pi, in (0, 1).

    Raises:
        ConfigurationError: If the name is not known, its function has no theta, or theta is not in (0, 1).
    """

    def __init__(self, name: str = "sine", theta: float = 0.25) -> None:
        super().__init__(name)
        if name in WITHOUT_THETA:
            raise ConfigurationError(f"projection {name!r} has no theta to learn: set learn_theta to false")
        if not 0.0 < theta < 1.0:
            raise ConfigurationError(f"a learnt theta must start in (0, 1), not at {theta}")
        self.theta_logit = nn.Parameter(torch.tensor(math.log(theta / (1.0 - theta))))

    def radian(self) -> Tensor:
        """Return theta, a scalar, in units of pi."""
        return torch.sigmoid(self.theta_logit)


def make_projection(name: str, theta: float, learn_theta: bool) -> Projection | LearntProjection:
    """Make the projection of one layer of neurons, with a theta that is learnt or not."""
    return LearntProjection(name, theta) if learn_theta else Projection(name, theta)
