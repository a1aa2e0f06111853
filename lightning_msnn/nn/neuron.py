"""Neurons: threshold, decay and the membranes that travel over windows.

No neuron keeps a state between calls: membranes are values that a forward pass computes and returns.

Over several time steps, each layer of neurons takes what it carried out of the step before from the front of a list
``state`` that its caller hands in, and puts what it carries into the next step at the end: after a pass through the
network the list holds the new state in the same order. A scalar in the list stands for no membrane yet.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional import membrane as equations
from lightning_msnn.functional.spike import SOFT, SURROGATES, anneal, heaviside
from lightning_msnn.nn.projection import LearntProjection, make_projection

__all__ = [
    "GRAINS",
    "CoupledMembrane",
    "FixedDecay",
    "LearntDecay",
    "Membrane",
    "Neurons",
    "Rectifier",
    "RecurrentMembrane",
    "Spike",
    "annealed",
    "grain_size",
    "make_decay",
    "set_annealing",
]

GRAINS: tuple[str, ...] = ("layer", "channel")
"""How finely a decay or a threshold is learnt: one value for a layer, or one for each of its channels."""


def grain_size(name: str, learn: bool | str, channels: int) -> int:
    """Return how many values are learnt: 0, 1 for a layer, or one for each channel.

    Args:
        name: Name of the argument, for the message.
        learn: False, ``"layer"``, ``"channel"``, or True, which is ``"channel"``.
        channels: Number of channels of the layer.

    Raises:
        ConfigurationError: If ``learn`` is something else.
    """
    if learn is False:
        return 0
    if learn is True or learn == "channel":
        return channels
    if learn == "layer":
        return 1
    raise ConfigurationError(f"{name} must be true, false, 'layer' or 'channel', not {learn!r}")


class Spike(nn.Module):
    """Fire where the membrane reaches its threshold: ``s = H(u - V)``, exactly 0 or 1.

    Args:
        threshold: Threshold ``V``, a finite number; the initial one if it is learnt.
        surrogate: Name of the surrogate gradient, one of :data:`lightning_msnn.functional.SURROGATES`.
        channels: Number of channels, needed only for a threshold learnt by channel.
        learn_threshold: False, ``"layer"`` or ``"channel"`` (or True): how finely the threshold is learnt.
        tau: Decay from one time step to the next, in [0, 1]; plays no part in a single step.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    annealing: Tensor | None
    """Share of the step in what the neurons return in training, a scalar; None is all of it."""

    def __init__(
        self,
        threshold: float = 0.5,
        surrogate: str = "triangular",
        channels: int = 1,
        learn_threshold: bool | str = False,
        tau: float = 0.1,
    ) -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise ConfigurationError(f"threshold must be a finite number, not {threshold}")
        values = grain_size("learn_threshold", learn_threshold, channels)
        self.threshold = float(threshold)
        self.tau = float(tau)
        # One axis, so that rules which exempt vectors from weight decay exempt it.
        self.level = nn.Parameter(torch.full((values,), float(threshold))) if values else None
        self.name = surrogate
        self.surrogate = choose(SURROGATES, surrogate, "surrogate gradient")
        self.soft = "rectifier"
        # No buffer: what averages, broadcasts or stores those of a network has no use for it.
        self.annealing = None

    def share(self, membrane: Tensor) -> Tensor | None:
        """Share of the step in what the neurons return now, on a membrane's device: in evaluation None."""
        return self.annealing.to(membrane.device) if self.training and self.annealing is not None else None

    def forward(self, membrane: Tensor, state: list[Tensor] | None = None, fired: Tensor | None = None) -> Tensor:
        """Return the spikes of a membrane ``(B, C, H, W)``, of any shape if the threshold is fixed.

        Args:
            membrane: Membrane; the synaptic current of neurons whose spikes a kernel has computed from it.
            state: What the layers of neurons carried out of the time step before, if there is one.
            fired: Those spikes, which are returned as they are, so that hooks on this module see them.
        """
        if fired is not None:
            return fired
        if state is not None:
            before = state.pop(0)
            if before.dim() > 0:
                membrane = membrane + before
        if self.level is None:
            spikes = heaviside(membrane, self.surrogate, self.threshold)
        else:
            spikes = heaviside(membrane - self.level.to(membrane.dtype).view(-1, 1, 1), self.surrogate)
        if state is not None:
            state.append(self.tau * membrane * (1.0 - spikes))
        share = self.share(membrane)
        if share is None:
            return spikes
        level = self.threshold if self.level is None else self.level.to(membrane.dtype).view(-1, 1, 1)
        return anneal(membrane, spikes, level, share.to(membrane.dtype), self.soft)

    def extra_repr(self) -> str:
        """Show threshold and surrogate."""
        return f"threshold={self.threshold if self.level is None else 'learnt'}, surrogate={self.name!r}"


class Rectifier(nn.ReLU):
    """ReLU in the place of the threshold of a layer of neurons."""

    def forward(self, membrane: Tensor, state: list[Tensor] | None = None) -> Tensor:
        """Return ``max(0, membrane)``; there is no state."""
        return super().forward(membrane)


def set_annealing(model: nn.Module, share: float | None, soft: str = "rectifier") -> None:
    """Let all neurons of a network return ``a s + (1 - a) f(u)`` in training; evaluation is with exact spikes.

    Args:
        model: The network.
        share: Share ``a`` of the step, in [0, 1]; None is exact spikes, as 1 is.
        soft: Name of the function ``f``, one of :data:`lightning_msnn.functional.SOFT`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """
    choose(SOFT, soft, "kind of annealing")
    if share is not None and not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"the share of spikes in an annealing must be in [0, 1], not {share}")
    annealing = None
    if share is not None and share < 1.0:
        parameter = next(model.parameters(), None)
        annealing = torch.full(
            (), float(share), dtype=torch.float32, device=None if parameter is None else parameter.device
        )
    for module in model.modules():
        if isinstance(module, Spike):
            module.soft, module.annealing = soft, annealing


def annealed(model: nn.Module) -> bool:
    """Whether neurons of a network return something else than exact spikes in training."""
    return any(isinstance(module, Spike) and module.annealing is not None for module in model.modules())


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


def make_decay(channels: int, tau: float, learn_tau: bool | str) -> nn.Module:
    """Make the decay of one layer of neurons.

    Args:
        channels: Number of channels of the layer.
        tau: Decay per window; the initial one if it is learnt.
        learn_tau: False, ``"layer"`` or ``"channel"`` (or True): how finely it is learnt.

    Raises:
        ConfigurationError: If tau is outside [0, 1], or on a bound where it is learnt.
    """
    values = grain_size("learn_tau", learn_tau, channels)
    if values and not 0.0 < tau < 1.0:
        raise ConfigurationError(f"a learnt tau must start in (0, 1), not at {tau}")
    if not 0.0 <= tau <= 1.0:
        raise ConfigurationError(f"tau must be in [0, 1], not {tau}")
    return LearntDecay(values, tau) if values else FixedDecay(tau)


def _resume(currents: list[Tensor], state: list[Tensor] | None) -> list[Tensor]:
    """Add to the currents of the windows what their neurons carried out of the time step before."""
    if state is None:
        return currents
    before = state.pop(0)
    if before.dim() == 0:
        return currents
    resumed: list[Tensor] = []
    for k, current in enumerate(currents):
        resumed.append(current + before[k])
    return resumed


class _Carrier(nn.Module):
    """Neurons whose membranes travel from window to window with a decay.

    Args:
        decay: A module that returns tau.
        projection: The projection Omega, if there is one.
    """

    form: str
    """How the membranes travel, by the name that the kernels know."""
    projection: nn.Module | None

    def __init__(self, decay: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.decay = decay
        if projection is not None:
            self.projection = projection
        self.learnt = isinstance(decay, LearntDecay) or isinstance(projection, LearntProjection)

    def scan(self, currents: list[Tensor], other: list[Tensor], tau: Tensor) -> list[Tensor]:
        """The equation: membranes of several windows from their currents."""
        raise NotImplementedError

    def forward(
        self, currents: list[Tensor], other: list[Tensor] | None = None, state: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Visit the windows.

        Args:
            currents: Synaptic currents of the windows in order, each ``(B, C, h, w)``.
            other: Membranes that these are coupled with, shapes of ``currents``: those of layer 1, or the windows of
                the map that the block received. A map that is one window takes nothing from them.
            state: What the layers of neurons carried out of the time step before, if there is one.

        Returns:
            Membranes of the windows, shapes of ``currents``.
        """
        currents = _resume(currents, state)
        tau = self.decay()
        if len(currents) > 1:
            # Under autocast the currents are narrower than the parameter, which must not widen the scan.
            return self.scan(currents, other or [], tau.to(currents[0].dtype))
        if not (self.learnt and self.training):
            return currents
        # A parameter without a gradient would stop data-parallel training.
        unused = tau
        if self.projection is not None:
            seen = (other or currents)[0]
            unused = tau * self.projection(seen, seen)
        return [currents[0] + 0.0 * unused.to(currents[0].dtype)]

    def leak(self, membranes: list[Tensor], spikes: list[Tensor]) -> Tensor:
        """Return what the windows' membranes hand to the next time step, ``(windows, B, C, h, w)``.

        Args:
            membranes: Membranes of the windows in order, each ``(B, C, h, w)``.
            spikes: Spikes of the same windows.
        """
        return equations.leak(membranes, spikes, self.decay().to(membranes[0].dtype))


class Membrane(_Carrier):
    """Membranes of layer 1, which merge the current stimulus with what the layer saw before.

    Args:
        decay: A module that returns tau.
    """

    form = "first"
    projection = None

    def scan(self, currents: list[Tensor], other: list[Tensor], tau: Tensor) -> list[Tensor]:
        """See :func:`lightning_msnn.functional.scan`."""
        return equations.scan(currents, tau)


class CoupledMembrane(_Carrier):
    """Membranes of layer 2, which start from the projection of both layers' membranes in the window before.

    Args:
        decay: A module that returns tau.
        projection: The projection Omega.
    """

    form = "coupled"
    projection: nn.Module

    def scan(self, currents: list[Tensor], other: list[Tensor], tau: Tensor) -> list[Tensor]:
        """See :func:`lightning_msnn.functional.coupled_scan`."""
        return equations.coupled_scan(currents, other, tau, self.projection)


class RecurrentMembrane(_Carrier):
    """Membranes of a map that travels from block to block and, within a block, from window to window.

    Args:
        decay: A module that returns tau.
        projection: The projection Omega.
    """

    form = "recurrent"
    projection: nn.Module

    def scan(self, currents: list[Tensor], other: list[Tensor], tau: Tensor) -> list[Tensor]:
        """See :func:`lightning_msnn.functional.recurrent_scan`."""
        return equations.recurrent_scan(currents, other, tau, self.projection)


@dataclass(frozen=True)
class Neurons:
    """What the neurons of a token mixer are like.

    Args:
        projection: Name of the projection Omega.
        theta: Radian factor of the projection in units of pi; the initial one if it is learnt.
        learn_theta: Whether the mixer learns its theta.
        tau: Decay of the membranes from window to window; the initial one if it is learnt.
        learn_tau: False, ``"layer"`` or ``"channel"`` (or True): how finely the decay is learnt.
        threshold: Threshold ``V`` of the neurons; the initial one if it is learnt.
        learn_threshold: False, ``"layer"`` or ``"channel"`` (or True): how finely the threshold is learnt.
        surrogate: Name of the surrogate gradient.
    """

    projection: str = "sine"
    theta: float = 0.25
    learn_theta: bool = False
    tau: float = 0.1
    learn_tau: bool | str = True
    threshold: float = 0.5
    learn_threshold: bool | str = False
    surrogate: str = "triangular"

    def spike(self, channels: int) -> Spike:
        """Make the threshold of a layer."""
        return Spike(self.threshold, self.surrogate, channels, self.learn_threshold)

    def first(self, channels: int, windows: str) -> Membrane:
        """Make the membranes of a first layer."""
        return Membrane(self._decay(channels, windows))

    def second(self, channels: int, windows: str) -> CoupledMembrane:
        """Make the membranes of a second layer."""
        return CoupledMembrane(self._decay(channels, windows), self._omega(windows))

    def recurrent(self, channels: int, windows: str) -> RecurrentMembrane:
        """Make the membranes of a map that travels from block to block."""
        return RecurrentMembrane(self._decay(channels, windows), self._omega(windows))

    # Over a single window nothing is carried, so there is nothing to learn.

    def _decay(self, channels: int, windows: str) -> nn.Module:
        return make_decay(channels, self.tau, windows != "single" and self.learn_tau)

    def _omega(self, windows: str) -> nn.Module:
        return make_projection(self.projection, self.theta, windows != "single" and self.learn_theta)
