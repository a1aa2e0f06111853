"""The data module of data sets that fit into memory as tensors and are not images: sounds, series, events."""

import itertools
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_msnn.data.base import STAGES, Part, stratified_split
from lightning_msnn.data.datasets import ArrayDataset, Batch, Loader, collate
from lightning_msnn.data.sampling import ShardSampler, even_batch_size
from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose

__all__ = ["ArrayDataModule", "NamedDataset", "aeon_folder", "check_path", "list_files"]


class NamedDataset(Dataset[Batch]):
    """Inputs without targets, each with the name of its file.

    Args:
        inputs: Any tensor with N entries.
        names: N names.
    """

    def __init__(self, inputs: Tensor, names: Sequence[str]) -> None:
        self.inputs = inputs
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.inputs[indices], [self.names[index] for index in indices]


class ArrayDataModule(LightningDataModule):
    """Parts of a data set held as tensors, gathered a batch at a time and made into network inputs on the device.

    A data set is a subclass that reads its parts (``read``), and says what becomes of a batch (``transform``); its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect. The order of the training is a function of seed and epoch, and a checkpoint keeps the place
    in it. Each process reads the parts that its stage needs.

    Args:
        root: Folder of the data set.
        batch_size: Inputs a batch (on each device).
        val_fraction: Share of the training part that is split off for validation, in [0, 1), the same for each class.
        seed: Seed of that split.
        num_workers: Worker processes of each loader; 0 loads in the main process.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    #: Mean and standard deviation of each channel, in the unit of what ``transform`` normalises.
    mean: Sequence[float]
    std: Sequence[float]
    #: Whether ``root`` must be given.
    needs_root: ClassVar[bool] = True

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = check_path("root", root)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.val_fraction = check_number("val_fraction", val_fraction, below_one=True)
        self.seed = check_integer("seed", seed, 0)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self._datasets: dict[str, ArrayDataset | NamedDataset] = {}
        self._shuffle_seed: int | None = None
        self._loaders = itertools.count()
        self._train_loader: Loader | None = None
        self._place: dict[str, int] | None = None

    # What a data set defines

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their numbers."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of an input."""
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an input."""
        raise NotImplementedError

    def check_part(self, part: Part | None) -> None:
        """Raise a ConfigurationError if a part (None: what is to be predicted) is not there; read no input."""
        raise NotImplementedError

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, ...) and targets (N, ...) of a part."""
        raise NotImplementedError

    def read_unknown(self) -> NamedDataset:
        """Return what is to be predicted."""
        raise NotImplementedError

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and of the validation inputs in the training part."""
        return stratified_split(targets, self.val_fraction, self.seed)

    def prepare(self, inputs: Tensor) -> None:
        """Take from the training inputs alone, (N, ...), what ``transform`` needs to know."""

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Turn a batch as it is stored into float32 inputs of the network, augmented if ``training``."""
        raise NotImplementedError

    # What Lightning calls

    def check(self, stage: str) -> None:
        """Find what is wrong with the files that a stage needs before any work.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ConfigurationError: If something is missing, empty or does not fit.
        """
        part = choose(STAGES, stage, "stage")
        if part is not None and self.needs_root and (self.root is None or not self.root.is_dir()):
            given = "is not given" if self.root is None else f"{str(self.root)!r} is not a folder"
            raise ConfigurationError(f"root {given}: {type(self).__name__} needs the folder of its files, data.root")
        self.check_part(part)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs; by default all that is there to train and test with."""
        for name in ["fit", "test"] if stage is None else [stage]:
            self.check(name)
            part = STAGES[name]
            # What is tested or predicted is normalised by what the training inputs say.
            if "train" not in self._datasets and (part == "train" or self._learns):
                whole = ArrayDataset(*self.read("train"))
                train, val = self.split(whole.targets)
                self._datasets |= {"train": whole.select(train), "val": whole.select(val)}
                self.prepare(whole.images[train])
            if part == "test":
                self._datasets["test"] = ArrayDataset(*self.read("test"))
            elif part is None:
                self._datasets["predict"] = self.read_unknown()

    @property
    def _learns(self) -> bool:
        return type(self).prepare is not ArrayDataModule.prepare

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

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment (when training) and normalise a batch on its device."""
        inputs, *rest = batch
        return self.transform(inputs, self.trainer is not None and self.trainer.training), *rest

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the order of the training, and the place in it."""
        place = self._place if self._train_loader is None else self._train_loader.state_dict()
        return {"shuffle_seed": self._seed_of_shuffle(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the order of the training, whatever the seed of this run."""
        self._shuffle_seed, self._place = state_dict["shuffle_seed"], state_dict["place"]

    def _seed_of_shuffle(self) -> int:
        if self._shuffle_seed is None:  # Lightning's seed_everything leaves its seed there
            self._shuffle_seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        return self._shuffle_seed

    def _ready(self, name: str) -> ArrayDataset | NamedDataset:
        if name not in self._datasets:
            raise RuntimeError(f"the {name} part is not loaded: call setup() first")
        return self._datasets[name]

    def _loader(self, name: str) -> Loader:
        dataset, training = self._ready(name), name == "train"
        devices, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = ShardSampler(dataset, devices, rank, training, self._seed_of_shuffle())
        if training:
            sampler.set_epoch(next(self._loaders))
        return Loader(
            dataset,
            batch_size=self.batch_size if training else even_batch_size(self.batch_size, len(dataset), devices),
            sampler=sampler,
            generator=torch.Generator(),
            drop_last=training and len(dataset) // devices >= self.batch_size,  # batch norm fails on one input
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )


def check_path(name: str, value: object) -> Path | None:
    """Return a path with its ``~`` expanded, or raise a ConfigurationError if it is no path."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigurationError(f"{name} must be the path of a folder, not {value!r}")
    return Path(os.fspath(value)).expanduser()


def list_files(place: Path, suffix: str) -> list[Path]:
    """Return a file, or the sorted files of a folder and its sub-folders with a suffix, hidden ones left out.

    Raises:
        ConfigurationError: If there is no such file.
    """
    files = [place] if place.is_file() else sorted(place.rglob(f"*{suffix}")) if place.is_dir() else []
    files = [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")]
    if not files:
        raise ConfigurationError(f"{str(place)!r} must be a {suffix} file or a folder with some, and is not")
    return files


def aeon_folder() -> Path:
    """Return the folder of the series that aeon's wheel ships.

    Raises:
        ConfigurationError: If aeon is not installed.
    """
    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "aeon is not installed, which reads and ships series: pip install 'lightning-msnn[time-series]'"
        )
    return Path(spec.origin).parent / "datasets" / "data"
