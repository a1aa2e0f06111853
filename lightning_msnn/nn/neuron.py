"""Neurons: threshold, decay and the membranes that travel over windows.

No neuron keeps a state between calls: membranes are values that a forward pass computes and returns.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional.membrane import coupled_scan, scan
from lightning_msnn.functional.spike import SURROGATES, heaviside
from lightning_msnn.nn.projection import LearntProjection

__all__ = ["CoupledMembrane", "FixedDecay", "LearntDecay", "Membrane", "Spike", "make_decay"]


class Spike(nn.Module):
    """Fire where the membrane reaches its threshold: ``s = H(u - V)``, exactly 0 or 1.

    Args:
        threshold: Threshold ``V``, a finite number.
        surrogate: Name of the surrogate gradient, one of :data:`lightning_msnn.functional.SURROGATES`.

    Raises:
        ConfigurationError: If the threshold is not finite or the surrogate is not known.
    """

    threshold: Final[float]

    def __init__(self, threshold: float = 0.5, surrogate: str = "triangular") -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise ConfigurationError(f"threshold must be a finite number, not {threshold}")
        self.threshold = float(threshold)
        self.name = surrogate
        self.surrogate = choose(SURROGATES, surrogate, "surrogate gradient")

    def forward(self, membrane: Tensor) -> Tensor:
        """Return the spikes of a membrane of any shape."""
        x = membrane - self.threshold
        if torch.jit.is_scripting():
            # TorchScript knows no autograd.Function. ``x - x.detach()`` is exactly 0, so that the spikes stay binary.
            return (x >= 0).to(x.dtype) + (x - x.detach()) * self.surrogate(x.detach())
        return heaviside(x, self.surrogate)

    def extra_repr(self) -> str:
        """Show threshold and surrogate."""
        return f"threshold={self.threshold}, surrogate={self.name!r}"


class FixedDecay(nn.Module):
    """A decay tau that is the same for all channels and does not learn.

    Args:
        tau: Decay per window, in [0, 1].
    """

    tau: Tensor

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(self) -> Tensor:
        """Return tau, a scalar."""
        return self.tau


class LearntDecay(nn.Module):
    """A decay tau learnt for each channel; its logit is the parameter, so that it stays in (0, 1).

    Args:
        channels: Number of channels.
        tau: Initial decay per window, in (0, 1).
    """

    def __init__(self, channels: int, tau: float) -> None:
        super().__init__()
        # One axis, so that rules which exempt vectors from weight decay exempt it.
        self.logit = nn.Parameter(torch.full((channels,), math.log(tau / (1.0 - tau))))

    def forward(self) -> Tensor:
        """Return tau, shape ``(channels, 1, 1)``."""
        return torch.sigmoid(self.logit).view(-1, 1, 1)


def make_decay(channels: int, tau: float, learn_tau: bool) -> nn.Module:
    """Make the decay of one layer of neurons.

    Args:
        channels: Number of channels of the layer.
        tau: Decay per window; the initial one if it is learnt.
        learn_tau: Whether each channel learns its own.

    Raises:
        ConfigurationError: If tau is outside [0, 1], or on a bound where it is learnt.
    """
    if learn_tau and not 0.0 < tau < 1.0:
        raise ConfigurationError(f"a learnt tau must start in (0, 1), not at {tau}")
    if not 0.0 <= tau <= 1.0:
        raise ConfigurationError(f"tau must be in [0, 1], not {tau}")
    return LearntDecay(channels, tau) if learn_tau else FixedDecay(tau)


def _alone(currents: list[Tensor], unused: Tensor) -> list[Tensor]:
    """Return the current of a map that is one window, with what else would be in it at weight 0.

    A parameter without a gradient, as on a map too small to cut, would stop data-parallel training.
    """
    return [currents[0] + 0.0 * unused.to(currents[0].dtype)]


class Membrane(nn.Module):
    """Membranes of layer 1, which merge the current stimulus with what the layer saw before.

    Args:
        decay: A module that returns tau.
    """

    learnt: Final[bool]

    def __init__(self, decay: nn.Module) -> None:
        super().__init__()
        self.decay = decay
        self.learnt = isinstance(decay, LearntDecay)

    def forward(self, currents: list[Tensor]) -> list[Tensor]:
        """Scan the windows.

        Args:
            currents: Synaptic currents of the windows in order, each ``(B, C, h, w)``.

        Returns:
            Membranes of the windows, shapes of ``currents``.
        """
        if len(currents) == 1:
            return _alone(currents, self.decay()) if self.learnt and self.training else currents
        # Under autocast the currents are narrower than the parameter, which must not widen the scan.
        return scan(currents, self.decay().to(currents[0].dtype))


class CoupledMembrane(nn.Module):
    """Membranes of layer 2, which start from the projection of both layers' membranes in the window before.

    Args:
        decay: A module that returns tau.
        projection: The projection Omega.
    """

    learnt: Final[bool]

    def __init__(self, decay: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.decay = decay
        self.learnt = isinstance(decay, LearntDecay) or isinstance(projection, LearntProjection)
        self.projection = projection

    def forward(self, currents: list[Tensor], first: list[Tensor]) -> list[Tensor]:
        """Scan the windows.

        Args:
            currents: Synaptic currents of the windows in order, each ``(B, C, h, w)``.
            first: Membranes of layer 1 in the same windows, shapes of ``currents``.

        Returns:
            Membranes of the windows, shapes of ``currents``.
        """
        if len(currents) == 1:
            if self.learnt and self.training:
                return _alone(currents, self.decay() * self.projection(currents[0], currents[0]))
            return currents
        tau = self.decay().to(currents[0].dtype)
        if torch.jit.is_scripting():
            # TorchScript takes no function as an argument: the loop of ``coupled_scan``, written out.
            membranes = [currents[0]]
            for k in range(1, len(currents)):
                membranes.append(currents[k] + tau * self.projection(first[k - 1], membranes[-1]))
            return membranes
        return coupled_scan(currents, first, tau, self.projection)
