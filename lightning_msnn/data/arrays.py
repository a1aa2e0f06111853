"""The data module of data sets that fit into memory as tensors and are not images: sounds, series, events."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_msnn.data.base import STAGES, Part, stratified_split
from lightning_msnn.data.datasets import ArrayDataset, Batch
from lightning_msnn.data.parts import ROOT_OPTIONS, PartDataModule
from lightning_msnn.errors import ConfigurationError, check_integer, choose

__all__ = ["ArrayDataModule", "NamedDataset", "aeon_folder", "list_files"]

MOST_BATCHES = 10_000
"""Batches of an epoch that few samples are repeated for: the order of all of them is drawn at once."""


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


class ArrayDataModule(PartDataModule):
    """Parts of a data set held as tensors, gathered a batch at a time and made into network inputs on the device.

    A data set is a subclass that reads its parts (``read``), and says what becomes of a batch (``transform``); its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect. The order of the training is a function of seed and epoch, and a checkpoint keeps the place
    in it. Each process reads the parts that its stage needs.

    Args:
        *args: Of :class:`~lightning_msnn.data.parts.PartDataModule`.
        min_batches: Batches of an epoch on each device, at least: a smaller training part is met several times in one,
            in any order. From 1 to :data:`MOST_BATCHES`.
        **kwargs: Of the same.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    #: Mean and standard deviation of each channel, in the unit of what ``transform`` normalises.
    mean: Sequence[float]
    std: Sequence[float]
    #: What inputs are called, in the plural.
    noun: ClassVar[str] = "samples"
    #: Whether ``root`` must be given.
    needs_root: ClassVar[bool] = True
    #: Whether a folder is made there if there is none.
    makes_root: ClassVar[bool] = False
    #: Folder of the data set, which a subclass takes as an argument if it has one.
    root: Path | None = None

    def __init__(self, *args: Any, min_batches: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_batches = check_integer("min_batches", min_batches, 1)
        if min_batches > MOST_BATCHES:
            raise ConfigurationError(f"min_batches must be {MOST_BATCHES} at most, not {min_batches}")

    # What a data set defines

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
        made = self.makes_root and self.root is not None and not self.root.exists()
        if part is not None and self.needs_root and not made and (self.root is None or not self.root.is_dir()):
            given = "is not given" if self.root is None else f"{str(self.root)!r} is not a folder"
            raise ConfigurationError(
                f"root {given}: {type(self).__name__} needs the folder of its files, {ROOT_OPTIONS}"
            )
        self.check_part(part)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs; by default all that is there to train and test with."""
        for name in ["fit", "test"] if stage is None else [stage]:
            self.check(name)
            part = STAGES[name]
            # What is tested or predicted is normalised by what the training inputs say.
            if "train" not in self._datasets and (part == "train" or (self._learns and "mean" not in vars(self))):
                whole = ArrayDataset(*self.read("train"))
                train, val = self.split(whole.targets)
                self._datasets |= {"train": whole.select(train), "val": whole.select(val)}
                if "mean" not in vars(self):  # as where a checkpoint has said them
                    self.prepare(whole.images[train])
            if part == "test":
                self._datasets["test"] = ArrayDataset(*self.read("test"))
            elif part is None:
                self._datasets["predict"] = self.read_unknown()

    def _of_an_epoch(self, dataset: ArrayDataset, devices: int) -> ArrayDataset:
        """Each sample as often as it takes for ``min_batches``; a device has one batch in any case."""
        size = len(dataset)
        if not size or max(1, size // devices // self.batch_size) >= self.min_batches:
            return dataset
        passes = math.ceil(self.min_batches * self.batch_size * devices / size)
        return dataset.select(torch.arange(size).repeat(passes))

    @property
    def _learns(self) -> bool:
        return type(self).prepare is not ArrayDataModule.prepare

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment (when training) and normalise a batch on its device."""
        inputs, *rest = batch
        return self.transform(inputs, self.trainer is not None and self.trainer.training), *rest


def list_files(place: Path, suffix: str) -> list[Path]:
    """Return a file, or the sorted files of a folder and its sub-folders with a suffix, hidden ones left out.

    Raises:
        ConfigurationError: If there is no such file.
    """
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
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
