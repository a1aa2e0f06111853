"""Recordings of event cameras as frames, from any data set of tonic."""

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_msnn.data.arrays import ArrayDataModule
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.parts import Part, stratified_split
from lightning_msnn.errors import ConfigurationError, check_integer, choose

__all__ = ["EventFrames"]


def find_data_set(name: str) -> Any:
    """Return a data set's class by its name in ``tonic.datasets``.

    Raises:
        ConfigurationError: If tonic is not installed, or has no such data set of a camera.
    """
    try:
        import tonic.datasets as known  # an optional extra, and slow to import
    except ImportError as error:
        raise ConfigurationError(
            f"EventFrames needs tonic, and it cannot be imported ({error}): pip install 'lightning-msnn[events]'"
        ) from error
    with_classes = [kind for name in known.__all__ if hasattr(kind := getattr(known, name), "classes")]
    heights = {kind.__name__: (getattr(kind, "sensor_size", None) or (0, 0))[1] for kind in with_classes}
    return choose({kind.__name__: kind for kind in with_classes if heights[kind.__name__] > 1}, name, "data set")


class EventFrames(ArrayDataModule):
    """Events of a camera, counted in frames ``(B, C, H, W)``.

    A recording is cut into ``frames`` parts of equal duration. The events of each are counted by pixel and polarity, at
    most 255, and all frames are stacked as channels: ``C = 2 * frames``. A network sees ``log(1 + count)``, normalised
    by the mean and standard deviation of the training frames. Frames are counted at the start.

    Args:
        dataset: Name of a class in ``tonic.datasets``, such as ``DVSGesture``, ``CIFAR10DVS`` or ``NMNIST``. Of one
            that has no test part, a tenth of each class, always the same, is the test part.
        root: Folder of tonic's data sets, to which it downloads what is not there.
        frames: Frames of a recording.
        size: Height and width of the frames; neighbouring pixels are added up. By default those of the camera.
        shift: Most pixels that a training recording is moved to each side.
        flip: Probability that a training recording is mirrored.
        batch_size: Recordings a batch (on each device).
        **kwargs: Arguments of :class:`~lightning_msnn.data.parts.PartDataModule`.

    Raises:
        ConfigurationError: If a value is not allowed, or tonic is not installed.
    """

    noun = "recordings"
    test_fraction: ClassVar[float] = 0.1
    test_seed: ClassVar[int] = 401843  # any constant; a change would let a published model see its test recordings

    def __init__(
        self,
        dataset: str = "NMNIST",
        root: str | None = None,
        frames: int = 1,
        size: int | None = None,
        shift: int = 2,
        flip: float = 0.0,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self._class = find_data_set(dataset)
        width, height, self._polarities = self._class.sensor_size
        self.frames = check_integer("frames", frames, 1)
        self._size = (height, width) if size is None else (check_integer("size", size, 8),) * 2
        if self._size[0] > height or self._size[1] > width:
            raise ConfigurationError(f"size must be at most {min(height, width)}, the camera's, not {size}")
        self.augment = BatchAugmentation(shift, flip)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their numbers."""
        return [str(name) for name in self._class.classes]

    @property
    def in_chans(self) -> int:
        """Polarities of the camera, for each frame."""
        return int(self._polarities) * self.frames

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._size

    def _will_download(self) -> bool:
        return self.root is not None and not self.root.exists()

    def prepare_data(self) -> None:
        """Download the data set if it is not there."""
        self._recordings("train")

    def _recordings(self, part: Part) -> tuple[Any, list[int]]:
        """The data set of tonic, and which of its recordings are a part."""
        official = "train" in signature(self._class.__init__).parameters
        data_set = self._class(save_to=str(self.root), **({"train": part == "train"} if official else {}))
        if official:
            return data_set, list(range(len(data_set)))
        rest, test = stratified_split(torch.tensor(data_set.targets), self.test_fraction, self.test_seed)
        return data_set, (test if part == "test" else rest).tolist()

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Count the events of a part, uint8, (N, C, H, W)."""
        from tonic.transforms import Downsample, ToFrame

        data_set, chosen = self._recordings(part)
        camera, target = self._class.sensor_size, self._size[::-1]
        shrink = Downsample(sensor_size=camera, target_size=target)
        to_frames = ToFrame(sensor_size=(*target, self._polarities), n_time_bins=self.frames)
        counted = torch.empty((len(chosen), self.in_chans, *self._size), dtype=torch.uint8)
        targets = torch.empty(len(chosen), dtype=torch.int64)
        for row, index in enumerate(chosen):
            events, targets[row] = data_set[index]
            counted[row] = torch.from_numpy(to_frames(shrink(events))).clamp(max=255).flatten(0, 1)
        return counted, targets

    def prepare(self, inputs: Tensor) -> None:
        """Take mean and standard deviation of ``log(1 + count)`` by channel."""
        value = torch.arange(256).double().log1p()
        of_value = torch.stack([torch.bincount(x.flatten(), minlength=256) for x in inputs.unbind(1)]).double()
        share = of_value / of_value.sum(1, keepdim=True)
        mean = share @ value
        std = (share * (value - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-6)
        self.mean, self.std = mean.tolist(), std.tolist()

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Turn counts, uint8, (B, C, H, W), into normalised frames of that shape."""
        if training:
            inputs = self.augment(inputs)
        mean, std = (torch.tensor(value, device=inputs.device).view(-1, 1, 1) for value in (self.mean, self.std))
        return (inputs.float().log1p() - mean) / std
