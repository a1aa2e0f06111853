"""Training towards an energy or a spike rate: a regulariser on what the law of spike rates expects of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.energy import OperationCounter
from lightning_msnn.energy.expected import EnergyLaw
from lightning_msnn.energy.rates import evaluating
from lightning_msnn.errors import ConfigurationError, check_number

__all__ = ["EVERY", "WARMUP", "Dial", "check_targets"]

WARMUP = 0.3
"""Share of the training in which the regulariser grows from nothing to its full weight."""

EVERY = 4
"""Steps from one pull of the regulariser to the next, which is as many times as strong."""

_WIDTH = 0.02  # excess, as a logarithm, from which on the pull grows no more
_PULL = 1.0  # nats of the loss for each factor of e above the target
_LARGEST = 2.0  # by which what is measured may differ from the law


def check_targets(target_rate: float | None, target_energy: float | None) -> None:
    """Raise a ConfigurationError if targets are not allowed."""
    if target_rate is not None and target_energy is not None:
        raise ConfigurationError(
            f"target_rate {target_rate} must not be given beside target_energy {target_energy}: one follows the other"
        )
    if target_rate is not None and check_number("target_rate", target_rate) == 0.0:
        raise ConfigurationError("target_rate must be above 0, not 0: a silent network tells classes from nothing")
    if target_energy is not None and not (
        isinstance(target_energy, int | float) and math.isfinite(target_energy) and target_energy > 0.0
    ):
        raise ConfigurationError(f"target_energy must be joules of an image, a number above 0, not {target_energy}")


class Dial:
    """What a network is expected to need, and the loss of what exceeds a target.

    It is no module, so that it is in no state dict. What the law expects is multiplied by the ratio of what is measured
    to it, see :meth:`measure`.

    Args:
        network: A network that the law of spike rates knows.
        input_size: Channels, height and width of its images.
        target_rate: Rate of all neurons, weighted by the operations that their spikes cause.
        target_energy: Joules of an image under the default energy profile.

    Raises:
        ConfigurationError: If the law does not know the network, or the target is more than analogue layers need alone.
    """

    def __init__(
        self,
        network: nn.Module,
        input_size: Sequence[int],
        target_rate: float | None = None,
        target_energy: float | None = None,
    ) -> None:
        self.law = EnergyLaw(network, input_size)
        self.target_rate, self.target_energy = target_rate, target_energy
        self.ratio = 1.0
        least = float(self.law.joules({name: torch.zeros(1, dtype=torch.float64) for name in self.law.rates.layers}))
        if target_energy is not None and target_energy <= least:
            raise ConfigurationError(
                f"target_energy must be more than {least:.3g} joules, which an image needs if no neuron fires, not "
                f"{target_energy}"
            )

    @torch.no_grad()
    def measure(self, network: nn.Module, images: Tensor) -> None:
        """Compare the law with the rates of a batch: what is expected from now on is corrected by the ratio."""
        with evaluating(network), OperationCounter(network, operations=False) as counter:
            network(images)
        record = counter.record()
        rates = {name: (f.double() / record.visits[name]).mean().cpu() for name, f in record.fired.items()}
        measured, expected = (self._value(r) for r in (rates, {n: r.cpu() for n, r in self.law.rates().items()}))
        self.ratio = min(max(float(measured / expected), 1.0 / _LARGEST), _LARGEST)

    def _value(self, rates: dict[str, Tensor]) -> Tensor:
        return self.law.rate(rates) if self.target_energy is None else self.law.joules(rates)

    def __call__(self, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and what is expected, by the name it is logged under.

        Args:
            progress: Share of the training that is over, in [0, 1].
        """
        rates = self.law.rates()
        seen = {"expected/rate": self.law.rate(rates), "expected/energy": self.law.joules(rates)}
        target = self.target_rate if self.target_energy is None else self.target_energy
        assert target is not None
        name = "expected/rate" if self.target_energy is None else "expected/energy"
        excess = F.relu(torch.log(seen[name] * self.ratio / target))
        loss = _PULL / _WIDTH * F.huber_loss(excess, torch.zeros_like(excess), delta=_WIDTH)
        return min(1.0, progress / WARMUP) * loss, {k: v.detach().float() for k, v in seen.items()}
