"""Speech Commands."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_msnn.data.arrays import Part
from lightning_msnn.data.audio import AudioDataModule
from lightning_msnn.data.reading import list_files, read_lines
from lightning_msnn.errors import ConfigurationError

__all__ = ["SpeechCommands"]


class SpeechCommands(AudioDataModule):
    """105,829 recordings of 35 words, 16 kHz, one second each (version 2).

    Source: P. Warden, Speech Commands, arXiv 1804.03209, CC BY 4.0. ``root`` holds a folder for each word and the lists
    ``validation_list.txt`` and ``testing_list.txt``, the official validation and test parts; the rest is the training
    part. A recording takes 32 kB of memory. ``val_fraction`` has no effect.

    Args:
        frames: Width of a map.
        seconds: Length of a recording.
        **kwargs: Arguments of :class:`~lightning_msnn.data.audio.AudioDataModule`.
    """

    classes: ClassVar[list[str]] = [
        "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
        "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
        "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
    ]  # fmt: skip
    rate = 16000

    def __init__(self, *, frames: int = 48, seconds: float = 1.0, **kwargs: Any) -> None:
        super().__init__(frames=frames, seconds=seconds, **kwargs)

    def _official(self, name: str) -> list[str]:
        assert self.root is not None
        file = self.root / f"{name}_list.txt"
        lines = sorted(read_lines(file))
        for line in lines:
            if line.partition("/")[0] not in self.classes or not (self.root / line).is_file():
                raise ConfigurationError(f"{str(file)!r} names {line!r}, which is not a recording beside it")
        return lines

    def list_part(self, part: Part) -> tuple[list[Path], list[int]]:
        """Return the files of a part and their words; the validation part comes last."""
        root = self.check_root()
        names = self._official("testing")
        if part == "train":
            validating = self._official("validation")
            every = [f"{word}/{Path(f).name}" for word in self.classes for f in list_files(root / word, self.suffixes)]
            names = [*sorted(set(every).difference(names, validating)), *validating]
        return [root / name for name in names], [self.classes.index(name.partition("/")[0]) for name in names]

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Split off the official validation part."""
        indices = torch.arange(len(targets))
        first = len(targets) - len(self._official("validation"))
        return indices[:first], indices[first:]
