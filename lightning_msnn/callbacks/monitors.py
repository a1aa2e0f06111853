"""What the network does while it trains and is tested: spike rates and energy."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import SequentialSampler

from lightning_msnn import energy as measured
from lightning_msnn.energy import NETWORK, SAMPLES, OperationCounter, Record, spread, summarize
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.metrics import Total
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.runs.trainer import refuse_shards, run_folder, writes_files

__all__ = ["EnergyMonitor", "SpikeRateMonitor"]


@contextmanager
def evaluating(pl_module: pl.LightningModule, network: nn.Module) -> Iterator[None]:
    """Evaluate a network in the trainer's precision, and leave its modes and all random generators as they were."""
    training = [module for module in network.modules() if module.training]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    network.eval()
    try:
        with pl_module.trainer.precision_plugin.forward_context(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


class _Monitor(Callback):
    """Counts what the network does for the images of training steps that log, and for some images of a test.

    It keeps the network's inputs and, after the step or at the end of the test, evaluates them once more with the
    counter, as reports and cards do. A network without state between calls trains to the bit as without a monitor, and
    a step that does not log has no hook. Images of a test are spread evenly over the classes if the data has
    ``targets`` and an order, else they are the first.
    """

    operations = True
    _values: Callable[[Record], dict[str, Any]]
    """Returns the values to log by key."""

    def __init__(self, every_n_steps: int | None = None, samples: int = SAMPLES, network: str | None = None) -> None:
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.samples = check_integer("samples", samples, 1)
        self.network = network
        self._hooks = ExitStack()

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        """Find the network in the module."""
        children = [name for name, m in pl_module.named_children() if next(m.parameters(), None) is not None]
        names = [self.network] if self.network else ["network", "model", *(children if len(children) == 1 else [])]
        modules: dict[str, nn.Module] = dict(pl_module.named_modules())
        for name in names:
            if name in modules:
                return modules[name]
        raise ConfigurationError(
            f"{type(pl_module).__name__} has no module {names[0]!r}: {type(self).__name__}(network=...) takes one of "
            f"{', '.join(children)}"
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is a network that can be counted."""
        refuse_shards(trainer.strategy, type(self).__name__)
        OperationCounter(self._network(pl_module))

    def _begin(self, trainer: pl.Trainer) -> None:
        """Begin with no images, of which this process is to keep its share."""
        self._inputs: list[Any] = []
        self._size = torch.Size()  # of the first
        self._missing = len(range(trainer.global_rank, self.samples, trainer.world_size))

    def _watch(self, pl_module: pl.LightningModule, rows: list[int] | None = None) -> None:
        """Keep the next inputs of the network: these rows, or the first."""

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._hooks.close()
            index = slice(self._missing) if rows is None else rows
            kept = tree_map_only(Tensor, lambda x: x.detach()[index] if x.dim() else x, (args, kwargs))
            first = next(x for x in tree_leaves(kept) if isinstance(x, Tensor) and x.dim())
            if not self._inputs or first.shape[1:] == self._size:  # those of one size are counted together
                self._size = first.shape[1:]
                self._inputs.append(kept)
                self._missing -= len(first)

        handle = self._network(pl_module).register_forward_pre_hook(keep, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._hooks.close()

    def _counted(self, pl_module: pl.LightningModule, twins: Any = None) -> dict[str, Record]:
        """Count the network and its baselines on the images that all processes have kept."""
        network, inputs = self._network(pl_module), self._inputs
        self._inputs = []
        self._hooks.close()
        if not inputs:
            return {}
        with evaluating(pl_module, network):
            records = compare(network, twins or (lambda images: {}), inputs, self.samples, self.operations)
        totals = {name: Total(record).to(pl_module.device) for name, record in records.items()}
        for name, record in records.items():
            totals[name].update(record)
        return {name: total.compute() for name, total in totals.items()}  # over all processes

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the images if this step logs."""
        self._begin(trainer)
        if self.every_n_steps is not None:
            logs = (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0
        else:
            ends = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
            logs = ends and trainer.log_every_n_steps > 0  # type: ignore[attr-defined]
        if logs:
            self._watch(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count and log."""
        for record in self._counted(pl_module).values():
            values = {name: float(value) for name, value in self._values(record).items()}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=max(0, trainer.global_step - 1))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the images."""
        self._begin(trainer)
        self._rows = _chosen_rows(trainer, self._missing)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the chosen images of a batch of the first loader."""
        self._hooks.close()  # where the network was not called
        rows = None if self._rows is None or dataloader_idx else self._rows[batch_idx]
        if not dataloader_idx and self._missing > 0 and rows != []:
            self._watch(pl_module, rows)


def _chosen_rows(trainer: pl.Trainer, samples: int) -> list[list[int]] | None:
    """Rows of each batch of a test that are counted; None where the order of the data or its classes are not known."""
    loaders: Any = trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    sampler, targets = getattr(loader, "sampler", None), getattr(getattr(loader, "dataset", None), "targets", None)
    in_order = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False
    if not in_order or targets is None or getattr(loader, "batch_sampler", None) is None:
        return None
    batches = list(loader.batch_sampler)[: int(min(trainer.num_test_batches[0], len(loader)))]
    chosen = set(spread(torch.as_tensor(targets)[[i for batch in batches for i in batch]], samples).tolist())
    place = count()
    return [[row for row in range(len(batch)) if next(place) in chosen] for batch in batches]


class SpikeRateMonitor(_Monitor):
    """Log the spike rate of each layer of neurons, and warn of layers that never or always fire.

    Logs ``spike_rate/all`` and ``spike_rate/<layer>``, shares in [0, 1], and ``mean_level/...`` if spikes are graded,
    the same on every rank. At the end of a test, ``spike_rate.png`` and ``windows.png`` go to the run folder and to the
    loggers that take images.

    Args:
        every_n_steps: Batches from one log to the next. By default at the end of each epoch, unless the trainer's
            ``log_every_n_steps`` is 0.
        samples: Images of a test that are counted, spread evenly over the classes.
        network: Name of the network in the LightningModule; found if it is ``network``, ``model`` or the only module.

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no network to count.
    """

    operations = False
    _before: frozenset[str] = frozenset()
    _warned: frozenset[str] = frozenset()

    def _values(self, record: Record) -> dict[str, Any]:
        rates = {name: float(rate) for name, rate in measured.spike_rate(record, by="layer").items()}
        extreme = (
            {name for name, rate in rates.items() if rate in (0.0, 1.0)} if rates else {"the network, which has none"}
        )
        # Twice in a row, as the first statistics of batch norms are rough.
        if new := (extreme & self._before) - self._warned:
            rank_zero_warn(f"no neuron, or every neuron, fired at two logs in a row in {', '.join(sorted(new))}")
        self._before = frozenset(extreme)
        self._warned |= new
        rates |= {"all": measured.spike_rate(record)} if rates else {}
        values = {f"spike_rate/{name}": rate for name, rate in rates.items()}
        if record.total("further_levels"):
            levels = {"all": measured.mean_level(record), **measured.mean_level(record, by="layer")}
            values |= {f"mean_level/{name}": level for name, level in levels.items()}
        return values

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures."""
        record = self._counted(pl_module).get(NETWORK)
        folder = run_folder(trainer)
        if record is None or not record.fired or not writes_files(trainer):
            return
        _log_picture(draw_spike_rates(summarize(record)), "spike_rate", folder, trainer)
        if maps := window_maps(self._network(pl_module), record):
            _log_picture(draw_windows(maps), "windows", folder, trainer)


class EnergyMonitor(_Monitor):
    """Log the network's energy, and compare it at the end of a test with the baselines of ``pl_module.twins(images)``.

    Logs ``energy/all`` and ``energy/<kind>`` in joules by image, ``energy/accumulates_per_image`` and
    ``energy/multiply_accumulates_per_image``, the same on every rank. At the end of a test, ``energy.json`` goes to the
    run folder, with all counts and energies, and ``energy.png``, which also goes to the loggers that take images.

    Args:
        profile: Name of an energy profile, or a YAML file of one.
        **kwargs: Arguments of :class:`SpikeRateMonitor`.
    """

    def __init__(self, profile: str = DEFAULT_PROFILE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        measured.profile(profile)
        self.profile = profile
        self.columns: dict[str, dict[str, Any]] = {}

    def _values(self, record: Record) -> dict[str, Any]:
        operations = measured.synaptic_operations(record)
        kinds = measured.energy(record, self.profile, by="kind")
        return {
            "energy/all": measured.energy(record, self.profile),
            **{f"energy/{kind.replace(' ', '_')}": joules for kind, joules in kinds.items()},
            **{f"energy/{n}_per_image": operations[n] for n in ("accumulates", "multiply_accumulates")},
        }

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the comparison and draw the picture."""
        found = trainer.callback_metrics.get("test/top1")
        top1 = {} if found is None else {NETWORK: 100.0 * float(found)}
        records = self._counted(pl_module, getattr(pl_module, "twins", None))
        self.columns = {name: summarize(record, self.profile, top1.get(name)) for name, record in records.items()}
        folder = run_folder(trainer)
        if self.columns and writes_files(trainer):
            content = {"unit": "joules, operations: for one sample", "profile": self.profile, "columns": self.columns}
            write_whole((json.dumps(content, indent=1) + "\n").encode(), os.path.join(folder, "energy.json"))
            _log_picture(draw_energy(self.columns[NETWORK]), "energy", folder, trainer)

    def table(self) -> str:
        """Return the comparison of the last test as text, empty before the first."""
        return measured.comparison_table(self.columns) if self.columns else ""


def _log_picture(figure: Any, name: str, folder: str, trainer: pl.Trainer) -> None:
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
