"""The data module that every data set derives from."""

import contextlib
import hashlib
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import AutoAugmentPolicy

from lightning_msnn.data.archives import Archive, download_and_extract_archive
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.datasets import ArrayDataset, FileDataset
from lightning_msnn.data.parts import ROOT_OPTIONS, PartDataModule
from lightning_msnn.data.reading import Listing, decode_files, list_classes, list_folder, normalise, scan, shorten
from lightning_msnn.errors import ConfigurationError, check_integer, choose
from lightning_msnn.runs.checkpoints import write_whole

__all__ = ["Archive", "ImageDataModule", "Part", "stratified_split"]


Part = Literal["train", "test"]

#: The part of the data set that each stage reads: validation is split off the training part.
STAGES: dict[str, Part | None] = {"fit": "train", "validate": "train", "test": "test", "predict": None}

#: Goes into the cache key; raise it whenever the same files would give other tensors.
CACHE_FORMAT = 2


#: Hyper-parameters of a data module that a checkpoint may choose, and the largest image that it may ask for.
PREPROCESSING = (
    "image_size",
    "batch_size",
    "val_fraction",
    "seed",
    "crop_padding",
    "flip",
    "policy",
    "erasing",
    "policy_groups",
    "train_sizes",
    *("mels", "frames", "aligned", "seconds", "splits", "test_speakers", "val_speaker"),
    *("length", "differences", "context", "horizon", "season", "columns", "test_fraction", "time_steps", "size"),
)
CHOSEN = ("problem", "source", "dataset")
"""Those that it may choose where they are plain names, and no paths."""
MADE = "SaccadedDigits"
"""The data set of events that is made; others are downloaded, to a folder that the user gives, and not without one."""
LARGEST_IMAGE = 4096


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into a training and a validation part, with the same share of each class.

    The validation part has ``round(fraction * N)`` images, or as near to it as these rules allow: each class keeps at
    least one training image, and each class of two or more images has at least one for validation. Shares of a class
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


def arguments_of_checkpoint(hparams: object, named: Collection[str] | None = ()) -> dict[str, Any]:
    """Return those of a data module's hyper-parameters that a file may choose: what is done to images, and no more.

    Which files are read and written, downloads and numbers of processes are the user's own choice.

    Args:
        hparams: ``datamodule_hyper_parameters`` of a checkpoint.
        named: Names of the arguments that the user gives. Of the rest none may say what data is read that the file may
            not choose, as it would be other data without it; None if none is read.

    Raises:
        ConfigurationError: If the images would be larger than 4096 x 4096, or the user must say what data to read.
    """
    hparams = hparams if isinstance(hparams, dict) else {}
    given = {name: value for name, value in hparams.items() if name in PREPROCESSING}
    for name in CHOSEN:
        value = hparams.get(name)
        if isinstance(value, str) and re.fullmatch(r"[\w-]+", value):
            if name != "dataset" or value == MADE or "root" in (named or ()):
                given[name] = value
        elif value is not None and named is not None and name not in named:
            raise ConfigurationError(
                f"data.{name} must be given: it was {value!r} in training, which a file may not choose"
            )
    size = given.get("image_size")
    if isinstance(size, int) and size > LARGEST_IMAGE:
        raise ConfigurationError(f"image_size of a checkpoint must be at most {LARGEST_IMAGE}, not {size}")
    return given


class ImageDataModule(PartDataModule):
    """Images decoded once to uint8 tensors, gathered, augmented and normalised a whole batch at a time.

    A data set is a subclass that states its classes, size, mean and standard deviation, and where its files lie if not
    in ``train/<class>/`` and ``test/<class>/``. The test part is read by the test loader alone; validation is split off
    the training part. Loaders give uint8 images (B, C, H, W) with int64 targets (B,), or with the paths of the files
    when predicting; ``on_after_batch_transfer`` turns them into normalised float32 on the device.

    Args:
        root: Folder of the data set.
        batch_size: Images a batch (on each device).
        image_size: Height and width of the images; images of another size are scaled by their shorter side, and their
            centre is taken. By default the data set's own size.
        val_fraction: Share of the training images that is split off for validation, in [0, 1), the same for each class.
        seed: Seed of that split.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        cache_dir: Folder for decoded data sets, by default ``lightning_msnn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        download: Download the data set to ``root`` if it is not there.
        folder: Folder of images to predict, its sub-folders included.
        pin_memory: Load into page-locked memory, which copies to a GPU faster; by default when CUDA is available.
        crop_padding: Rows and columns of zeros put around a training image before a crop of its own size; 0 is no crop.
        flip: Probability of a horizontal flip of a training image.
        policy: Augmentation policy of training images. ``autoaugment`` takes the policy learnt for the data set.
        erasing: Probability that a rectangle of a training image is replaced by the mean colour.
        policy_groups: Groups of a batch that get their own draw of the policy; more are nearer to the published policy
            and slower.
        train_sizes: Height and width that training images are scaled to once augmented, from an epoch on, such as
            ``{0: 24, 20: 32}``: smaller images early on make epochs cheaper. Before the first epoch named, and in
            validation and test, images have ``image_size``.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    #: Class names in the order of their numbers.
    classes: ClassVar[list[str]]
    #: Channels of an image: 1 (grey) or 3 (RGB).
    in_chans: ClassVar[int] = 3
    #: Height and width of the images unless the user asks for another.
    native_size: ClassVar[int]
    #: Mean and standard deviation of each channel of the training images, of values in [0, 1]; ImageNet's by default.
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)
    #: Data set whose learnt policy ``autoaugment`` applies.
    autoaugment: ClassVar[AutoAugmentPolicy] = AutoAugmentPolicy.IMAGENET
    #: What ``root`` must hold, for messages.
    layout: ClassVar[str] = "train/<class>/ and test/<class>/"
    #: Where the data set is downloaded from, if it can be, and what under ``root`` shows that it is there, beside the
    #: archive's own folder.
    archive: ClassVar[Archive | None] = None
    unpacked: ClassVar[tuple[str, ...]] = ("train", "test")
    #: Whether ``root`` must be given.
    needs_root: ClassVar[bool] = True

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        image_size: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        download: bool = False,
        folder: str | None = None,
        pin_memory: bool | None = None,
        crop_padding: int = 4,
        flip: float = 0.5,
        policy: Literal["none", "autoaugment", "randaugment"] = "none",
        erasing: float = 0.0,
        policy_groups: int = 16,
        train_sizes: dict[int, int] | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers, pin_memory)
        self.save_hyperparameters()
        self.root = self._path("root")
        self.folder = self._path("folder")
        self.cache_dir = self._path("cache_dir")
        self.image_size = self.native_size if image_size is None else check_integer("image_size", image_size, 1)
        self.download = download
        if download and self.needs_root and self.archive is None:
            raise ConfigurationError(
                f"download must be false: {self._title} has no download, put its images under root"
            )
        if check_integer("crop_padding", crop_padding, 0) >= self.image_size:
            allowed = f"smaller than the image size {self.image_size}"
            raise ConfigurationError(f"crop_padding must be {allowed}, not {crop_padding}")
        self.augment = BatchAugmentation(
            crop_padding, flip, policy, erasing, policy_groups, mean=self.mean, autoaugment=self.autoaugment
        )
        if not isinstance(train_sizes, Mapping | None):
            raise ConfigurationError(f"train_sizes must be sizes by the epoch, not {train_sizes!r}")
        self.train_sizes = {
            check_integer("an epoch of train_sizes", epoch, 0): check_integer(f"train_sizes[{epoch!r}]", size, 1)
            for epoch, size in (train_sizes or {}).items()
        }
        if (largest := max(self.image_size, *self.train_sizes.values(), 0)) > LARGEST_IMAGE:
            raise ConfigurationError(f"image_size and train_sizes must be at most {LARGEST_IMAGE}, not {largest}")
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        self._warned = False

    # What a data set may define

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their numbers; no image is decoded."""
        return list(self.classes)

    def _parts(self) -> list[Part]:
        """The parts that are prepared where no stage is known."""
        return ["train", "test"]

    def _part_folder(self, part: Part) -> Path:
        """The folder with a part's class folders."""
        return self._root_folder() / part

    def _list(self, part: Part) -> Listing:
        """The files of a part and their targets."""
        folder, other = self._part_folder(part), self._part_folder("test" if part == "train" else "train")
        if not folder.is_dir():
            raise ConfigurationError(
                f"there is no folder {str(folder)!r}: {self._title} needs {self.layout} under root{self._download_hint}"
            )
        listing = list_classes(folder, getattr(self, "classes", None))
        if other.is_dir() and (theirs := scan(other)[0]) and theirs != (ours := scan(folder)[0]):
            raise ConfigurationError(
                f"{str(folder)!r} and {str(other)!r} must have the same class folders, "
                f"and only one of them has {shorten(sorted(set(ours) ^ set(theirs)))}"
            )
        return listing

    def _decode(self, listing: Listing) -> tuple[Tensor, Tensor]:
        """The images (N, C, H, W) and targets (N,) of a part."""
        images = decode_files(listing.files, self.image_size, self.in_chans)
        return images, torch.tensor(listing.targets, dtype=torch.int64)

    def _dataset(self, part: Part) -> ArrayDataset | FileDataset:
        """The dataset of a whole part."""
        return self._open(part, self._list(part))

    def _open(self, part: Part, listing: Listing) -> ArrayDataset | FileDataset:
        """The dataset of listed files: from the cache, or decoded and put there."""
        path = self._cache_path(part, listing)
        held = self._memory.get(path.name) or self._load_cache(path)
        if held is None:
            rank_zero_info("decoding the %s part of %s once, for %s", part, self._title, path)
            held = self._decode(listing)
            self._save_cache(path, held)
            held = self._load_cache(path) or held  # the file's pages are shared by all processes
        self._memory[path.name] = held
        return ArrayDataset(*held)

    # What Lightning calls

    def check(self, stage: str) -> None:
        """Find what is wrong with the files and folders that a stage needs, without decoding an image.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ConfigurationError: If something is missing, empty or does not fit.
        """
        part = choose(STAGES, stage, "stage")
        place = self._cache_folder()
        if place.exists() and not place.is_dir():
            raise ConfigurationError(f"cache_dir {str(place)!r} is a file: a folder is needed")
        if part is None:
            if self.folder is None:
                raise ConfigurationError("folder is not given: predict needs a folder of images, data.folder")
            list_folder(self.folder)
        elif self.needs_root and not self._will_download():
            self._list(part)

    def prepare_data(self) -> None:
        """Download and decode what the trainer's stage needs, or everything if no trainer runs.

        Raises:
            ConfigurationError: If something is missing or cannot be read; nothing has been written then.
        """
        stages = self._stages()
        for stage in stages:
            self.check(stage)
        if any(STAGES[stage] for stage in stages) and self._will_download():
            self._download()
            for stage in stages:
                self.check(stage)
        for part in {part: None for stage in stages if (part := STAGES[stage])}:
            self._dataset(part)

    def setup(self, stage: str | None = None) -> None:
        """Load what a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; by default everything.
        """
        for name in self._stages() if stage is None else [stage]:
            part = choose(STAGES, name, "stage")
            if part == "train":
                dataset = self._dataset(part)
                train, val = stratified_split(dataset.targets, self.val_fraction, self.seed)
                self._datasets["train"] = dataset.select(train, training=True)
                self._datasets["val"] = dataset.select(val)
            elif part == "test":
                self._datasets["test"] = self._dataset(part)
            else:
                self.check("predict")
                assert self.folder is not None
                files = list_folder(self.folder)
                self._datasets["predict"] = FileDataset(files, None, self.image_size, self.in_chans)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment (when training) and normalise uint8 images on their device; float images pass unchanged."""
        images, labels = batch
        if images.dtype != torch.uint8:
            return batch
        size = self.image_size
        if self.trainer is not None and self.trainer.training:
            images = self.augment(images)
            size = self.train_size(self.trainer.current_epoch)
        images = images.float()
        if size != self.image_size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return normalise(images, self.mean, self.std), labels

    def train_size(self, epoch: int) -> int:
        """Height and width of the training images in an epoch, counted from 0."""
        begun = [first for first in self.train_sizes if first <= epoch]
        return self.train_sizes[max(begun)] if begun else self.image_size

    # Machinery

    @property
    def _title(self) -> str:
        return type(self).__name__

    @property
    def _download_hint(self) -> str:
        return "" if self.archive is None else ", or fit --data.download true to download it there"

    def _root_folder(self) -> Path:
        if self.root is None:
            raise ConfigurationError(
                f"root is not given: {self._title} needs a folder with {self.layout}, {ROOT_OPTIONS}"
            )
        if not self.root.is_dir():
            raise ConfigurationError(
                f"root {str(self.root)!r} is not a folder: "
                f"{self._title} needs one with {self.layout}{self._download_hint}"
            )
        return self.root

    def _will_download(self) -> bool:
        if not self.download or self.archive is None or self.root is None:
            return False
        if self.root.exists() and not self.root.is_dir():
            raise ConfigurationError(f"root {str(self.root)!r} is a file: a folder to download to is needed")
        return not any((self.root / name).exists() for name in (self.archive.folder, *self.unpacked))

    def _download(self) -> None:
        assert self.root is not None
        assert self.archive is not None
        root = self.root.absolute()
        # All happens in a temporary folder on the same disk, so that a failure or an interruption leaves nothing.
        anchor = next(place for place in (root, *root.parents) if place.exists())
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=anchor) as place:
                download_and_extract_archive(self.archive, place)
                root.mkdir(parents=True, exist_ok=True)
                os.replace(os.path.join(place, self.archive.folder), root / self.archive.folder)
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise ConfigurationError(
                f"cannot download {self.archive.url} (MD5 {self.archive.md5}) to {str(root)!r}: {error}"
            ) from error

    def _stages(self) -> list[str]:
        running = self.trainer.state.fn if self.trainer is not None else None
        if running is not None:
            return [running.value]
        stages = []
        if self.root is not None or not self.needs_root or self.folder is None:
            stages = ["fit" if part == "train" else part for part in self._parts()]
        return stages if self.folder is None else [*stages, "predict"]

    def _cache_folder(self) -> Path:
        return self._cache_root() if self.cache_dir is None else self.cache_dir

    def _cache_path(self, part: Part, listing: Listing) -> Path:
        settings = (CACHE_FORMAT, self._title, part, self.in_chans, self.image_size)
        digest = hashlib.sha256(repr(settings).encode())
        prefix = str(listing.root)
        for file in listing.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise ConfigurationError(f"cannot read the file {file!r}: {error.strerror}") from error
            digest.update(os.fsencode(file.removeprefix(prefix)))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(np.asarray(listing.targets, dtype=np.int64).tobytes())
        return self._cache_folder() / f"{self._title}-{part}-{self.image_size}-{digest.hexdigest()[:32]}.pt".lower()

    def _load_cache(self, path: Path) -> tuple[Tensor, Tensor] | None:
        try:
            held = torch.load(str(path), weights_only=True, mmap=True)
            images, targets = held["images"], held["targets"]
            shape = (len(targets), self.in_chans, self.image_size, self.image_size)
            if images.shape != shape or images.dtype != torch.uint8 or targets.dtype != torch.int64:
                raise ValueError("unexpected tensors")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # torch.load raises what it pleases when a file is damaged
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            rank_zero_warn(f"the cache file {str(path)!r} cannot be used ({reason}) and is made again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return images, targets

    def _save_cache(self, path: Path, held: tuple[Tensor, Tensor]) -> None:
        try:
            write_whole({"images": held[0], "targets": held[1]}, path)
        except OSError as error:
            if not self._warned:
                rank_zero_warn(
                    f"the cache folder {str(path.parent)!r} cannot be written ({error.strerror}), "
                    "so decoded images stay in memory and are decoded again next time"
                )
            self._warned = True
