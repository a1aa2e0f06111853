"""What the network does while it trains and is tested: spike rates and energy."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_msnn.energy import NETWORK, OperationCounter, Record, comparison_table, summarize
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, energy_by_kind
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.nn.neuron import annealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EnergyMonitor", "SpikeRateMonitor"]


class _Monitor(Callback):
    """Counts what the network does in the training steps that log, and in the first images of a test.

    Between those steps no hook is attached, so that they cost nothing. Of a step whose spikes are annealed, the images
    are evaluated once more, with exact spikes.
    """

    operations = True

    def __init__(self, every_n_steps: int | None, samples: int, network: str | None) -> None:
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.samples = check_integer("samples", samples, 1)
        self.network = network
        self._counter: OperationCounter | None = None

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        """Find the network in the module."""
        if self.network is not None:
            try:
                return pl_module.get_submodule(self.network)
            except AttributeError as error:
                raise ConfigurationError(
                    f"{type(pl_module).__name__} has no module {self.network!r}: "
                    f"allowed are {', '.join(n for n, _ in pl_module.named_children())}"
                ) from error
        for name in ("network", "model"):
            if isinstance(found := getattr(pl_module, name, None), nn.Module):
                return found
        children = [m for m in pl_module.children() if next(m.parameters(), None) is not None]
        if len(children) == 1:
            return children[0]
        raise ConfigurationError(
            f"{type(pl_module).__name__} has several modules: name the network to count, {type(self).__name__}(network="
            f"...), one of {', '.join(n for n, _ in pl_module.named_children())}"
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is a network that can be counted."""
        OperationCounter(self._network(pl_module))

    def _attach(self, pl_module: pl.LightningModule) -> None:
        self._counter = OperationCounter(self._network(pl_module), self.operations)
        self._counter.__enter__()

    def _detach(self) -> Record | None:
        """Take the hooks off and return what was counted."""
        if self._counter is None:
            return None
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        return counter.record()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._detach()

    # Training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach hooks if this step logs."""
        if self.every_n_steps is None:
            logs = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        else:
            logs = (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0
        if logs:
            self._attach(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and take the hooks off."""
        counter, record = self._counter, self._detach()
        if counter is not None and annealed(counter.model):
            record = self._evaluated(trainer, pl_module, counter.inputs)
        if record is not None:
            values = {name: float(value) for name, value in self._values(self._sum(record, trainer, pl_module)).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=max(0, trainer.global_step - 1))

    @torch.no_grad()
    def _evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, inputs: tuple[Any, ...]) -> Record | None:
        """Count an evaluation of a training step's inputs."""
        network = self._network(pl_module)
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            self._attach(pl_module)
            with trainer.precision_plugin.forward_context():
                network(*inputs)
        finally:
            record = self._detach()
            for module in training:
                module.training = True
        return record

    def _sum(self, record: Record, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Record:
        """Add up the records of all processes."""
        if trainer.world_size == 1:
            return record
        fired = [f.flatten() for f in record.fired.values()]
        numbers = torch.cat(
            [
                record.counts.flatten(),
                torch.tensor([record.samples, *record.visits.values()]),
                *(f.cpu() for f in fired),
            ]
        ).to(pl_module.device)
        total = trainer.strategy.reduce(numbers, reduce_op="sum")
        assert isinstance(total, Tensor)
        sizes = [record.counts.numel(), 1, len(record.visits), *(len(f) for f in fired)]
        counts, samples, visits, *parts = torch.split(total.cpu(), sizes)
        return Record(
            record.layers,
            counts.view_as(record.counts),
            int(samples),
            record.parameters,
            record.uncounted,
            {n: part.view_as(f) for (n, f), part in zip(record.fired.items(), parts, strict=True)},
            dict(zip(record.visits, visits.tolist(), strict=True)),
        )

    def _values(self, record: Record) -> dict[str, Any]:
        """Return what is logged of a record, by key."""
        raise NotImplementedError

    # Test

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach hooks for the first images."""
        self._attach(pl_module)
        self._tested: Record | None = None

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the hooks off once there are enough images."""
        if self._counter is None:
            return
        self._on_counted(pl_module, self._counter.inputs)
        if self._counter.samples * trainer.world_size >= self.samples:
            self._tested = self._detach()

    def _on_counted(self, pl_module: pl.LightningModule, inputs: tuple[Any, ...]) -> None:
        """Do what is to be done with the inputs of a batch that was counted."""

    def _test_record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Record | None:
        """Return what all processes counted in the test."""
        record = self._detach() or self._tested
        return None if record is None or record.samples == 0 else self._sum(record, trainer, pl_module)


class SpikeRateMonitor(_Monitor):
    """Log the spike rate of each layer of neurons, and warn of layers that never or always fire.

    Logs ``spike_rate/all`` and ``spike_rate/<layer>``, shares in [0, 1], to whatever loggers run, the same on every
    rank. At the end of a test, ``spike_rate.png`` and ``windows.png`` go to the run folder and to the loggers that take
    images.

    Args:
        every_n_steps: Training steps from one log to the next, None for the last step of each epoch.
        samples: Images of a test that are counted.
        network: Name of the network in the LightningModule; found if it is ``network``, ``model`` or the only module.

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no network to count.
    """

    operations = False

    def __init__(self, every_n_steps: int | None = None, samples: int = 512, network: str | None = None) -> None:
        super().__init__(every_n_steps, samples, network)
        self._warned: set[str] = set()

    def _values(self, record: Record) -> dict[str, Any]:
        rates = _rates(record)
        self._warn({n: r for n, r in rates.items() if r in (0.0, 1.0)})
        total = sum(int(f.sum()) for f in record.fired.values())
        neurons = sum(f.numel() * record.visits[n] for n, f in record.fired.items())
        overall = {"spike_rate/all": total / neurons} if neurons else {}
        return {**overall, **{f"spike_rate/{name}": rate for name, rate in rates.items()}}

    def _warn(self, rates: dict[str, float]) -> None:
        """Warn once of each layer."""
        new = {name: rate for name, rate in rates.items() if name not in self._warned}
        self._warned.update(new)
        for rate, what in ((0.0, "no neuron fired"), (1.0, "every neuron fired always")):
            layers = [name for name, r in new.items() if r == rate]
            if layers:
                rank_zero_warn(f"{what} in {len(layers)} layers of this step: {', '.join(layers)}")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures."""
        record = self._test_record(trainer, pl_module)
        folder = trainer.log_dir  # a broadcast: on every rank
        if record is None or not record.fired or not trainer.is_global_zero:
            return
        summary = summarize(record)
        _log_picture(draw_spike_rates(summary), "spike_rate", folder, trainer.loggers, trainer.global_step)
        maps = window_maps(self._network(pl_module), record.fired, record.visits)
        if maps:
            _log_picture(draw_windows(maps), "windows", folder, trainer.loggers, trainer.global_step)


def _rates(record: Record) -> dict[str, float]:
    """Spike rates by layer."""
    return {name: int(f.sum()) / (f.numel() * record.visits[name]) for name, f in record.fired.items()}


class EnergyMonitor(_Monitor):
    """Log what the network costs, and compare it with its twins at the end of a test.

    Logs ``energy/all`` and ``energy/<kind>`` in joules by image, ``energy/accumulates_per_image`` and
    ``energy/multiply_accumulates_per_image``, the same on every rank. At the end of a test, ``energy.json`` goes to the
    run folder: all counts and energies, of the network and of those that the LightningModule's ``twins(images)``
    returns, if it has that. So does ``energy.png``, which also goes to the loggers that take images.

    Args:
        profile: Name of an energy profile, or a YAML file of one.
        every_n_steps: Training steps from one log to the next, None for the last step of each epoch.
        samples: Images of a test that are counted.
        network: Name of the network in the LightningModule; found if it is ``network``, ``model`` or the only module.

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no network to count.
    """

    def __init__(
        self,
        profile: str = DEFAULT_PROFILE,
        every_n_steps: int | None = None,
        samples: int = 512,
        network: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, samples, network)
        find_profile(profile)
        self.profile = profile
        self.columns: dict[str, dict[str, Any]] = {}
        self._twins: dict[str, OperationCounter] = {}

    def _values(self, record: Record) -> dict[str, Any]:
        n = max(1, record.samples)
        kinds = {
            kind: float(joules.sum()) / n
            for kind, joules in energy_by_kind(record.counts, n, record.parameters, self.profile).items()
        }
        return {
            "energy/all": sum(kinds.values()),
            **{f"energy/{kind.replace(' ', '_')}": joules for kind, joules in kinds.items()},
            **{f"energy/{name}_per_image": record.total(name) / n for name in ("accumulates", "multiply_accumulates")},
        }

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach hooks for the first images."""
        super().on_test_start(trainer, pl_module)
        self.columns = {}
        self._twins = {}

    def _on_counted(self, pl_module: pl.LightningModule, inputs: tuple[Any, ...]) -> None:
        """Show the images to the twins, which are made for the first of them."""
        twins = getattr(pl_module, "twins", None)
        with torch.no_grad():
            if not self._twins and callable(twins):
                self._twins = {name: OperationCounter(twin) for name, twin in twins(*inputs).items()}
                for counter in self._twins.values():
                    counter.__enter__()
            for counter in self._twins.values():
                counter.model(*inputs)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the comparison and draw the picture."""
        record = self._test_record(trainer, pl_module)
        records = {} if record is None else {NETWORK: record}
        for name, counter in self._twins.items():
            counter.__exit__(None, None, None)
            if record is not None:
                records[name] = self._sum(counter.record(), trainer, pl_module)
        self._twins = {}
        self.columns = {name: summarize(one, self.profile) for name, one in records.items()}
        folder = trainer.log_dir  # a broadcast: on every rank
        if record is None or folder is None or not trainer.is_global_zero:
            return
        target = Path(folder) / "energy.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        content = {"unit": "joules, operations: for one sample", "profile": self.profile, "columns": self.columns}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
        _log_picture(draw_energy(self.columns[NETWORK]), "energy", folder, trainer.loggers, trainer.global_step)

    def table(self) -> str:
        """Return the comparison of the last test as text, empty before the first."""
        return comparison_table(self.columns) if self.columns else ""


def _log_picture(figure: Figure, name: str, folder: str | Path | None, loggers: Sequence[Logger], step: int) -> None:
    """Write a figure to the run folder as ``<name>.png``, and to the loggers that take images.

    Args:
        figure: The figure.
        name: Its name, without an ending.
        folder: Run folder, None for no file.
        loggers: The trainer's loggers; TensorBoard's and those with a ``log_image``, as wandb's, take it.
        step: Step that it belongs to.
    """
    content = png(figure)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(content)
    for logger in loggers:
        experiment = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            from PIL import Image

            logger.log_image(key=name, images=[Image.open(io.BytesIO(content))], step=step)
        elif hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, global_step=step)  # type: ignore[union-attr]
