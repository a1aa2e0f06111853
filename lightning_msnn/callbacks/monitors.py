"""What the network does while it trains and is tested: spike rates and energy."""

from __future__ import annotations

import io
import json
import math
import os
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import SequentialSampler

from lightning_msnn.energy import (
    NETWORK,
    SAMPLES,
    OperationCounter,
    Record,
    comparison_table,
    energy,
    spike_rate,
    spread,
    summarize,
    synaptic_operations,
)
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.metrics import Total
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.runs.folders import run_folder, writes_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EnergyMonitor", "SpikeRateMonitor"]


class _Monitor(Callback):
    """Counts what the network does for the images of training steps that log, and for some images of a test.

    The network's inputs are kept, and after the step, or at the end of the test, evaluated once more with the counter,
    as reports and cards do. Training is to the bit what it is without a monitor, and between the steps that log no hook
    is attached. Images of a test are spread evenly over the classes if the data has ``targets`` and an order; else they
    are the first.
    """

    operations = True

    def __init__(self, every_n_steps: int | None, samples: int, network: str | None) -> None:
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.samples = check_integer("samples", samples, 1)
        self.network = network
        self._handle: Any = None

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        """Find the network in the module."""
        children = [name for name, m in pl_module.named_children() if next(m.parameters(), None) is not None]
        known = [name for name in children if name in ("network", "model") or len(children) == 1]
        name = self.network or (sorted(known)[-1] if known else "")  # network before model
        found: nn.Module | None = dict(pl_module.named_modules()).get(name) if name else None
        if found is None:
            raise ConfigurationError(
                f"{type(pl_module).__name__} has no module {name!r}: {type(self).__name__}(network=...) takes one of "
                f"{', '.join(children)}"
            )
        return found

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is a network that can be counted."""
        OperationCounter(self._network(pl_module))

    def _begin(self, trainer: pl.Trainer) -> None:
        """Begin with no images, of which this process is to keep its share."""
        self._inputs: list[Any] = []
        self._missing = len(range(trainer.global_rank, self.samples, trainer.world_size))

    def _watch(self, pl_module: pl.LightningModule, rows: list[int] | None = None) -> None:
        """Keep the next inputs of the network: these rows, or the first."""
        keep = partial(self._keep, rows)
        self._handle = self._network(pl_module).register_forward_pre_hook(keep, with_kwargs=True)

    def _keep(self, rows: list[int] | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._release()
        index = slice(self._missing) if rows is None else rows
        kept = tree_map(lambda x: x.detach()[index] if _is_batch(x) else x, (args, kwargs))
        self._inputs.append(kept)
        self._missing -= len(next(x for x in tree_leaves(kept) if _is_batch(x)))

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    def _counted(self, trainer: pl.Trainer, pl_module: pl.LightningModule, twins: Any = None) -> dict[str, Record]:
        """Count the network, and what it is compared with, on the images that all processes have kept."""
        network, inputs = self._network(pl_module), self._inputs
        self._inputs = []
        self._release()
        if not inputs:
            return {}
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            devices = [pl_module.device] if pl_module.device.type == "cuda" else []
            with trainer.precision_plugin.forward_context(), torch.random.fork_rng(devices=devices):
                records = compare(network, twins or (lambda images: {}), inputs, self.samples, self.operations)
        finally:
            for module in training:
                module.training = True
        totals = {name: Total(record).to(pl_module.device) for name, record in records.items()}
        for name, record in records.items():
            totals[name].update(record)
        return {name: total.compute() for name, total in totals.items()}  # over all processes

    def _values(self, record: Record) -> dict[str, Any]:
        """Return what is logged of a record, by key."""
        raise NotImplementedError

    # Training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the images if this step logs."""
        self._begin(trainer)
        if self.every_n_steps is not None:
            logs = (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0
        else:
            logs = _ends_an_epoch_that_logs(trainer, batch_idx)
        if logs:
            self._watch(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count and log."""
        for record in self._counted(trainer, pl_module).values():
            values = {name: float(value) for name, value in self._values(record).items()}
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=max(0, trainer.global_step - 1))

    # Test

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the images."""
        self._begin(trainer)
        self._rows = _chosen_rows(trainer, self._missing)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the chosen images of the batch."""
        self._release()  # where the network was not called
        if dataloader_idx or self._missing <= 0:  # rows are those of the first loader
            return
        rows = None if self._rows is None else self._rows[batch_idx]
        if rows is None or rows:
            self._watch(pl_module, rows)


def _is_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _ends_an_epoch_that_logs(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a batch is the last of an epoch, or of the training, in which the trainer logs an optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    batches, together = batch_idx + 1, trainer.accumulate_grad_batches
    ends = trainer.is_last_batch or batches == trainer.num_training_batches
    ends = ends or (steps == trainer.max_steps and batches % together == 0)
    before = steps - math.ceil(batches / together)
    return bool(ends) and every > 0 and (before == 0 or steps // every > before // every)


def _chosen_rows(trainer: pl.Trainer, samples: int) -> list[list[int]] | None:
    """Rows of each batch of a test that are counted; None where the order of the data or its classes are not known."""
    loaders: Any = trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    sampler, targets = getattr(loader, "sampler", None), getattr(getattr(loader, "dataset", None), "targets", None)
    in_order = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False
    if not in_order or targets is None or getattr(loader, "batch_sampler", None) is None:
        return None
    batches = list(islice(loader.batch_sampler, int(min(trainer.num_test_batches[0], len(loader)))))
    chosen = set(spread(torch.as_tensor(targets)[[i for batch in batches for i in batch]], samples).tolist())
    begins = accumulate((len(batch) for batch in batches), initial=0)
    return [
        [i for i in range(len(batch)) if begin + i in chosen] for begin, batch in zip(begins, batches, strict=False)
    ]


class SpikeRateMonitor(_Monitor):
    """Log the spike rate of each layer of neurons, and warn of layers that never or always fire.

    Logs ``spike_rate/all`` and ``spike_rate/<layer>``, shares in [0, 1], to whatever loggers run, the same on every
    rank. At the end of a test, ``spike_rate.png`` and ``windows.png`` go to the run folder and to the loggers that take
    images.

    Args:
        every_n_steps: Training steps from one log to the next. None: the last step of an epoch, of the first and of all
            that hold a multiple of the trainer's ``log_every_n_steps``.
        samples: Images of a test that are counted, spread evenly over the classes.
        network: Name of the network in the LightningModule; found if it is ``network``, ``model`` or the only module.

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no network to count.
    """

    operations = False

    def __init__(self, every_n_steps: int | None = None, samples: int = SAMPLES, network: str | None = None) -> None:
        super().__init__(every_n_steps, samples, network)
        self._warned: set[str] = set()
        self._before: dict[str, float] = {}

    def _values(self, record: Record) -> dict[str, Any]:
        rates = {name: float(rate) for name, rate in spike_rate(record, by="layer").items()}
        if not rates and "" not in self._warned:
            self._warned.add("")
            rank_zero_warn("SpikeRateMonitor logs nothing: the network has no spiking neurons")
        self._warn({n: r for n, r in rates.items() if r in (0.0, 1.0)})
        overall = {"spike_rate/all": spike_rate(record)} if rates else {}
        return {**overall, **{f"spike_rate/{name}": rate for name, rate in rates.items()}}

    def _warn(self, rates: dict[str, float]) -> None:
        """Warn once of each layer that was so at the log before too: the first statistics of batch norms are rough."""
        new = {n: rate for n, rate in rates.items() if self._before.get(n) == rate and n not in self._warned}
        self._warned.update(new)
        self._before = rates
        for rate, what in ((0.0, "no neuron fired"), (1.0, "every neuron fired always")):
            layers = [name for name, r in new.items() if r == rate]
            if layers:
                rank_zero_warn(f"{what} in {len(layers)} layers, twice in a row: {', '.join(layers)}")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures."""
        record = self._counted(trainer, pl_module).get(NETWORK)
        folder = run_folder(trainer)
        if record is None or not record.fired or not writes_files(trainer):
            return
        _log_picture(draw_spike_rates(summarize(record)), "spike_rate", folder, trainer)
        maps = window_maps(self._network(pl_module), record)
        if maps:
            _log_picture(draw_windows(maps), "windows", folder, trainer)


class EnergyMonitor(_Monitor):
    """Log what the network costs, and compare it at the end of a test with the networks of ``pl_module.twins(images)``.

    Logs ``energy/all`` and ``energy/<kind>`` in joules by image, ``energy/accumulates_per_image`` and
    ``energy/multiply_accumulates_per_image``, the same on every rank. At the end of a test, ``energy.json`` goes to the
    run folder, with all counts and energies, and ``energy.png``, which also goes to the loggers that take images.

    Args:
        profile: Name of an energy profile, or a YAML file of one.
        every_n_steps: As for :class:`SpikeRateMonitor`.
        samples: As for :class:`SpikeRateMonitor`.
        network: As for :class:`SpikeRateMonitor`.

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no network to count.
    """

    def __init__(
        self,
        profile: str = DEFAULT_PROFILE,
        every_n_steps: int | None = None,
        samples: int = SAMPLES,
        network: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, samples, network)
        find_profile(profile)
        self.profile = profile
        self.columns: dict[str, dict[str, Any]] = {}

    def _values(self, record: Record) -> dict[str, Any]:
        operations = synaptic_operations(record)
        return {
            "energy/all": energy(record, self.profile),
            **{f"energy/{k.replace(' ', '_')}": v for k, v in energy(record, self.profile, by="kind").items()},
            **{f"energy/{n}_per_image": operations[n] for n in ("accumulates", "multiply_accumulates")},
        }

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the comparison and draw the picture."""
        found = trainer.callback_metrics.get("test/top1")
        top1 = {} if found is None else {NETWORK: 100.0 * float(found)}
        records = self._counted(trainer, pl_module, getattr(pl_module, "twins", None))
        self.columns = {name: summarize(record, self.profile, top1.get(name)) for name, record in records.items()}
        folder = run_folder(trainer)
        if not self.columns or not writes_files(trainer):
            return
        content = {"unit": "joules, operations: for one sample", "profile": self.profile, "columns": self.columns}
        write_whole((json.dumps(content, indent=1) + "\n").encode(), os.path.join(folder, "energy.json"))
        _log_picture(draw_energy(self.columns[NETWORK]), "energy", folder, trainer)

    def table(self) -> str:
        """Return the comparison of the last test as text, empty before the first."""
        return comparison_table(self.columns) if self.columns else ""


def _log_picture(figure: Figure, name: str, folder: str, trainer: pl.Trainer) -> None:
    """Write a figure to the run folder as ``<name>.png``, and to TensorBoard and loggers with a ``log_image``."""
    content = png(figure)
    write_whole(content, os.path.join(folder, f"{name}.png"))
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            from PIL import Image

            logger.log_image(key=name, images=[Image.open(io.BytesIO(content))], step=trainer.global_step)
        elif hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, global_step=trainer.global_step)  # type: ignore[union-attr]
