"""Neurons: their threshold, their decay, and the membranes that travel from window to window.

No neuron keeps a state between calls: membranes are values that a forward pass computes and returns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional.membrane import connected, coupled_scan, recurrent_scan, scan
from lightning_msnn.functional.spike import SOFT, SURROGATES, anneal, heaviside
from lightning_msnn.functional.windows import WINDOWS
from lightning_msnn.nn.projection import LearntProjection, make_projection

__all__ = [
    "ByteSpike",
    "FixedDecay",
    "LearntDecay",
    "Membrane",
    "Neuron",
    "Rectifier",
    "Spike",
    "between",
    "grain_size",
    "make_decay",
    "set_annealing",
]


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


@dataclass(frozen=True)
class Neuron:
    """What neurons are like.

    Args:
        threshold: Threshold ``V``, a finite number; the initial one if it is learnt.
        learn_threshold: False, ``"layer"`` or ``"channel"`` (or True): how finely the threshold is learnt.
        surrogate: Name of the surrogate gradient, one of :data:`lightning_msnn.functional.SURROGATES`.
        tau: Decay of membranes from window to window, in [0, 1]; the initial one if it is learnt.
        learn_tau: False, ``"layer"`` or ``"channel"`` (or True): how finely the decay over windows is learnt.
        projection: Name of the projection Omega, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        theta: Radian factor of the projection in units of pi; the initial one if it is learnt.
        learn_theta: Whether a layer learns its theta.

    The arguments are checked where a layer is made of them.
    """

    threshold: float = 0.5
    learn_threshold: bool | str = False
    surrogate: str = "triangular"
    tau: float = 0.1
    learn_tau: bool | str = True
    projection: str = "sine"
    theta: float = 0.25
    learn_theta: bool = False


class Spike(nn.Module):
    """Fire where the membrane reaches its threshold: ``s = H(u - V)``, exactly 0 or 1.

    Args:
        neuron: What the neurons are like.
        channels: Number of channels, needed only for a threshold learnt by channel.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    annealing: Tensor | None
    """Share of the step in what the neurons return in training, a scalar; None is all of it."""

    def __init__(self, neuron: Neuron = Neuron(), channels: int = 1) -> None:
        super().__init__()
        threshold = float(neuron.threshold)
        if not math.isfinite(threshold):
            raise ConfigurationError(f"threshold must be a finite number, not {threshold}")
        values = grain_size("learn_threshold", neuron.learn_threshold, channels)
        self.threshold = threshold
        # One axis, so that rules which exempt vectors from weight decay exempt it.
        self.level = nn.Parameter(torch.full((values,), threshold)) if values else None
        self.name = neuron.surrogate
        self.surrogate = choose(SURROGATES, neuron.surrogate, "surrogate gradient")
        self.soft = "rectifier"
        # No buffer: what averages, broadcasts or stores those of a network has no use for it.
        self.annealing = None

    def share(self, membrane: Tensor) -> Tensor | None:
        """Share of the step in what the neurons return now, on a membrane's device: in evaluation None."""
        return self.annealing.to(membrane.device) if self.training and self.annealing is not None else None

    def level_of(self, membrane: Tensor) -> Tensor | float:
        """Return the threshold in the type of a membrane: a number, or ``(C, 1, 1)`` where it is learnt."""
        return self.threshold if self.level is None else self.level.to(membrane.dtype).view(-1, 1, 1)

    def fire(self, membrane: Tensor) -> Tensor:
        """Return exact spikes of a membrane."""
        return heaviside(membrane, self.surrogate, self.level_of(membrane))

    def told(self, returned: Tensor) -> Tensor:
        """Return the exact spikes behind what the neurons returned, without a gradient; while annealing, by its size.

        Args:
            returned: What :meth:`forward` returned, of its shape.
        """
        share = self.share(returned)
        spikes = returned.detach()
        if share is None:
            return spikes
        return (spikes > self._between(spikes, share.to(spikes.dtype))).to(spikes.dtype)

    def _between(self, returned: Tensor, share: Tensor) -> Tensor:
        """What lies between what neurons return just below their threshold and at it, while annealing."""
        level = torch.as_tensor(self.level_of(returned), dtype=returned.dtype, device=returned.device).detach()
        return between(level, share, self.soft)

    def forward(self, membrane: Tensor, kernel: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the spikes of a membrane ``(B, C, H, W)``, of any shape if the threshold is fixed.

        Args:
            membrane: Membrane; the synaptic current where a kernel runs the whole layer.
            kernel: Computes the spikes of the layer from that current.
        """
        if kernel is not None:
            return kernel()
        spikes, share = self.fire(membrane), self.share(membrane)
        if share is None:
            return spikes
        return anneal(membrane, spikes, self.level_of(membrane), share.to(membrane.dtype), self.soft)

    def extra_repr(self) -> str:
        """Show threshold and surrogate."""
        return f"threshold={self.threshold if self.level is None else 'learnt'}, surrogate={self.name!r}"


def between(level: Tensor, share: Tensor, soft: str) -> Tensor:
    """What lies between ``a s + (1 - a) f(u)`` just below a threshold and at it.

    Args:
        level: Threshold, any shape.
        share: Share ``a`` of the step.
        soft: Name of the function ``f``, one of :data:`lightning_msnn.functional.SOFT`.
    """
    ends = [SOFT[soft](level, torch.full_like(level, s), level) for s in (0.0, 1.0)]
    return 0.5 * (share + (1.0 - share) * (ends[0] + ends[1]))


class ByteSpike(Spike):
    """Neurons whose spikes are stored as bytes, uint8, which synapses with integer weights read.

    Args:
        spike: The neurons, in evaluation mode.
    """

    def __init__(self, spike: Spike) -> None:
        super().__init__()
        self.__dict__.update(spike.__dict__)

    def fire(self, membrane: Tensor) -> Tensor:
        """Return exact spikes of a membrane as bytes."""
        return super().fire(membrane).to(torch.uint8)


class Rectifier(nn.ReLU):
    """ReLU in the place of the threshold of a layer of neurons."""


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


_COUPLED: dict[str, Callable[..., list[Tensor]]] = {"coupled": coupled_scan, "recurrent": recurrent_scan}


class Membrane(nn.Module):
    """Membranes that travel from window to window.

    Args:
        form: ``"first"``, ``"coupled"`` or ``"recurrent"``: how membranes travel, as layer 1's, as layer 2's, or on a
            map that goes from block to block; see the scans of :mod:`lightning_msnn.functional`.
        neuron: What the neurons are like.
        channels: Number of channels.
        windows: Kind of windows; over a single one nothing is carried, so that there is nothing to learn.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    projection: nn.Module | None

    def __init__(self, form: str, neuron: Neuron, channels: int, windows: str) -> None:
        super().__init__()
        choose(dict.fromkeys(("first", *_COUPLED)), form, "form")
        choose(WINDOWS, windows, "kind of windows")
        self.form = form
        several = windows != "single"
        self.decay = make_decay(channels, neuron.tau, several and neuron.learn_tau)
        self.projection = (
            None
            if form == "first"
            else make_projection(neuron.projection, neuron.theta, several and neuron.learn_theta)
        )

    def forward(self, currents: list[Tensor], other: Sequence[Tensor] = ()) -> list[Tensor]:
        """Visit the windows.

        Args:
            currents: Synaptic currents of the windows in order, each ``(B, C, h, w)``.
            other: Membranes that these are coupled with, shapes of ``currents``: those of layer 1, or the windows of
                the map that the block received. A map that is one window takes nothing from them.

        Returns:
            Membranes of the windows, shapes of ``currents``.
        """
        tau = self.decay()
        if len(currents) > 1:
            # Under autocast the currents are narrower than the parameter, which must not widen the scan.
            return self.carry(currents, other, tau.to(currents[0].dtype), self.projection)
        if not self.training:
            return currents
        unused = list(other[:1]) if self.form == "recurrent" else []
        unused += [tau] if isinstance(self.decay, LearntDecay) else []
        unused += [self.projection.radian()] if isinstance(self.projection, LearntProjection) else []
        return [connected(currents[0], unused)]

    def carry(
        self, currents: list[Any], other: Sequence[Any], tau: Tensor, omega: Callable[..., Any] | None
    ) -> list[Any]:
        """Run the scan of this form on tensors, or on whatever adds and is multiplied as they do.

        Args:
            currents: Synaptic currents of the windows in order, two or more.
            other: Membranes that these are coupled with.
            tau: Decay from window to window.
            omega: The projection, None for layer 1.
        """
        return scan(currents, tau) if omega is None else _COUPLED[self.form](currents, other, tau, omega)
