"""Training towards a spike rate or an energy: the excess over the target is part of the loss, with a weight it finds.

A training step measures the spikes of its own batch, each weighted by its fan-out, with the surrogate gradient. The
weight of the excess is a Lagrange multiplier, which rises while there is any and falls while there is none (dual ascent
on ``log(measured / aim)``), and a share in proportion to the excess, which damps it (method of multipliers; Bertsekas,
*Constrained Optimization and Lagrange Multiplier Methods*, 1982). The aim moves from the network's rate at the start to
the target over the first part of the training. Validation counts operations with exact spikes and the weights that
checkpoints keep; the ratio of the two corrects the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_msnn.conversion import SpikingLayer
from lightning_msnn.energy import OperationCounter, energy, synaptic_operations
from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.runs.progress import steps_done
from lightning_msnn.tasks import Task, TrainingStepCallback

__all__ = ["EnergyTarget"]

WARMUP = 0.4
"""Share of the training in which the aim moves from the network's rate at the start to the target."""

TOLERANCE = 0.03
"""Excess, as a share of the target, at which a network still counts as at its target."""

_COUNTED = (16, 32)  # batches of a validation at most, evenly spread, and images of each
_RISE = (20.0, 60.0)  # of the multiplier over a whole training for each nat of excess, while the aim moves and then
_DAMPING = 20.0  # weight for each nat of excess at once
_LARGEST = 100.0  # multiplier
_APART = 2.0  # factor by which validation and steps may differ
_MEMORY = 0.98  # of the mean over steps that validation is compared with
_ENDLESS = 10_000.0  # steps after which a training without an end counts as over


class EnergyTarget(TrainingStepCallback):
    """Train a task's network towards a spike rate or an energy; one that needs less from the start is left alone.

    Logs ``train/rate``, ``train/multiplier``, ``val/rate`` and ``val/energy``.
    :class:`~lightning_msnn.callbacks.BestCheckpoint` keeps only networks that are at the target.

    Args:
        rate: Accumulates of an image, as a share of those if every neuron fired, in (0, 1].
        energy: Joules of an image under the default energy profile, in the place of a rate.

    Raises:
        ConfigurationError: If not exactly one target is given, or it is not allowed; in the first step, if the network
            has no layers that receive spikes, or its analogue layers alone need more than the target.
    """

    logged_in_training = ("val/rate", "val/energy")
    """Metrics of validations that the check before the first step does not have."""

    def __init__(self, rate: float | None = None, energy: float | None = None) -> None:
        if (rate is None) == (energy is None):
            raise ConfigurationError(f"EnergyTarget takes a rate or an energy, not rate {rate} and energy {energy}")
        if rate is not None and check_number("rate of EnergyTarget", rate) == 0.0:
            raise ConfigurationError("rate of EnergyTarget must be above 0, not 0: silence tells nothing")
        if energy is not None and not 0.0 < energy < math.inf:
            raise ConfigurationError(f"energy of EnergyTarget must be joules of an image, above 0, not {energy}")
        self.rate, self.energy = rate, energy
        self.counted: dict[str, float] = {}
        """Rate and energy that the last validation counted."""
        # Numbers until the first step, then scalars on its device; `aim` is the target as a rate.
        self._state: dict[str, Any] = {
            "multiplier": 0.0, "ratio": 1.0, "start": 0.0, "mean": 0.0, "steps": 0.0, "aim": rate or 0.0,
        }  # fmt: skip
        self._synapses: list[float] = []  # fan-outs of the layers that are watched
        self._spiking: set[int] = set()  # the numbers of those that receive spikes
        self._received: dict[int, list[Tensor]] = {}
        self._watching = False
        self._handles: list[Any] = []
        self._sums = torch.zeros(5, dtype=torch.float64)

    @property
    def met(self) -> bool:
        """Whether the last validation found the network at its target."""
        name, target = ("rate", self.rate) if self.energy is None else ("energy", self.energy)
        assert target is not None
        return self.counted.get(name, math.inf) <= target * (1.0 + TOLERANCE)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training goes on from, as plain values."""
        return {name: float(value) for name, value in self._state.items()} | {"counted": dict(self.counted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._state = {name: float(state_dict[name]) for name in self._state}
        self.counted = dict(state_dict["counted"])

    # Watching what layers receive

    def _watch(self, network: nn.Module) -> None:
        """Watch what layers with weights receive, and forget what was watched before."""
        self._release()
        for module in network.modules():
            given = [getattr(module, name, None) for name in ("in_channels", "in_features", "input_size")]
            channels = [c for c in given if isinstance(c, int)]
            own = dict(module.named_parameters(recurse=False))  # those of a recurrence meet its state
            weights = sum(p.numel() for name, p in own.items() if p.dim() > 1 and not name.startswith("weight_hh"))
            if not weights or not channels:
                continue
            stride = getattr(module, "stride", 1)
            keep = partial(self._keep, len(self._synapses))
            self._synapses.append(weights / channels[0] / math.prod(stride if isinstance(stride, tuple) else (stride,)))
            if isinstance(module, SpikingLayer):
                self._handles.append(module.neuron.register_forward_hook(lambda m, a, out, keep=keep: keep(m, (out,))))
            else:
                self._handles.append(module.register_forward_pre_hook(keep))

    def _keep(self, number: int, module: nn.Module, args: Sequence[Tensor]) -> None:
        if self._watching:
            self._received.setdefault(number, []).append(args[0])

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._synapses, self._received, self._watching = [], [], {}, False

    def _operations(self) -> tuple[Tensor, float]:
        """Return accumulates that the spikes cause, and those if every neuron had fired, of the images watched."""
        self._watching = False
        received = [(self._synapses[i], x) for i, tensors in self._received.items() for x in tensors]
        self._received = {}
        full = sum(fan_out * x.numel() for fan_out, x in received)
        return torch.stack([fan_out * x.sum(dtype=torch.float32) for fan_out, x in received]).sum(), full

    @torch.no_grad()
    def _count(self, task: Task, images: Tensor) -> Tensor:
        """Count images in evaluation: accumulates, joules, joules of accumulates, accumulates if all fired, images."""
        training = [module for module in task.network.modules() if module.training]
        task.network.eval()
        self._received, self._watching = {}, True
        devices = [task.device] if task.device.type == "cuda" else []
        try:
            with (
                task.trainer.precision_plugin.forward_context(),
                torch.random.fork_rng(devices=devices),
                OperationCounter(task.network) as counter,
            ):
                task(images)
        finally:
            for module in training:
                module.training = True
        self._received = {i: xs for i, xs in self._received.items() if all(((x == 0) | (x == 1)).all() for x in xs)}
        self._spiking = set(self._received)
        if not self._received:
            raise ConfigurationError(
                f"EnergyTarget must be left out: no layer of {type(task.network).__name__} receives spikes"
            )
        _, full = self._operations()
        record, n = counter.record(), len(images)
        accumulates = float(synaptic_operations(record)["accumulates"])
        joules, of_spikes = float(energy(record)), float(energy(record, by="kind")["accumulates"])
        return torch.tensor([accumulates * n, joules * n, of_spikes * n, full, n], dtype=torch.float64)

    def _found(self, sums: Tensor) -> dict[str, float]:
        """Return rate and energy of what was counted, and set the aim for an energy."""
        accumulates, joules, of_spikes, full, n = sums.tolist()
        found = {"rate": accumulates / full, "energy": joules / n}
        if self.energy is not None:
            rest = (joules - of_spikes) / n
            if self.energy <= rest:
                raise ConfigurationError(
                    f"energy of EnergyTarget must be above {rest:.3g} joules, which an image costs without any spike, "
                    f"not {self.energy}"
                )
            self._state["aim"] = found["rate"] * (self.energy - rest) / (of_spikes / n)
        return found

    # A training step

    def change_batch(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Watch the spikes of this step; before the first one find which layers receive them."""
        if not self._handles:
            self._watch(task.network)
            sums = self._count(task, inputs[: _COUNTED[1]])
            if self._state["steps"] == 0:
                self._found(self._mean(task, sums))
            for number, handle in enumerate(self._handles):
                if number not in self._spiking:
                    handle.remove()
            self._state = {
                name: torch.tensor(float(value), dtype=torch.float32, device=inputs.device)
                for name, value in self._state.items()
            }
        self._received, self._watching = {}, True
        return inputs, targets

    def change_loss(self, task: Task, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the loss with the weighted excess of this step."""
        spikes, full = self._operations()
        value = (spikes / full).clamp(min=1e-9)
        weight = self._weight(task, value.detach())
        task.log_dict({"train/rate": value.detach(), "train/multiplier": self._state["multiplier"]})
        return loss + weight * torch.log(value / self._state["aim"])

    def _weight(self, task: Task, measured: Tensor) -> Tensor:
        """Return the weight of a step's excess, and move the multiplier."""
        state, steps = self._state, _steps(task.trainer)
        progress = min(1.0, steps_done(task.trainer) / steps)
        seen = self._mean(task, measured.clone())
        first = state["steps"] == 0
        state["start"] = torch.where(first, seen, state["start"])
        # The mean forgets as weight averaging does, slowly only once there is something to remember.
        memory = torch.clamp((1.0 + state["steps"]) / (10.0 + state["steps"]), max=_MEMORY)
        state["mean"] = torch.where(first, seen, torch.lerp(seen, state["mean"], memory))
        state["steps"] = state["steps"] + 1
        way = torch.log(state["start"] / state["aim"]).clamp(min=0.0) * max(0.0, 1.0 - progress / WARMUP)
        excess = torch.log(seen * state["ratio"] / state["aim"]) - way
        # Below its target it is pulled back up, unless it has always been there.
        weight = state["multiplier"] + _DAMPING * excess
        weight = torch.where(state["start"] > state["aim"], weight, weight.clamp(min=0.0))
        rise = _RISE[progress >= WARMUP] / (steps * task.trainer.accumulate_grad_batches) * excess
        state["multiplier"] = (state["multiplier"] + rise).clamp(0.0, _LARGEST)
        return weight

    @staticmethod
    def _mean(task: Task, value: Tensor) -> Tensor:
        """Mean over the processes of a training."""
        mean: Tensor = task.trainer.strategy.reduce(value.to(task.device), reduce_op="mean")
        return mean

    # Validation

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count some images."""
        if trainer.state.fn != "fit" or not self._handles or not isinstance(pl_module, Task):
            return
        batches, images = _COUNTED
        number = trainer.num_val_batches[0] if isinstance(trainer.num_val_batches, list) else trainer.num_val_batches
        every = math.ceil(number / batches) if math.isfinite(number) else 1
        if batch_idx % every == 0 and batch_idx < every * batches:
            self._sums += self._count(pl_module, pl_module.unpack(batch)[0][:images])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was counted, and correct the steps by it."""
        if not self._handles or not isinstance(pl_module, Task) or trainer.state.fn != "fit":
            return
        sums, self._sums = self._mean(pl_module, self._sums.float()).double(), torch.zeros(5, dtype=torch.float64)
        if not sums[-1]:
            return
        self.counted = self._found(sums)
        pl_module.log_dict({f"val/{name}": value for name, value in self.counted.items()})
        state, device = self._state, pl_module.device
        state["aim"] = torch.as_tensor(state["aim"], dtype=torch.float32, device=device)
        progress = steps_done(trainer) / _steps(trainer)
        # In the beginning statistics are rough, and the aim is far from the target; in the end half of the way, as the
        # count is of some images, and of weights that are a mean over steps.
        if progress >= WARMUP / 2:
            ratio = (self.counted["rate"] / state["mean"]).clamp(1.0 / _APART, _APART)
            state["ratio"] = ratio if progress < WARMUP else torch.sqrt(state["ratio"] * ratio)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no more."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no more."""
        self._release()


def _steps(trainer: pl.Trainer) -> float:
    """Steps of a training."""
    total = trainer.estimated_stepping_batches  # -1 for data without a length
    return max(1.0, float(total)) if 0 <= total < math.inf else _ENDLESS
