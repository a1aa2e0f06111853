"""Time series to classify, in the .ts format of the UCR and UEA archives."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_msnn.data.arrays import ArrayDataModule, list_files
from lightning_msnn.data.parts import Part
from lightning_msnn.errors import ConfigurationError, check_integer, check_number

__all__ = ["TimeSeries", "read_ts", "warp_series"]

LEAST = 4
"""Values of the shortest series that can be cut into four windows."""

Series = list[npt.NDArray[np.float64]]


def read_ts(file: Path) -> tuple[Series, list[str], list[str]]:
    """Read a .ts file, without time stamps.

    Returns:
        Series (C, L) of any lengths, the class of each, and the classes in the order of the header; no classes where
        the header says that there are none.

    Raises:
        ConfigurationError: If it cannot be read, has no series, or a missing value.
    """
    try:
        head, _, body = file.read_text(encoding="utf-8").partition("@data")
        header = {words[0].lower(): words[1:] for line in head.splitlines() if (words := line.split())}
        labelled, *classes = header.get("@classlabel", ["false"])
        series, labels = [], []
        for line in filter(None, map(str.strip, body.splitlines())):
            channels = line.split(":")
            if labelled.lower() == "true":
                labels.append(channels.pop().strip())
            series.append(np.array([channel.split(",") for channel in channels], dtype=np.float64))
        if not series or not all(np.isfinite(values).all() for values in series):
            raise ValueError("it has no series, or one with missing values: fill them")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the series in {str(file)!r}: {error}") from error
    return series, labels, classes


def warp_series(series: Tensor, warp: float, crop: float) -> Tensor:
    """Play series ``(B, C, 1, L)`` unevenly and cut their ends, each by a draw of its own from torch's CPU generator.

    Time warping and window slicing (Iwana and Uchida, arXiv 2007.15951); lengths stay as they are.

    Args:
        series: ``(B, C, 1, L)``.
        warp: Standard deviation of the logarithm of the speed, at five places; between them it is linear.
        crop: Largest share of a series that is cut off, at both ends together.
    """
    batch, size = len(series), series.shape[3]
    share = torch.linspace(0, 1, size, device=series.device).expand(batch, size)
    speeds = torch.exp(warp * torch.randn(batch, 5)).to(series.device)
    speed = _between(speeds.unsqueeze(1), 4 * share).squeeze(1) * (share < 1)
    time = speed.cumsum(1) - speed
    time = time / time.amax(1, keepdim=True)
    cut, begin = (crop * torch.rand(batch, 1)).to(series.device), torch.rand(batch, 1).to(series.device)
    places = (begin * cut + (1 - cut) * time).clamp(0, 1) * (size - 1)
    return _between(series.squeeze(2), places).unsqueeze(2)


def _between(values: Tensor, places: Tensor) -> Tensor:
    """Values ``(B, C, N)`` at places ``(B, L)`` from 0 to N - 1, linear between two."""
    low = places.long().clamp(max=values.shape[2] - 1)
    high = (low + 1).clamp(max=values.shape[2] - 1)
    share = (places - low).unsqueeze(1)
    low, high = (index.unsqueeze(1).expand(-1, values.shape[1], -1) for index in (low, high))
    return torch.lerp(values.gather(2, low), values.gather(2, high), share.to(values.dtype))


def aeon_folder() -> Path:
    """Return the folder of the series that aeon's wheel ships.

    Raises:
        ConfigurationError: If aeon is not installed.
    """
    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "root is not given, and aeon, which ships series, is not installed: "
            "pip install 'lightning-msnn[time-series]'"
        )
    return Path(spec.origin).parent / "datasets" / "data"


class TimeSeries(ArrayDataModule):
    """Labelled series ``(B, C, 1, L)``: maps of one row, one channel for each variable.

    Files are ``<problem>_TRAIN.ts`` and ``<problem>_TEST.ts``, the official split, in ``root/<problem>/`` or ``root``.
    Where lengths differ, all series are stretched to one length, so that each window meets the same share of every
    series, and a last channel says how long each was, as a share of that. Each channel is normalised by mean and
    standard deviation of the series that are trained on.

    Args:
        problem: Name of the problem.
        root: Folder of the files; by default that of the series that aeon's wheel ships (ArrowHead, BasicMotions,
            ItalyPowerDemand, JapaneseVowels and others).
        folder: A .ts file to predict, or a folder of them.
        length: Values of a series in the network; by default those of the longest that is trained on.
        noise: Standard deviation of the noise that a training series gets, as a multiple of its channel's.
        scale: Largest share by which a training series is stretched or shrunk in value.
        warp: Standard deviation of the logarithm of the speed that a training series is played at
            (:func:`~lightning_msnn.data.time_series.warp_series`).
        crop: Largest share of a training series that is cut off, in [0, 1); the rest is stretched to its length.
        differences: Whether the central differences of each variable follow the variables as channels of their own, in
            which small notches are as large as anything (as in MultiRocket, arXiv 2102.00457).
        batch_size: Series a batch (on each device).
        **kwargs: Arguments of :class:`~lightning_msnn.data.parts.PartDataModule`.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    noun = "series"
    needs_root: ClassVar[bool] = False

    def __init__(
        self,
        problem: str = "JapaneseVowels",
        root: str | None = None,
        folder: str | None = None,
        length: int | None = None,
        noise: float = 0.1,
        scale: float = 0.2,
        warp: float = 0.3,
        crop: float = 0.2,
        differences: bool = False,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        if not re.fullmatch(r"[\w-]+", problem):
            raise ConfigurationError(f"problem must be a name of letters, digits, '_' and '-', not {problem!r}")
        self.problem, self.differences = problem, differences
        self.length = None if length is None else check_integer("length", length, LEAST)
        self.noise, self.scale = check_number("noise", noise), check_number("scale", scale)
        self.warp, self.crop = check_number("warp", warp), check_number("crop", crop, below_one=True)
        self._read = cache(read_ts)

    def _file(self, part: Part) -> Path:
        root = aeon_folder() if self.root is None else self.root
        name = f"{self.problem}_{part.upper()}.ts"
        files = [file for file in (root / self.problem / name, root / name) if file.is_file()]
        if not files:
            there = sorted({file.name.removesuffix("_TRAIN.ts") for file in root.rglob("*_TRAIN.ts")})
            raise ConfigurationError(
                f"there is no file {name!r} in {str(root)!r}: problems there are {', '.join(there) or 'none'}"
            )
        return files[0]

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the file's header."""
        return self._read(self._file("train"))[2]

    @property
    def _variables(self) -> int:
        """Channels that have values: the variables, and their differences."""
        return len(self._read(self._file("train"))[0][0]) * (1 + self.differences)

    @property
    def in_chans(self) -> int:
        """Variables of a series, their differences, and the channel of its length where lengths differ."""
        return self._variables + (len({series.shape[1] for series in self._read(self._file("train"))[0]}) > 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """One row of as many values as a series has."""
        file = self._file("train")
        longest = self.length or max(series.shape[1] for series in self._read(file)[0])
        if longest < LEAST:
            raise ConfigurationError(
                f"the series in {str(file)!r} have {longest} values, and at least {LEAST} are needed for four windows"
            )
        return 1, longest

    def check_part(self, part: Part | None) -> None:
        """Read the files of a part, which are small."""
        files = [self._file("train"), *([self._file("test")] if part == "test" else [])]
        if part is None and self.folder is not None:
            files += list_files(self.folder, ".ts")
        variables = len(self._read(files[0])[0][0])
        for file in files:
            if (found := len(self._read(file)[0][0])) != variables:
                raise ConfigurationError(
                    f"the series in {str(file)!r} have {found} variables, and those of training {variables}"
                )
        labels = {label for file in files if part is not None for label in self._read(file)[1]}
        if part is not None and (not labels or not labels <= set(self.class_names)):
            allowed = ", ".join(self.class_names) or "no classes"
            raise ConfigurationError(f"{str(files[-1])!r} has classes {sorted(labels)}, and its header names {allowed}")
        _ = self.image_size

    def _laid_out(self, series: Series) -> Tensor:
        """Series (N, C, 1, L), stretched, with a channel of lengths if they differ."""
        length = self.image_size[1]
        rows = np.empty((len(series), self.in_chans, 1, length))
        for row, values in zip(rows, series, strict=True):
            if self.differences:
                flat = values.shape[1] == 1
                values = np.concatenate([values, np.zeros_like(values) if flat else np.gradient(values, axis=1)])
            size = values.shape[1]
            places = np.linspace(0, size - 1, length)
            row[: len(values), 0] = [np.interp(places, range(size), value) for value in values]
            row[len(values) :] = size / length
        return torch.from_numpy(rows).float()

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the series of a part, with their lengths if they differ, and their classes."""
        series, labels, _ = self._read(self._file(part))
        return self._laid_out(series), torch.tensor([self.class_names.index(label) for label in labels])

    def read_unknown(self) -> tuple[Tensor, list[str]]:
        """Read what is to be predicted: each series is named by its file and number."""
        assert self.folder is not None
        files = list_files(self.folder, ".ts")
        every = [(values, f"{file}:{n}") for file in files for n, values in enumerate(self._read(file)[0], 1)]
        return self._laid_out([values for values, _ in every]), [name for _, name in every]

    def prepare(self, inputs: Tensor) -> None:
        """Take mean and standard deviation of each variable, and the length; the last channel stays as it is."""
        self.hparams["length"] = self.length = self.image_size[1]
        values = inputs[:, : self._variables].double().transpose(0, 1).flatten(1)
        std = values.std(1, correction=0)
        std = torch.where(std > 0, std, 1.0)  # of a constant, whatever its units
        more = self.in_chans - self._variables
        self.mean, self.std = [*values.mean(1).tolist(), *[0.0] * more], [*std.tolist(), *[1.0] * more]

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Normalise series (B, C, 1, L), played unevenly, scaled and mixed with noise if ``training``."""
        if training and (self.warp or self.crop):
            inputs = warp_series(inputs, self.warp, self.crop)
        mean, std = (torch.tensor(x, device=inputs.device).view(-1, 1, 1) for x in (self.mean, self.std))
        inputs = (inputs - mean) / std
        if training:
            values = inputs[:, : self._variables]
            factor = 1 + self.scale * (2 * torch.rand(len(values), 1, 1, 1) - 1)
            noise = self.noise * torch.randn(values.shape)
            values = values * factor.to(values.device) + noise.to(values.device)
            inputs = torch.cat([values, inputs[:, self._variables :]], 1)
        return inputs
