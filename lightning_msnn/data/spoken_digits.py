"""The Free Spoken Digit Dataset."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_msnn.data.arrays import Part
from lightning_msnn.data.audio import AudioDataModule
from lightning_msnn.data.reading import list_files
from lightning_msnn.errors import ConfigurationError, choose

__all__ = ["SpokenDigits"]

NAME = re.compile(r"(\d)_([^_]+)_(\d+)")


class SpokenDigits(AudioDataModule):
    """3,000 recordings of spoken digits, 8 kHz, by six speakers, 50 of each digit and speaker.

    Source: Z. Jackson and others, Free Spoken Digit Dataset, CC BY-SA 4.0. ``root`` holds files
    ``<digit>_<speaker>_<index>.wav``, in ``recordings/`` or itself. Two splits:

    - ``recordings``, the data set's own: indices 0 to 4 are the test part; validation is split off the rest.
    - ``speakers``: some speakers are the test part, another is for validation, and the others are the training part.

    Args:
        splits: ``recordings`` or ``speakers``.
        test_speakers: Speakers of the test part of ``speakers``.
        val_speaker: Speaker for validation in ``speakers``.
        **kwargs: Arguments of :class:`~lightning_msnn.data.audio.AudioDataModule`.
    """

    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]
    rate = 8000

    def __init__(
        self,
        splits: Literal["recordings", "speakers"] = "recordings",
        test_speakers: tuple[str, ...] = ("theo", "yweweler"),
        val_speaker: str = "nicolas",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        choose(dict.fromkeys(("recordings", "speakers")), splits, "split")
        self.splits, self.test_speakers, self.val_speaker = splits, tuple(test_speakers), val_speaker
        if val_speaker in self.test_speakers:
            raise ConfigurationError(f"val_speaker must not be one of test_speakers, and {val_speaker!r} is")

    def _recordings(self, part: Part) -> list[tuple[Path, int, str]]:
        """Files of a part with digit and speaker."""
        assert self.root is not None
        inner = self.root / "recordings"
        files = map(Path, list_files(inner if inner.is_dir() else self.root, self.suffixes))
        found = {file: NAME.fullmatch(file.stem) for file in files}
        chosen = []
        for file, match in found.items():
            if match is None:
                raise ConfigurationError(f"{str(file)!r} must be named <digit>_<speaker>_<index>.wav")
            of_test = match[2] in self.test_speakers if self.splits == "speakers" else int(match[3]) < 5
            if of_test == (part == "test"):
                chosen.append((file, int(match[1]), match[2]))
        known = sorted({match[2] for match in found.values() if match is not None})
        if self.splits == "speakers" and (unknown := {*self.test_speakers, self.val_speaker} - {*known}):
            raise ConfigurationError(
                f"unknown speaker {min(unknown)!r}: those in {str(self.root)!r} are {', '.join(known)}"
            )
        if not chosen:
            raise ConfigurationError(f"{str(self.root)!r} has no recording of the {part} part of {self.splits!r}")
        return chosen

    def list_part(self, part: Part) -> tuple[list[Path], list[int]]:
        """Return the files of a part and their digits."""
        chosen = self._recordings(part)
        return [file for file, _, _ in chosen], [digit for _, digit, _ in chosen]

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Split off a share of each digit, or the speaker for validation."""
        if self.splits == "recordings":
            return super().split(targets)
        validates = torch.tensor([speaker == self.val_speaker for _, _, speaker in self._recordings("train")])
        return (~validates).nonzero().flatten(), validates.nonzero().flatten()
