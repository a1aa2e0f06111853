"""The projection Omega as a module, which holds its radian factor theta."""

import math

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, check_number, choose
from lightning_msnn.functional.projection import PROJECTIONS, WITHOUT_THETA

__all__ = ["LearntProjection", "Projection"]


class _Omega(nn.Module):
    """A projection by name; a subclass holds theta and returns it, a scalar in units of pi, as ``radian()``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.omega = choose(PROJECTIONS, name, "projection")

    def radian(self) -> Tensor:
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
        theta: Radian factor in units of pi, in [0, 1].

    Raises:
        ConfigurationError: If the name is not known or theta is not in [0, 1].
    """

    theta: Tensor

    def __init__(self, name: str = "sine", theta: float = 0.25) -> None:
        super().__init__(name)
        self.register_buffer("theta", torch.tensor(check_number("theta", theta)))

    def radian(self) -> Tensor:
        """Return theta."""
        return self.theta


class LearntProjection(_Omega):
    """A :class:`Projection` whose theta is learnt; its logit is the parameter, so that theta stays in (0, 1).

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
        """Return theta."""
        return torch.sigmoid(self.theta_logit)
