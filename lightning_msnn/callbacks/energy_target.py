"""Training towards a spike rate or an energy: the excess over the target is part of the loss, with a weight it finds.

A training step measures the spike rate of its own batch, the mean over the layers weighted by their accumulates, with
the surrogate gradient. The weight of the excess is a Lagrange multiplier, which rises while there is any and falls
while there is none (dual ascent on ``log(measured / aim)``), and a share in proportion to the excess, which damps it
(method of multipliers; Bertsekas, *Constrained Optimization and Lagrange Multiplier Methods*, 1982). The aim moves from
the network's rate at the start to the target over the first part of the training. Validation counts operations with
exact spikes and the weights that checkpoints keep; the ratio of the two corrects the steps.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_msnn.callbacks.monitors import evaluating
from lightning_msnn.conversion import SpikingLayer
from lightning_msnn.energy import OperationCounter, energy, synaptic_operations
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.metrics import Total
from lightning_msnn.runs.trainer import planned, refuse_shards, stand_last
from lightning_msnn.tasks import Task, TrainingStepCallback

__all__ = ["EnergyTarget"]

WARMUP = 0.4
"""Share of the training in which the aim moves from the network's rate at the start to the target."""

TOLERANCE = 0.03
"""Excess, as a share of the target, at which a network still counts as at its target."""

_BATCHES, _IMAGES = 16, 32  # that a validation counts at most: batches, evenly spread, and images of each
_RISE = (20.0, 60.0)  # of the multiplier over a whole training for each nat of excess, while the aim moves and then
_DAMPING = 20.0  # weight for each nat of excess at once
_LARGEST = 100.0  # multiplier
_APART = 2.0  # factor by which validation and steps may differ
_MEMORY = 0.98  # of the mean over steps that validation is compared with


class EnergyTarget(TrainingStepCallback):
    """Train a task's network towards a spike rate or an energy; one that needs less from the start is left alone.

    Logs ``train/rate``, ``train/multiplier``, ``val/rate`` and ``val/energy``.
    :class:`~lightning_msnn.callbacks.BestCheckpoint` keeps only networks that are at the target.

    Args:
        rate: Accumulates of an image, as a share of those if every neuron fired, in (0, 1].
        energy: Joules of an image under the default energy profile, in the place of a rate.

    Raises:
        ConfigurationError: If not exactly one target is given, or it is not allowed; in the first step, if the network
            has no layers that receive spikes, its analogue layers alone need more than the target, or the training has
            no end.
    """

    logged_in_training = ("val/rate", "val/energy")
    """Metrics of validations that the check before the first step does not have."""

    def __init__(self, rate: float | None = None, energy: float | None = None) -> None:
        if (rate is None) == (energy is None):
            raise ConfigurationError(f"EnergyTarget takes a rate or an energy, not rate {rate} and energy {energy}")
        if rate is not None and not 0.0 < rate <= 1.0:
            raise ConfigurationError(f"rate of EnergyTarget must be above 0 and at most 1, not {rate}")
        if energy is not None and not 0.0 < energy < math.inf:
            raise ConfigurationError(f"energy of EnergyTarget must be joules of an image, above 0, not {energy}")
        self.rate, self.energy = rate, energy
        self.counted: dict[str, float] = {}
        """Rate and energy that the last validation counted."""
        start = {"multiplier": 0.0, "ratio": 1.0, "start": 0.0, "mean": 0.0, "aim": rate or 0.0}
        self._state = {name: torch.tensor(value) for name, value in start.items()}  # `aim` is the target as a rate
        self._steps = 0
        self._shares: dict[str, float] = {}  # of the accumulates if every neuron fired, by layer
        self._seen: dict[str, tuple[Tensor, int]] = {}  # spikes and places of this step, by layer
        self._handles: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stand behind a teacher, which would take its share of the excess too."""
        super().setup(trainer, pl_module, stage)
        refuse_shards(trainer.strategy, "EnergyTarget")
        stand_last(trainer, self)

    @property
    def met(self) -> bool:
        """Whether the last validation found the network at its target."""
        name, target = ("rate", self.rate) if self.energy is None else ("energy", self.energy)
        assert target is not None
        return self.counted.get(name, math.inf) <= target * (1.0 + TOLERANCE)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training resumes from, as plain values."""
        numbers = {name: float(value) for name, value in self._state.items()}
        return {**numbers, "steps": self._steps, "counted": dict(self.counted), "shares": dict(self._shares)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what :meth:`state_dict` returned."""
        self._state = {name: torch.tensor(state_dict[name]) for name in self._state}
        self._steps, self.counted = int(state_dict["steps"]), dict(state_dict["counted"])
        self._shares = dict(state_dict["shares"])

    # Counting in evaluation

    @torch.no_grad()
    def _count(self, task: Task, images: Tensor) -> None:
        """Count images with exact spikes."""
        with evaluating(task, task.network), OperationCounter(task.network) as counter:
            task(images[:_IMAGES])
        self._total.update(counter.record())

    def _measured(self) -> dict[str, float]:
        """Return rate and energy of what was counted in all processes, and set the aim for an energy."""
        record = self._total.compute()
        self._total.reset()
        operations, joules = synaptic_operations(record), float(energy(record))
        rate = float(operations["accumulates"] / (operations["dense"] - operations["multiply_accumulates"]))
        if self.energy is not None:
            of_spikes = float(energy(record, by="kind")["accumulates"])
            if self.energy <= joules - of_spikes:
                raise ConfigurationError(
                    f"energy of EnergyTarget must be above {joules - of_spikes:.3g} joules, which an image costs "
                    f"without any spike, not {self.energy}"
                )
            if of_spikes:
                self._state["aim"].fill_(rate * (self.energy - joules + of_spikes) / of_spikes)
        return {"rate": rate, "energy": joules}

    def _find_layers(self, network: nn.Module) -> None:
        """Find the layers that received spikes when they were counted."""
        record = self._total.total()
        for name, module in network.named_modules():
            counts = record.layer(name)
            full = counts["dense"] - counts["multiply_accumulates"]
            if full and (isinstance(module, SpikingLayer) or not any(module.children())):
                self._shares[name] = float(full)
        if not self._shares:
            raise ConfigurationError(
                f"EnergyTarget must be left out: no layer of {type(network).__name__} receives spikes"
            )

    def _watch(self, network: nn.Module) -> None:
        """Watch what these layers receive in training steps."""
        for name in self._shares:
            module, keep = network.get_submodule(name), partial(self._keep, name)
            if isinstance(module, SpikingLayer):
                self._handles.append(module.neuron.register_forward_hook(lambda m, a, out, keep=keep: keep(m, (out,))))
            else:
                self._handles.append(module.register_forward_pre_hook(keep))

    def _keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # a training step
            spikes, places = self._seen.get(name, (torch.zeros((), device=args[0].device), 0))
            self._seen[name] = spikes + args[0].sum(dtype=torch.float32), places + args[0].numel()

    # A training step

    def change_batch(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a step; before the first one find the layers that receive spikes."""
        if not self._handles:
            self._planned = planned(task.trainer, "EnergyTarget")
            self._state = {name: value.to(task.device) for name, value in self._state.items()}
            self._total = Total(task.network).to(task.device)
            if not self._shares:
                self._count(task, inputs)
                self._find_layers(task.network)
                self._measured()
            self._watch(task.network)
        self._seen.clear()
        return inputs, targets

    def measure(self) -> Tensor:
        """Return the spike rate of this step, a scalar with a gradient."""
        whole = sum(self._shares[name] for name in self._seen)
        rates = [spikes * (self._shares[name] / whole / places) for name, (spikes, places) in self._seen.items()]
        return torch.stack(rates).sum().clamp(min=1e-9)

    def change_loss(self, task: Task, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the loss with the weighted excess of this step."""
        rate = self.measure()
        weight = self._weight(task, rate.detach())
        task.log_dict({"train/rate": rate.detach(), "train/multiplier": self._state["multiplier"]})
        return loss + weight * torch.log(rate / self._state["aim"])

    def _weight(self, task: Task, measured: Tensor) -> Tensor:
        """Return the weight of a step's excess, and move the multiplier."""
        state, progress = self._state, min(1.0, task.trainer.global_step / self._planned)
        seen: Tensor = task.trainer.strategy.reduce(measured.clone(), reduce_op="mean")
        if self._steps == 0:
            state["start"], state["mean"] = seen, seen
        # The mean forgets as weight averaging does, slowly only once there is something to remember.
        memory = min(_MEMORY, (1.0 + self._steps) / (10.0 + self._steps))
        state["mean"] = torch.lerp(seen, state["mean"], memory)
        self._steps += 1
        way = torch.log(state["start"] / state["aim"]).clamp(min=0.0) * max(0.0, 1.0 - progress / WARMUP)
        excess = torch.log(seen * state["ratio"] / state["aim"]) - way
        # Below its target it is pulled back up, unless it has always been there.
        weight = state["multiplier"] + _DAMPING * excess
        weight = torch.where(state["start"] > state["aim"], weight, weight.clamp(min=0.0))
        rise = _RISE[progress >= WARMUP] / (self._planned * task.trainer.accumulate_grad_batches) * excess
        state["multiplier"] = (state["multiplier"] + rise).clamp(0.0, _LARGEST)
        return weight

    # Validation

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count some images of the first loader."""
        if not self._handles or dataloader_idx:
            return
        number = trainer.num_val_batches[0]
        every = math.ceil(number / _BATCHES) if math.isfinite(number) else 1
        if batch_idx % every == 0 and batch_idx < every * _BATCHES:
            self._count(pl_module, pl_module.unpack(batch)[0])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was counted, and correct the steps by it."""
        if not self._handles:
            return
        self.counted = self._measured()
        pl_module.log_dict({f"val/{name}": value for name, value in self.counted.items()}, sync_dist=True)
        state, progress = self._state, trainer.global_step / self._planned
        # In the beginning statistics are rough, and the aim is far from the target; in the end half of the way, as the
        # count is of some images, and of weights that are a mean over steps.
        if progress >= WARMUP / 2:
            ratio = (self.counted["rate"] / state["mean"]).clamp(1.0 / _APART, _APART)
            state["ratio"] = ratio if progress < WARMUP else torch.sqrt(state["ratio"] * ratio)

    def on_fit_end(self, *_: Any) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    on_exception = on_fit_end  # type: ignore[assignment]
