"""Recordings of event cameras as frames, from any data set of tonic."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_msnn.data.arrays import ArrayDataModule, NamedDataset
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.base import Part, stratified_split
from lightning_msnn.errors import ConfigurationError, check_integer, suggestion
from lightning_msnn.runs.checkpoints import write_whole

__all__ = ["EventFrames"]

logger = logging.getLogger(__name__)

#: Goes into the name of a cache file; raise it whenever the same events would give other frames.
CACHE_FORMAT = 1


#: Data sets of this package that are like those of tonic.
OWN = {"SaccadedDigits": "lightning_msnn.data.saccades.SaccadedDigits"}


def find_data_set(name: str) -> Any:
    """Return a data set's class by its name in ``tonic.datasets`` or :data:`OWN`, or by its import path.

    Raises:
        ConfigurationError: If tonic is not installed, or there is no such class with camera and classes.
    """
    try:
        import tonic.datasets as known  # an optional extra, and slow to import
    except ImportError as error:
        raise ConfigurationError(
            f"EventFrames needs tonic, and it cannot be imported ({error}): pip install 'lightning-msnn[events]'"
        ) from error
    module, _, last = OWN.get(name, name).rpartition(".")
    try:
        found = getattr(import_module(module) if module else known, last, None)
    except ImportError as error:
        raise ConfigurationError(f"cannot import the data set {name!r}: {error}") from error
    if not _is_camera(found):
        allowed = [*OWN, *(other for other in known.__all__ if _is_camera(getattr(known, other)))]
        raise ConfigurationError(
            f"unknown data set {name!r}: allowed are {', '.join(allowed)} and the import path of a class like these"
            f"{suggestion(name, allowed)}"
        )
    return found


def _is_camera(data_set: Any) -> bool:
    """Whether a class is a data set of an event camera with classes."""
    sensor = getattr(data_set, "sensor_size", None)
    return isinstance(sensor, tuple) and sensor[1] > 1 and hasattr(data_set, "classes")


class EventFrames(ArrayDataModule):
    """Events of a camera, counted in frames: ``(B, C, H, W)``, or ``(B, T, C, H, W)`` of several time steps.

    A recording is cut into ``time_steps`` parts of equal duration; the events of a part are counted by pixel and
    polarity (C = 2), at most 255, and a network sees ``log(1 + count)``, normalised by the mean and standard deviation
    of the training frames. With one time step all events are in one frame. Frames are counted once and kept on disk.

    Args:
        dataset: Name of a class in ``tonic.datasets``, such as ``DVSGesture``, ``CIFAR10DVS`` or ``NMNIST``,
            ``SaccadedDigits``, which needs no download, or the import path of one like these. Its train and test part
            are used; where it has only one part, a tenth of each class, always the same, is the test part.
        root: Folder of tonic's data sets, to which it downloads what is not there.
        time_steps: Frames of a recording.
        size: Height and width of the frames; neighbouring pixels are added up. By default those of the camera.
        shift: Most pixels that a training recording is moved to each side.
        flip: Probability that a training recording is mirrored.
        dataset_kwargs: Further arguments of the class.
        cache_dir: Folder for frames, by default ``lightning_msnn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        batch_size: Recordings a batch (on each device).
        val_fraction: Share of the training part that is split off for validation, in [0, 1).
        seed: Seed of that split.
        num_workers: Worker processes of each loader.

    Raises:
        ConfigurationError: If a value is not allowed, or tonic is not installed.
    """

    noun = "recordings"
    makes_root = True
    test_fraction: ClassVar[float] = 0.1
    test_seed: ClassVar[int] = 401843  # any constant; a change would let a published model see its test recordings

    def __init__(
        self,
        dataset: str = "NMNIST",
        root: str | None = None,
        time_steps: int = 1,
        size: int | None = None,
        shift: int = 2,
        flip: float = 0.0,
        dataset_kwargs: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        self._class = find_data_set(dataset)
        self.time_steps = check_integer("time_steps", time_steps, 1)
        width, height, self._polarities = self._class.sensor_size
        self._size = (height, width) if size is None else (check_integer("size", size, 8),) * 2
        if max(self._size[0] / height, self._size[1] / width) > 1:
            raise ConfigurationError(f"size must be at most {min(height, width)}, the camera's, not {size}")
        self.augment = BatchAugmentation(shift, flip)
        self.dataset_kwargs = dict(dataset_kwargs or {})
        self.save_hyperparameters()
        self.root, self.cache_dir = self._path("root"), self._path("cache_dir") or self._cache_root()

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their numbers."""
        return [str(name) for name in self._class.classes]

    @property
    def in_chans(self) -> int:
        """Polarities of the camera."""
        return int(self._polarities)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._size

    def check_part(self, part: Part | None) -> None:
        """Refuse to predict: tonic has no files without classes."""
        if part is None:
            raise ConfigurationError(
                "predict is not for EventFrames: tonic reads labelled recordings, which test takes"
            )

    def _open(self, part: Part) -> tuple[Any, Sequence[int]]:
        """The data set of tonic, and which of its recordings are a part."""
        official = "train" in signature(self._class.__init__).parameters
        arguments = {**self.dataset_kwargs, **({"train": part == "train"} if official else {})}
        try:
            data_set = self._class(save_to=str(self.root), **arguments)
        except Exception as error:  # of a download or an archive, whatever they raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(f"cannot open {self._class.__name__} in {str(self.root)!r}: {reason}") from error
        if not len(data_set):
            raise ConfigurationError(f"{self._class.__name__} has no recording in {str(self.root)!r}")
        if official:
            return data_set, range(len(data_set))
        rest, test = stratified_split(torch.tensor(data_set.targets), self.test_fraction, self.test_seed)
        return data_set, (test if part == "test" else rest).tolist()

    def prepare_data(self) -> None:
        """Download the data set if it is not there."""
        if self.root is None:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make the folder {str(self.root)!r}: {error.strerror}") from error
        self._open("train")

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Count the events of a part, uint8, (N, [T,] C, H, W), or take the frames that were kept."""
        data_set, chosen = self._open(part)
        path = self._cache_path(data_set, part)
        with contextlib.suppress(Exception):  # a cache that cannot be read is made again
            held = torch.load(str(path), weights_only=True, mmap=True)
            frames, targets = held["frames"], held["targets"]
            steps = () if self.time_steps == 1 else (self.time_steps,)
            shapes = (len(chosen), *steps, self.in_chans, *self._size), (len(chosen),)
            if (frames.shape, targets.shape) == shapes and (frames.dtype, targets.dtype) == (torch.uint8, torch.int64):
                return frames, targets
        logger.info("counting the events of the %s part of %s once", part, self._class.__name__)
        frames = torch.empty((len(chosen), self.time_steps, self.in_chans, *self._size), dtype=torch.uint8)
        targets = torch.empty(len(chosen), dtype=torch.int64)
        for row, index in enumerate(chosen):
            try:
                events, targets[row] = data_set[index]
                frames[row] = torch.from_numpy(self._count(events))
            except Exception as error:
                file = data_set.data[index] if len(data_set.data) > index else index
                raise ConfigurationError(f"cannot read the recording {str(file)!r}: {error or type(error)}") from error
        frames = frames[:, 0] if self.time_steps == 1 else frames
        try:
            write_whole({"frames": frames, "targets": targets}, path)
        except OSError as error:
            logger.warning("frames are not kept: the folder %s cannot be written (%s)", path.parent, error)
        return frames, targets

    def _count(self, events: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Frames (T, C, H, W) of the events of one recording."""
        frames = np.zeros((self.time_steps, self.in_chans, *self._size), np.int64)
        if not len(events):
            raise ValueError("it has no events")
        width, height, _ = self._class.sensor_size
        if min(events["x"].min(), events["y"].min()) < 0:
            raise ValueError("it has events to the left of the sensor or above it")
        x, y = (
            events[n].astype(np.int64) * s // of
            for n, s, of in zip("xy", self._size[::-1], (width, height), strict=True)
        )
        t = events["t"].astype(np.float64)
        step = (t - t.min()) / max(float(np.ptp(t)), 1.0) * self.time_steps
        np.add.at(frames, (step.astype(np.int64).clip(max=self.time_steps - 1), events["p"].astype(np.int64), y, x), 1)
        return frames.clip(max=255).astype(np.uint8)

    def _cache_path(self, data_set: Any, part: Part) -> Path:
        settings = (CACHE_FORMAT, self.time_steps, self._size, self.dataset_kwargs, part, len(data_set))
        digest = hashlib.sha256(repr(settings).encode())
        for file in data_set.data:
            if isinstance(file, str | os.PathLike) and os.path.isfile(file):
                status = os.stat(file)
                digest.update(f"{os.fspath(file)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return self.cache_dir / f"{self._class.__name__}-{part}-{digest.hexdigest()[:32]}.pt".lower()

    def prepare(self, inputs: Tensor) -> None:
        """Take mean and standard deviation of ``log(1 + count)`` by polarity."""
        self.mean, self.std = [], []
        for counts in inputs.unbind(-3):
            of_value = torch.bincount(counts.flatten(), minlength=256).double()
            value = torch.arange(256).double().log1p()
            mean = (of_value @ value / of_value.sum()).item()
            self.mean.append(mean)
            self.std.append(max((of_value @ (value - mean).square() / of_value.sum()).sqrt().item(), 1e-6))

    def read_unknown(self) -> NamedDataset:
        """Nothing can be read."""
        raise NotImplementedError

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Turn counts, uint8, (B, [T,] C, H, W), into normalised frames of that shape."""
        if training:
            inputs = self.augment(inputs.flatten(1, -3)).view(inputs.shape)
        mean, std = (torch.tensor(value, device=inputs.device).view(-1, 1, 1) for value in (self.mean, self.std))
        return (inputs.float().log1p() - mean) / std
