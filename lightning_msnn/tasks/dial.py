"""Training towards a spike rate or an energy: what exceeds the target is part of the loss, with a weight that is found.

What a training step measures is the spikes of its own batch, weighted by what they cost, with the surrogate gradient.
The weight of its excess is a Lagrange multiplier that rises while there is any and falls while there is none (dual
ascent on ``log(measured / aim)``), and a share in proportion to the excess, which damps it (the method of multipliers;
Bertsekas, *Constrained Optimization and Lagrange Multiplier Methods*, 1982). The aim moves from where the training
begins to the target over the first part of the training. Validation counts what images cost with exact spikes and the
weights that checkpoints keep; what a step measures is corrected by the ratio of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.energy import OperationCounter, Record, energy, synaptic_operations
from lightning_msnn.energy.expected import CostOfRates
from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.nn import Spike

__all__ = ["COUNTED", "ENDLESS", "TOLERANCE", "WARMUP", "Dial", "check_targets"]

WARMUP = 0.4
"""Share of the training in which the aim moves from what the network needs at its start to the target."""

TOLERANCE = 0.03
"""Excess, as a share of the target, up to which a network is taken to be at it."""

ENDLESS = 10_000.0
"""Steps after which a training that has no end is taken to be over."""

COUNTED = (16, 32)
"""Batches of a validation that are counted, at most, evenly spread, and images of each."""

_RISE = (20.0, 60.0)  # of the multiplier over a whole training for each nat of excess, while the aim moves and then
_DAMPING = 20.0  # weight for each nat of excess at once
_LARGEST = 100.0  # multiplier
_APART = 2.0  # factor by which validation and steps may differ
_MEMORY = 0.98  # of the mean over steps that validation is compared with


def check_targets(target_rate: float | None, target_energy: float | None) -> None:
    """Raise a ConfigurationError if targets are not allowed."""
    if target_rate is not None and target_energy is not None:
        raise ConfigurationError(
            f"target_rate must not be given beside target_energy, {target_rate} beside {target_energy}: one follows "
            "from the other"
        )
    if target_rate is not None and check_number("target_rate", target_rate) == 0.0:
        raise ConfigurationError("target_rate must be above 0, not 0: a silent network tells no classes apart")
    if target_energy is not None and not (
        isinstance(target_energy, int | float)
        and not isinstance(target_energy, bool)
        and math.isfinite(target_energy)
        and target_energy > 0.0
    ):
        raise ConfigurationError(f"target_energy must be joules of a sample, above 0, not {target_energy!r}")


class _Rate(torch.autograd.Function):
    """Mean of spikes, float32; its gradient is that of the mean of what neurons returned.

    Sums of each sample are added up in float32, since a sum in bfloat16 has three digits. torch's own mean of another
    type writes a copy of its input, and a gradient as large.
    """

    @staticmethod
    def forward(ctx: Any, returned: Tensor, spikes: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = returned.shape, returned.dtype
        return spikes.sum(tuple(range(1, spikes.dim()))).float().sum() / spikes.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] / ctx.shape.numel()).to(ctx.dtype).expand(ctx.shape), None


class Dial:
    """The regulariser of a training towards a rate or an energy, and its state.

    It is no module, so that it is in no state dict and not copied with the network.

    Args:
        network: The network.
        target_rate: Accumulates of a sample as a share of those that there were if all neurons fired.
        target_energy: Joules of a sample under the default energy profile.

    Raises:
        ConfigurationError: If a target is not allowed, or the network has no neurons.
    """

    def __init__(
        self, network: nn.Module, target_rate: float | None = None, target_energy: float | None = None
    ) -> None:
        check_targets(target_rate, target_energy)
        self.name = "rate" if target_energy is None else "energy"
        self.target = float(target_rate if target_energy is None else target_energy)  # type: ignore[arg-type]
        marks = ("threshold", "v_threshold")
        if not any(
            isinstance(m, Spike) or (any(hasattr(m, mark) for mark in marks) and not isinstance(m, nn.Threshold))
            for m in network.modules()
        ):
            raise ConfigurationError(
                f"target_{self.name} must be left out, not {self.target}: {type(network).__name__} has no neurons, and "
                "so no spikes to have fewer of"
            )
        self.cost: CostOfRates | None = None
        self.counted: float | None = None
        """What the last validation counted."""
        # Numbers until the first step, then scalars on its device.
        self._state: dict[str, Any] = {"multiplier": 0.0, "ratio": 1.0, "start": 0.0, "mean": 0.0, "steps": 0}
        self._sums = torch.zeros(3, dtype=torch.float64)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dial:
        """A copy of a task has the same dial."""
        return self

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what a training goes on from, as plain values."""
        return {name: float(value) for name, value in self._state.items()} | {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ConfigurationError: If it is something else.
        """
        given = state if isinstance(state, dict) else {}
        numbers, counted = [given.get(name) for name in self._state], given.get("counted")
        if not all(isinstance(n, float) and 0.0 <= n < math.inf for n in [*numbers, counted or 0.0]):
            raise ConfigurationError(f"the dial of a checkpoint must be numbers by name, not {state!r:.200}")
        self._state = dict(zip(self._state, numbers, strict=True))
        self.counted = counted

    @property
    def met(self) -> bool:
        """Whether the last validation counted no more than the target."""
        return self.counted is not None and self.counted <= self.target * (1.0 + TOLERANCE)

    def prepare(self, network: nn.Module, inputs: Tensor, sides: Sequence[int] | None = None) -> None:
        """Find out what spikes cost, once.

        Args:
            network: The network.
            inputs: A batch that it is called with.
            sides: Height and width of samples in evaluation; by default those of the batch.

        Raises:
            ConfigurationError: If the target is less than a sample costs without any spike.
        """
        if any(not isinstance(value, Tensor) or value.device != inputs.device for value in self._state.values()):
            self._state = {
                name: torch.tensor(float(value), dtype=torch.float32, device=inputs.device)
                for name, value in self._state.items()
            }
        if self.cost is not None:
            return
        shape = inputs.shape[1:] if sides is None else (*inputs.shape[1:-2], *sides)
        sample = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        self.cost = CostOfRates(network, sample.to(inputs.device, next(network.parameters()).dtype))
        if self.name == "energy" and self.target <= self.cost.least:
            raise ConfigurationError(
                f"target_energy must be above {self.cost.least:.3g} joules, which a sample of this network costs if no "
                f"neuron fires, not {self.target}"
            )

    # A training step

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Measure how often neurons fire while the network runs."""
        assert self.cost is not None
        self._fired: dict[str, list[tuple[Tensor, int]]] = {}
        handles = [
            network.get_submodule(name).register_forward_hook(partial(self._note, name)) for name in self.cost.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        spikes: Tensor = output[0] if isinstance(output, tuple) else output
        annealed = isinstance(module, Spike) and module.share(spikes) is not None
        exact: Tensor = module.told(spikes) if annealed else spikes.detach()  # type: ignore[operator]
        rate: Tensor = _Rate.apply(spikes, exact)  # type: ignore[no-untyped-call]
        self._fired.setdefault(name, []).append((rate, spikes.numel()))

    def measured(self) -> dict[str, Tensor]:
        """Return ``rate`` and ``energy`` of the batch that was watched, with a gradient, scalars in float32."""
        assert self.cost is not None
        rates = {}
        silent = torch.zeros_like(torch.as_tensor(self._state["ratio"]))
        for name in self.cost.layers:  # one that did not run cost nothing
            parts = self._fired.get(name, [(silent, 1)])
            total = sum(n for _, n in parts)
            rates[name] = torch.stack([rate * (n / total) for rate, n in parts]).sum()
        self._fired = {}
        return {"rate": self.cost.rate(rates), "energy": self.cost.joules(rates)}

    def loss(
        self, measured: dict[str, Tensor], progress: float, share: float, agree: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the regulariser of a step, a scalar, and move the multiplier.

        Args:
            measured: What :meth:`measured` returned.
            progress: Share of the training that is over, in [0, 1].
            share: Share of the training that this step is.
            agree: Returns the mean of a scalar over the processes of a training.
        """
        value, state = measured[self.name], self._state
        with torch.no_grad():
            seen = agree(value.detach().clone())
            first = state["steps"] == 0
            state["start"] = torch.where(first, seen, state["start"])
            # The mean forgets as weight averaging does, slowly only once there is something to remember.
            memory = torch.clamp((1.0 + state["steps"]) / (10.0 + state["steps"]), max=_MEMORY)
            state["mean"] = torch.where(first, seen, torch.lerp(seen, state["mean"], memory))
            state["steps"] = state["steps"] + 1
            way = (torch.log(state["start"] / self.target)).clamp(min=0.0) * max(0.0, 1.0 - progress / WARMUP)
            excess = torch.log(seen * state["ratio"] / self.target) - way
            # Below its target it is pulled back up, unless it has always been there.
            weight = state["multiplier"] + _DAMPING * excess
            weight = torch.where(state["start"] > self.target, weight, weight.clamp(min=0.0))
            rise = _RISE[progress >= WARMUP] * share * excess
            state["multiplier"] = (state["multiplier"] + rise).clamp(0.0, _LARGEST)
        return weight * torch.log(value / self.target)

    @property
    def multiplier(self) -> Tensor:
        """The multiplier, a scalar."""
        return torch.as_tensor(self._state["multiplier"])

    # Validation

    def count(self, network: nn.Module, forward: Callable[[], Any]) -> None:
        """Add what some images cost in evaluation.

        Args:
            network: The network.
            forward: Runs it on them.
        """
        with torch.random.fork_rng(), OperationCounter(network) as counter:
            forward()
        record: Record = counter.record()
        n = record.samples
        self._sums += torch.tensor(
            [float(synaptic_operations(record)["accumulates"]) * n, float(energy(record)) * n, n], dtype=torch.float64
        )

    def settle(self, progress: float, agree: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return what a validation has counted, ``rate`` and ``energy`` of a sample, and go by it from now on.

        Args:
            progress: Share of the training that is over, in [0, 1].
            agree: Returns the mean of a tensor over the processes of a training.
        """
        assert self.cost is not None
        device = self._state["ratio"].device
        sums = agree(self._sums.to(device, torch.float32)).double().tolist()
        self._sums = torch.zeros(3, dtype=torch.float64)
        if not sums[2]:
            return {}
        found = {"rate": sums[0] / sums[2] / self.cost.most, "energy": sums[1] / sums[2]}
        ratio = (found[self.name] / self._state["mean"]).clamp(1.0 / _APART, _APART)
        # In the beginning statistics are rough, and the aim is far from the target; in the end half of the way, as what
        # is counted is of some images, and of weights that are a mean over steps.
        if progress >= WARMUP / 2:
            self._state["ratio"] = ratio if progress < WARMUP else torch.sqrt(self._state["ratio"] * ratio)
        self.counted = found[self.name]
        return found
