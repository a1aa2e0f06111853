"""The base of all data modules: parts of a data set, their loaders, and an order that a resumed training continues."""

import os
import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from lightning_msnn.data.archives import Archive
from lightning_msnn.data.datasets import ArrayDataset, FileDataset, Loader, ShardSampler, collate, even_batch_size
from lightning_msnn.data.reading import list_files
from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose, parameters_of

__all__ = ["OF_THE_MACHINE", "ArrayDataModule", "Part", "stratified_split"]

Part = Literal["train", "test"]

#: The part of the data set that each stage reads: validation is split off the training part.
STAGES: dict[str, Part | None] = {"fit": "train", "validate": "train", "test": "test", "predict": None}

#: Arguments that say where data lies and how this machine loads it: only the user chooses them, no checkpoint.
OF_THE_MACHINE = frozenset(("root", "folder", "download", "num_workers", "pin_memory"))


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples into a training and a validation part, with the same share of each class.

    The validation part has ``round(fraction * N)`` samples, or as near to it as these rules allow: each class keeps at
    least one training sample, and each class of two or more samples has at least one for validation. Shares of a class
    are rounded by the largest remainder.

    Args:
        targets: Classes, int64, (N,).
        fraction: Share of the validation part, in [0, 1).
        seed: Seed of the choice; torch's global generator is neither read nor moved.

    Returns:
        Sorted indices of the training part and of the validation part, int64.
    """
    _, counts = torch.unique(targets, return_counts=True)
    ideal = fraction * counts.double().numpy()
    count = counts.numpy()
    least = np.minimum(count - 1, 1 if fraction > 0 else 0)
    most = count - 1
    # The small number keeps 0.29 * 100 from being rounded down to 28.
    taken = np.clip(np.floor(ideal + 1e-9).astype(np.int64), least, most)
    missing = int(np.floor(fraction * len(targets) + 0.5)) - int(taken.sum())
    step, bound = (1, most) if missing > 0 else (-1, least)
    for _ in range(abs(missing)):
        open_ = taken != bound
        if not open_.any():
            break
        taken[np.where(open_, step * (ideal - taken), -np.inf).argmax()] += step

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    classes = torch.tensor_split(targets.argsort(stable=True), counts.cumsum(0)[:-1])
    for members, number in zip(classes, taken.tolist(), strict=True):
        chosen[members[torch.randperm(len(members), generator=generator)[:number]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _is_plain(value: object) -> bool:
    """Whether a value is a number, a name that is no path, or a list or dictionary of these."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value)) and (not isinstance(value, dict) or all(map(_is_plain, value.values())))
    return bool(re.fullmatch(r"[\w-]+", value)) if isinstance(value, str) else isinstance(value, int | float)


class ArrayDataModule(LightningDataModule):
    """The training, validation, test and predict part of a data set, held as tensors.

    A data set is a subclass that reads its parts (``read``) and turns a batch into inputs (``transform``). Its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect.

    A batch has normalised float32 inputs, augmented in training, and targets, or names of files when predicting.
    Samples are stored small (uint8 pixels, int16 sounds). In a Trainer they travel to the device like that, and
    ``on_after_batch_transfer`` turns them into inputs there; without a Trainer the loaders do it.

    The order of the training is a function of seed and epoch, and a checkpoint keeps the place in it.

    Args:
        batch_size: Samples a batch (on each device).
        val_fraction: Share of the training part that is split off for validation, in [0, 1), the same for each class.
        seed: Seed of that split.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        pin_memory: Load into page-locked memory, which copies to a GPU faster; by default when CUDA is available.
        min_batches: Batches of an epoch on each device, at least: a smaller training part is repeated within the
            epoch, and all of it is shuffled.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    #: Mean and standard deviation of each channel, in the unit of what ``transform`` normalises.
    mean: Sequence[float]
    std: Sequence[float]
    #: Class names in the order of their numbers.
    classes: ClassVar[list[str]]
    #: What samples are called, in the plural, and how the names of their files end.
    noun: ClassVar[str] = "samples"
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: Whether ``root`` must be given, and what lies there, for messages.
    needs_root: ClassVar[bool] = True
    layout: ClassVar[str] = "its files"
    #: Where the data set is downloaded from, if it can be.
    archive: ClassVar[Archive | None] = None
    #: Folders of the data set and of what is to be predicted, which a subclass takes as arguments if it has them.
    root: Path | None = None
    folder: Path | None = None
    #: Whether each training image is mirrored in every second epoch.
    alternate: bool = False

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        min_batches: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # those of a subclass too
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.val_fraction = check_number("val_fraction", val_fraction, below_one=True)
        self.seed = check_integer("seed", seed, 0)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self.pin_memory = pin_memory
        self.min_batches = check_integer("min_batches", min_batches, 1)
        self.root, self.folder = self._path("root"), self._path("folder")
        self._datasets: dict[str, Any] = {}
        self._shuffle_seed: int | None = None
        self._loaders = 0
        self._train_loader: Loader | None = None
        self._place: dict[str, int] | None = None

    @classmethod
    def arguments_from(cls, hparams: object, given: Collection[str] | None = ()) -> dict[str, Any]:
        """Return the arguments that a checkpoint or an entry may choose: how inputs are made, and from which split.

        They are numbers and names. Where data lies is the user's choice. Arguments that this class lacks are dropped.

        Args:
            hparams: ``datamodule_hyper_parameters`` of a checkpoint, or ``init_args`` of an entry.
            given: Names of the arguments that the user gives; None if no data is read.

        Raises:
            ConfigurationError: If an argument is a path, which the user must give.
        """
        known, chosen = parameters_of(cls).keys() - OF_THE_MACHINE, {}
        for name, value in hparams.items() if isinstance(hparams, dict) else ():
            if name not in known or value is None:
                continue
            if _is_plain(value):
                chosen[name] = value
            elif given is not None and name not in given:
                raise ConfigurationError(
                    f"data.{name} must be given: it was {value!r} in training, which a file may not choose"
                )
        return chosen

    # What a data set defines

    @property
    def class_names(self) -> Sequence[str]:
        """Class names in the order of their numbers; no sample is read."""
        return list(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes; no sample is read."""
        return len(self.class_names)

    def list_part(self, part: Part) -> tuple[Sequence[str | Path], list[int]]:
        """Return the files of a part and their classes, or raise a ConfigurationError if they are not there."""
        return [], []

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, ...) and targets (N,) of a part."""
        raise NotImplementedError

    def read_unknown(self) -> tuple[Tensor, list[str]]:
        """Return the inputs (N, ...) in ``folder``, and a name for each."""
        raise NotImplementedError

    def open(self, part: Part | None) -> ArrayDataset | FileDataset:
        """Return the dataset of a part, or of the inputs to predict."""
        return ArrayDataset(*(self.read_unknown() if part is None else map(torch.as_tensor, self.read(part))))

    def prepare(self, inputs: Tensor) -> None:
        """Set ``mean``, ``std`` and whatever else ``transform`` needs from the training inputs, (N, ...)."""

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and of the validation samples in the training part."""
        classes = targets.dim() == 1 and not targets.is_floating_point()  # other targets are split as if of one class
        return stratified_split(targets if classes else torch.zeros(len(targets)), self.val_fraction, self.seed)

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Turn a batch as it is stored into float32 inputs of the network, augmented if ``training``."""
        raise NotImplementedError

    # What Lightning calls

    def check(self, stage: str) -> None:
        """Check the files that a stage needs, before any work.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ConfigurationError: If something is missing, empty or does not fit.
        """
        part = choose(STAGES, stage, "stage")
        if part is None and self.folder is None:
            if "folder" not in parameters_of(type(self)):
                raise ConfigurationError(f"{type(self).__name__} has no argument folder, which predict needs")
            raise ConfigurationError(f"folder is not given: predict needs a folder of {self.noun}, data.folder")
        if part is None and self.folder is not None and self.suffixes:
            list_files(self.folder, self.suffixes)
        elif part is not None and self.needs_root:
            self.check_root()
            self.list_part(part)

    def check_root(self) -> Path:
        """Return the folder of the data set, or raise a ConfigurationError if there is none."""
        if self.root is None or not self.root.is_dir():
            given = "is not given" if self.root is None else f"{str(self.root)!r} is not a folder"
            raise ConfigurationError(
                f"root {given}: {type(self).__name__} needs a folder with {self.layout}, --data.root of fit, validate, "
                f"test and predict, --root of other commands{self._download_hint}"
            )
        return self.root

    @property
    def _download_hint(self) -> str:
        return "" if self.archive is None else ", or fit --data.download true to download it there"

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs; by default the training and the test part, and ``folder`` if it is given."""
        for name in ("fit", "test", *(["predict"] * (self.folder is not None))) if stage is None else (stage,):
            part = choose(STAGES, name, "stage")
            if (part or "predict") not in self._datasets:
                self.check(name)
                self._load(part)

    def _load(self, part: Part | None) -> None:
        whole = self.open(part)
        if part == "train":
            assert isinstance(whole.targets, Tensor)
            whole.alternate = self.alternate
            train, val = self.split(whole.targets)
            self._datasets |= {"train": whole.select(train, training=True), "val": whole.select(val)}
        else:
            self._datasets[part or "predict"] = whole
        # All parts are normalised by the training inputs, unless a checkpoint has set the mean already.
        if type(self).prepare is not ArrayDataModule.prepare and "mean" not in vars(self):
            if "train" in self._datasets:
                held = self._datasets["train"]
                self.prepare(held.images[held.indices])
            else:
                self._load("train")

    def train_dataloader(self) -> Loader:
        """Shuffled batches; a last incomplete batch is dropped unless there is no other."""
        self._train_loader = self._loader("train")
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def val_dataloader(self) -> Loader | list[Any]:
        """Batches of the validation part; no loader if it is empty."""
        return self._loader("val") if len(self._ready("val")) else []

    def test_dataloader(self) -> Loader:
        """Batches of the test part."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """Batches to predict, with the names of the files."""
        return self._loader("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a batch as it is stored into normalised float32 inputs; without a Trainer it is that already."""
        return batch if (trainer := self._running) is None else self._finish(trainer.training, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the order of the training samples, and the place in it."""
        place = self._place if self._train_loader is None else self._train_loader.state_dict()
        return {"shuffle_seed": self._seed_of_shuffle(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the order of the training that is resumed, whatever the seed of this run.

        Lightning restores the place of a loader too, but not where a schedule has asked for the number of steps before.
        """
        self._shuffle_seed = check_integer("shuffle_seed of a checkpoint", state_dict["shuffle_seed"], 0)
        self._place = state_dict["place"]

    # Machinery

    def _seed_of_shuffle(self) -> int:
        if self._shuffle_seed is None:
            # Lightning's seed_everything leaves its seed there, for the processes that it starts and for samplers.
            self._shuffle_seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        return self._shuffle_seed

    def _path(self, name: str) -> Path | None:
        """Return a hyper-parameter as a path with its ``~`` expanded; a checkpoint keeps it as text."""
        if self.hparams.get(name) is None:
            return None
        self.hparams[name] = os.fspath(self.hparams[name])  # a pathlib.Path would not load with weights_only=True
        return Path(self.hparams[name]).expanduser()

    @property
    def _running(self) -> Trainer | None:
        """The Trainer, while it runs."""
        trainer = self.trainer
        return trainer if trainer is not None and trainer.state.status == TrainerStatus.RUNNING else None

    def _finish(self, training: bool, batch: Any) -> Any:
        inputs, *rest = batch
        return self.transform(inputs, training), *rest

    def _ready(self, name: str) -> Any:
        if name not in self._datasets:
            raise RuntimeError(f"the {name} part is not loaded: call prepare_data() and setup() first")
        return self._datasets[name]

    def _loader(self, name: str) -> Loader:
        dataset = self._ready(name)
        training = name == "train"
        devices, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        if training and (size := len(dataset)) and max(1, size // devices // self.batch_size) < self.min_batches:
            passes = -(-self.min_batches * self.batch_size * devices // size)
            dataset = dataset.select(torch.arange(size).repeat(passes), training=True)
        sampler = ShardSampler(dataset, devices, rank, training, self._seed_of_shuffle())
        if training:
            sampler.set_epoch(self._loaders)  # a Trainer sets the right one; else each loader is shuffled anew
            self._loaders += 1
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
            collate_fn=collate if self._running else partial(self._finish, training),
        )
