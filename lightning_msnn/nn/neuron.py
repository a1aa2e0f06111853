"""Neurons: their threshold, their decay, and the membranes that travel from window to window.

No neuron keeps a state between calls: membranes are values that a forward pass computes and returns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose
from lightning_msnn.functional.membrane import connected, coupled_scan, recurrent_scan, scan
from lightning_msnn.functional.spike import SURROGATES, anneal, heaviside
from lightning_msnn.nn.projection import LearntProjection, Projection

__all__ = [
    "MOST_LEVELS",
    "FixedDecay",
    "LearntDecay",
    "Membrane",
    "Neuron",
    "Rectifier",
    "Spike",
    "grain_size",
    "set_annealing",
]


MOST_LEVELS = 15
"""Levels that spikes may have."""


def grain_size(name: str, learn: bool | str, channels: int) -> int:
    """Return how many values a layer learns: none (False), one (``"layer"``), one a channel (``"channel"``, True).

    Raises:
        ConfigurationError: If ``learn`` is neither a bool nor ``"layer"`` or ``"channel"``; the message names it.
    """
    if learn is False or learn == "layer":
        return int(learn == "layer")
    if learn is True or learn == "channel":
        return channels
    raise ConfigurationError(f"{name} must be true, false, 'layer' or 'channel', not {learn!r}")


@dataclass(frozen=True)
class Neuron:
    """What neurons are like; the arguments are checked where a layer is made of them.

    Args:
        threshold: Threshold ``V``, a finite number; the initial one if it is learnt.
        learn_threshold: False, ``"layer"`` or ``"channel"`` (or True): how finely the threshold is learnt.
        levels: Levels ``D`` of a spike, 1 to 15: how many of ``V, 2 V, ..., D V`` a membrane has reached.
        surrogate: Name of the surrogate gradient, one of :data:`lightning_msnn.functional.SURROGATES`.
        tau: Decay of membranes from window to window, in [0, 1]; the initial one if it is learnt.
        learn_tau: False, ``"layer"`` or ``"channel"`` (or True): how finely the decay over windows is learnt.
        projection: Name of the projection Omega, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        theta: Radian factor of the projection in units of pi; the initial one if it is learnt.
        learn_theta: Whether a layer learns its theta.
    """

    threshold: float = 0.5
    learn_threshold: bool | str = False
    levels: int = 1
    surrogate: str = "triangular"
    tau: float = 0.1
    learn_tau: bool | str = True
    projection: str = "sine"
    theta: float = 0.25
    learn_theta: bool = False


class Spike(nn.Module):
    """Fire where the membrane reaches its threshold: ``s = H(u - V)``, exactly 0 or 1, or one of several levels.

    Args:
        neuron: Decay, threshold and surrogate of the neurons.
        channels: Number of channels, needed only for a threshold learnt by channel.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    annealing: Tensor | None
    """Share of the step in what the neurons return in training, a scalar; None is all of it."""
    bytes: bool
    """Whether spikes are stored as bytes, uint8, in evaluation, for synapses with integer weights."""

    def __init__(self, neuron: Neuron = Neuron(), channels: int = 1) -> None:
        super().__init__()
        threshold = float(neuron.threshold)
        if not math.isfinite(threshold):
            raise ConfigurationError(f"threshold must be a finite number, not {threshold}")
        if check_integer("levels", neuron.levels, 1) > MOST_LEVELS:
            raise ConfigurationError(f"levels must be {MOST_LEVELS} at most, not {neuron.levels}")
        if neuron.levels > 1 and threshold <= 0.0:
            raise ConfigurationError(f"threshold must be positive where spikes have several levels, not {threshold}")
        values = grain_size("learn_threshold", neuron.learn_threshold, channels)
        self.threshold, self.levels = threshold, neuron.levels
        # One axis, so that rules which exempt vectors from weight decay exempt it.
        self.level = nn.Parameter(torch.full((values,), threshold)) if values else None
        self.name = neuron.surrogate
        self.surrogate = choose(SURROGATES, neuron.surrogate, "surrogate gradient")
        # No buffer, so that it is not averaged, broadcast or saved.
        self.annealing = None
        self.bytes = False

    def share(self, membrane: Tensor) -> Tensor | None:
        """Share of the step in what the neurons return now, on a membrane's device: in evaluation None."""
        return self.annealing.to(membrane.device) if self.training and self.annealing is not None else None

    def level_of(self, membrane: Tensor) -> Tensor | float:
        """Return the threshold in the type of a membrane: a number, or ``(C, 1, 1)`` where it is learnt."""
        return self.threshold if self.level is None else self.level.to(membrane.dtype).view(-1, 1, 1)

    def fire(self, membrane: Tensor) -> Tensor:
        """Return exact spikes of a membrane."""
        spikes = heaviside(membrane, self.surrogate, self.level_of(membrane), self.levels)
        return spikes.to(torch.uint8) if self.bytes else spikes

    def forward(self, membrane: Tensor, kernel: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the spikes of a membrane ``(B, C, H, W)``, of any shape if the threshold is fixed.

        Args:
            membrane: Membrane; the synaptic current where a kernel runs the whole layer.
            kernel: Computes the spikes of the layer from that current.
        """
        if self.bytes:
            refuse_gradient(membrane)
        if kernel is not None:
            return kernel()
        spikes, share = self.fire(membrane), self.share(membrane)
        return spikes if share is None else anneal(membrane, spikes, share.to(membrane.dtype))

    def extra_repr(self) -> str:
        """Show threshold, surrogate and levels."""
        levels = f", levels={self.levels}" if self.levels > 1 else ""
        return f"threshold={self.threshold if self.level is None else 'learnt'}, surrogate={self.name!r}{levels}"


class Rectifier(nn.ReLU):
    """ReLU in the place of the threshold of a layer of neurons."""


def refuse_gradient(x: Any) -> None:
    """Refuse a gradient through what a folded network compares with thresholds: a comparison has none."""
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        raise ConfigurationError("a folded network has no gradient to its input: load the network without fuse")


def set_annealing(model: nn.Module, share: float | None) -> None:
    """Let all neurons of a network return ``a s + (1 - a) max(u, 0)`` in training; evaluation is with exact spikes.

    Args:
        model: The network.
        share: Share ``a`` of the step, in [0, 1]; None is exact spikes, as 1 is.

    Raises:
        ConfigurationError: If the share is not in [0, 1].
    """
    share = None if share is None else check_number("the share of spikes in an annealing", share)
    annealing = None
    if share is not None and share < 1.0:
        parameter = next(model.parameters(), None)
        annealing = torch.tensor(share, dtype=torch.float32, device=None if parameter is None else parameter.device)
    for module in model.modules():
        if isinstance(module, Spike):
            module.annealing = annealing


class FixedDecay(nn.Module):
    """A decay tau per window, in [0, 1], that is the same for all channels and does not learn."""

    tau: Tensor

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(self) -> Tensor:
        """Return tau, a scalar."""
        return self.tau


class LearntDecay(nn.Module):
    """A learnt decay tau; its logit is the parameter, so that it stays in (0, 1).

    Args:
        values: Number of values: that of the channels, or 1 for all of a layer.
        tau: Initial decay per window, in (0, 1).
    """

    def __init__(self, values: int, tau: float) -> None:
        super().__init__()
        # One axis, so that rules which exempt vectors from weight decay exempt it.
        self.logit = nn.Parameter(torch.full((values,), math.log(tau / (1.0 - tau))))

    def forward(self) -> Tensor:
        """Return tau, shape ``(values, 1, 1)``."""
        return torch.sigmoid(self.logit).view(-1, 1, 1)


class Membrane(nn.Module):
    """Membranes that travel from window to window.

    Args:
        form: ``"first"``, ``"coupled"`` or ``"recurrent"``: how membranes travel, as layer 1's, as layer 2's, or on a
            map that goes from block to block; see the scans of :mod:`lightning_msnn.functional`.
        neuron: Decay, threshold and surrogate of the neurons.
        channels: Number of channels.
        windows: Kind of windows; over a single one nothing is carried, so that there is nothing to learn.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    projection: Projection | LearntProjection | None

    def __init__(self, form: str, neuron: Neuron, channels: int, windows: str) -> None:
        super().__init__()
        choose(dict.fromkeys(("first", "coupled", "recurrent")), form, "form")
        self.form = form
        learns = windows != "single"
        values, tau = grain_size("learn_tau", learns and neuron.learn_tau, channels), check_number("tau", neuron.tau)
        if values and tau in (0.0, 1.0):
            raise ConfigurationError(f"a learnt tau must start in (0, 1), not at {tau}")
        self.decay: FixedDecay | LearntDecay = LearntDecay(values, tau) if values else FixedDecay(tau)
        self.projection = None
        if form != "first":
            kind = LearntProjection if learns and neuron.learn_theta else Projection
            self.projection = kind(neuron.projection, neuron.theta)

    def forward(self, currents: list[Tensor], other: Sequence[Tensor] = ()) -> list[Tensor]:
        """Visit the windows.

        Args:
            currents: Synaptic currents of the windows in order, each ``(B, C, h, w)``.
            other: Membranes that these are coupled with, shapes of ``currents``: those of layer 1, or the windows of
                the map that the block received. A map that is one window takes nothing from them.

        Returns:
            Membranes of the windows, shapes of ``currents``.
        """
        # Under autocast the currents are narrower than the parameter, which must not widen the scan.
        tau = self.decay().to(currents[0].dtype)
        if len(currents) == 1:
            theta = [] if self.projection is None else [self.projection.radian()]
            unused = [x for x in (tau, *theta, *other[:1]) if x.requires_grad]  # as if they played a part
            return [connected(currents[0], unused)] if self.training else currents
        if self.projection is None:
            return scan(currents, tau)
        travel = coupled_scan if self.form == "coupled" else recurrent_scan
        return travel(currents, list(other), tau, self.projection)
