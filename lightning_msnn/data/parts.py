"""What all data modules share: loaders of the parts of a data set, and an order that resumes."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lightning_msnn.data.datasets import Loader, collate
from lightning_msnn.data.sampling import ShardSampler, even_batch_size
from lightning_msnn.errors import ConfigurationError, check_integer, check_number

__all__ = ["ROOT_OPTIONS", "PartDataModule"]

ROOT_OPTIONS = "--data.root of fit, validate, test and predict, --root of other commands"
"""Where a user says in which folder data lies."""


class PartDataModule(LightningDataModule):
    """Loaders of the training, validation, test and predict part of a data set.

    The order of the training is a function of seed and epoch, and a checkpoint keeps the place in it. A subclass says
    ``class_names``, and its ``setup`` puts the parts into ``_datasets``.

    Args:
        batch_size: Samples a batch (on each device).
        val_fraction: Share of the training part that is split off for validation, in [0, 1).
        seed: Seed of that split.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        pin_memory: Load into page-locked memory, which copies to a GPU faster; by default when CUDA is available.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.val_fraction = check_number("val_fraction", val_fraction, below_one=True)
        self.seed = check_integer("seed", seed, 0)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self.pin_memory = pin_memory
        self._datasets: dict[str, Any] = {}
        self._shuffle_seed: int | None = None
        self._loaders = itertools.count()
        self._train_loader: Loader | None = None
        self._place: dict[str, int] | None = None

    @property
    def class_names(self) -> Sequence[str]:
        """Class names in the order of their numbers; no sample is read."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes; no sample is read."""
        return len(self.class_names)

    def train_dataloader(self) -> Loader:
        """Shuffled batches; a last incomplete batch is dropped unless there is no other."""
        self._train_loader = self._loader("train")
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def val_dataloader(self) -> Loader | list[Any]:
        """Batches of what was split off the training part; no loader if that is nothing."""
        return self._loader("val") if len(self._ready("val")) else []

    def test_dataloader(self) -> Loader:
        """Batches of the test part."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """Batches of what is to be predicted, with the names of the files."""
        return self._loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the order of the training samples, and the place in it."""
        place = self._place if self._train_loader is None else self._train_loader.state_dict()
        return {"shuffle_seed": self._seed_of_shuffle(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the order of the training that is resumed, whatever the seed of this run.

        Lightning restores the place of a loader too, but not where a schedule has asked for the number of steps before.
        """
        seed, self._place = state_dict["shuffle_seed"], state_dict["place"]
        self._shuffle_seed = check_integer("shuffle_seed of a checkpoint", seed, 0)

    def _seed_of_shuffle(self) -> int:
        if self._shuffle_seed is None:
            # Lightning's seed_everything leaves its seed there, for the processes that it starts and for samplers.
            self._shuffle_seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        return self._shuffle_seed

    def _path(self, name: str) -> Path | None:
        """Return a hyper-parameter as a path with its ``~`` expanded; a checkpoint keeps it as text."""
        value = self.hparams[name]
        if value is None:
            return None
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            raise ConfigurationError(f"{name} must be the path of a folder, not {value!r}")
        self.hparams[name] = os.fspath(value)  # a pathlib.Path would not load with weights_only=True
        return Path(value).expanduser()

    def _cache_root(self) -> Path:
        """Folder of decoded data sets, where none is given."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return Path(base) / "lightning_msnn"

    def _ready(self, name: str) -> Any:
        if name not in self._datasets:
            raise RuntimeError(f"the {name} part is not loaded: call prepare_data() and setup() first")
        return self._datasets[name]

    def _of_an_epoch(self, dataset: Any, devices: int) -> Any:
        """The training part as an epoch meets it."""
        return dataset

    def _loader(self, name: str) -> Loader:
        dataset = self._ready(name)
        training = name == "train"
        devices, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        if training:
            dataset = self._of_an_epoch(dataset, devices)
        sampler = ShardSampler(dataset, devices, rank, training, self._seed_of_shuffle())
        if training:
            sampler.set_epoch(next(self._loaders))  # a Trainer sets the right one; else each loader is shuffled anew
        return Loader(
            dataset,
            batch_size=self.batch_size if training else even_batch_size(self.batch_size, len(dataset), devices),
            sampler=sampler,
            generator=torch.Generator(),
            # Batch norm fails on a last batch of one sample; but each device must be left at least one batch.
            drop_last=training and len(dataset) // devices >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            collate_fn=collate,
        )
