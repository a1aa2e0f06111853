"""Time series to classify, in the .ts format of the UCR and UEA archives."""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_msnn.data.arrays import ArrayDataModule, NamedDataset, aeon_folder, list_files
from lightning_msnn.data.base import Part
from lightning_msnn.errors import ConfigurationError, check_integer, check_number

__all__ = ["TimeSeries", "read_ts", "warp_series"]

LEAST = 4
"""Values of the shortest series that can be cut into four windows."""

_LARGEST, _FINEST = 1e30, 1e-5
"""Largest value of a series, and the smallest range of a channel as a share of that."""

Series = list[npt.NDArray[np.float64]]


def read_ts(file: Path) -> tuple[Series, list[str], list[str]]:
    """Read a .ts file with aeon's reader.

    Returns:
        Series (C, L) of any lengths, the class of each, and the classes in the order of the header; no classes where
        the header says that there are none.

    Raises:
        ConfigurationError: If aeon is not installed, or the file cannot be read, has no series or a missing value, or
            values that float32 cannot hold.
    """
    aeon_folder()
    from aeon.datasets import load_from_ts_file  # an optional extra, and slow to import

    try:
        series, labels, header = load_from_ts_file(str(file), return_meta_data=True)
    except Exception as error:  # the reader raises what it pleases where a file is damaged
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"cannot read the series in {str(file)!r}: {reason}") from error
    if not len(series):
        raise ConfigurationError(f"{str(file)!r} must hold series, and has none")
    for number, values in enumerate(series, 1):
        if not np.isfinite(values).all():
            channel, place = np.argwhere(~np.isfinite(values))[0] + 1
            raise ConfigurationError(
                f"series {number} in {str(file)!r} has no finite number at place {place} of channel {channel}: fill it"
            )
    for channel in range(len(series[0])):
        low, high = min(float(x[channel].min()) for x in series), max(float(x[channel].max()) for x in series)
        largest = max(abs(low), abs(high))
        if largest > _LARGEST or 0 < high - low < largest * _FINEST:
            raise ConfigurationError(
                f"channel {channel + 1} of {str(file)!r} has values from {low!r} to {high!r}, which float32 cannot "
                "hold apart: give other units, or subtract an offset"
            )
    return list(series), labels.tolist(), header["class_values"] or sorted(set(labels.tolist()))


def warp_series(series: Tensor, warp: float, crop: float) -> Tensor:
    """Play series unevenly and from a later to an earlier end, each by a draw of its own from torch's CPU generator.

    Time warping and window slicing of augmentations (Iwana and Uchida, arXiv 2007.15951); lengths stay as they are, and
    values between two are interpolated.

    Args:
        series: ``(B, C, 1, L)``, NaN after the end of a shorter one.
        warp: Standard deviation of the logarithm of the speed, at five places; between them it is linear.
        crop: Largest share of a series that is cut off, at both ends together; the draw is uniform.
    """
    batch, channels, _, size = series.shape
    there = ~series[:, 0, 0].isnan()
    last = there.sum(1, keepdim=True) - 1
    share = torch.arange(size, device=series.device) / last.clamp(min=1)
    speeds = torch.exp(warp * torch.randn(batch, 5)).to(series.device)
    speed = _between(speeds.unsqueeze(1), 4 * share.clamp(max=1)).squeeze(1) * (share < 1)
    time = speed.cumsum(1) - speed
    time = time / (time + speed).amax(1, keepdim=True).clamp(min=1e-6)
    cut, begin = (crop * torch.rand(batch, 1)).to(series.device), torch.rand(batch, 1).to(series.device)
    places = (begin * cut + (1 - cut) * time).clamp(0, 1) * last
    played = _between(series.squeeze(2), places).masked_fill(~there.unsqueeze(1), torch.nan)
    return played.view(batch, channels, 1, size)


def _between(values: Tensor, places: Tensor) -> Tensor:
    """Values ``(B, C, N)`` at places ``(B, L)`` from 0 to N - 1, linear between two."""
    low = places.long().clamp(max=values.shape[2] - 1)
    high = (low + 1).clamp(max=values.shape[2] - 1)
    share = (places - low).unsqueeze(1)
    low, high = (index.unsqueeze(1).expand(-1, values.shape[1], -1) for index in (low, high))
    first, second = values.gather(2, low), values.gather(2, high)
    return torch.where(share == 0, first, first + share * (second - first))  # a NaN behind the end times 0 is one


def _differences(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Central differences of series (C, L), one-sided at both ends; 0 of a single value."""
    return np.zeros_like(values) if values.shape[1] == 1 else np.gradient(values, axis=1)


class TimeSeries(ArrayDataModule):
    """Labelled series ``(B, C, 1, L)``: maps of one row, one channel for each variable.

    Files are ``<problem>_TRAIN.ts`` and ``<problem>_TEST.ts``, the official split, in ``root/<problem>/`` or ``root``.
    Where lengths differ, all series are stretched to one length, and a last channel says how long each was, as a share
    of that; or they are padded with zeros, and the last channel is a mask, 1 where there are values. Each channel is
    normalised by mean and standard deviation of the series that are trained on. With ``differences`` a second channel
    of each variable says how fast it changes: the shape of small notches, which the values alone show little of.

    Args:
        problem: Name of the problem.
        root: Folder of the files; by default that of the series that aeon's wheel ships (ArrowHead, BasicMotions,
            ItalyPowerDemand, JapaneseVowels and others).
        folder: A .ts file to predict, or a folder of them.
        length: Values of a series in the network; by default those of the longest that is trained on.
        aligned: Whether series of other lengths are stretched to that one, so that each window meets the same share of
            every series; else shorter ones are padded, and longer ones cut off.
        noise: Standard deviation of the noise that a training series gets, as a multiple of its channel's.
        scale: Largest share by which a training series is stretched or shrunk in value.
        warp: Standard deviation of the logarithm of the speed that a training series is played at
            (:func:`~lightning_msnn.data.time_series.warp_series`).
        crop: Largest share of a training series that is cut off, in [0, 1); the rest is stretched to its length.
        batch_size: Series a batch (on each device).
        val_fraction: Share of the training part that is split off for validation, in [0, 1).
        seed: Seed of that split.
        num_workers: Worker processes of each loader.
        min_batches: Batches of an epoch, at least: a smaller training part is met several times in one, each time
            augmented anew, so that validations and checkpoints are not all that a training does.
        differences: Whether the central differences of each variable follow the variables as channels of their own;
            they are taken of the file's values (MultiRocket reads series so too, arXiv 2102.00457).

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
        aligned: bool = True,
        noise: float = 0.1,
        scale: float = 0.2,
        warp: float = 0.3,
        crop: float = 0.2,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        min_batches: int = 1,
        differences: bool = False,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers, min_batches=min_batches)
        if not re.fullmatch(r"[\w-]+", problem):
            raise ConfigurationError(f"problem must be a name of letters, digits, '_' and '-', not {problem!r}")
        self.problem = problem
        self.length = None if length is None else check_integer("length", length, LEAST)
        self.aligned, self.differences = aligned, differences
        self.noise, self.scale = check_number("noise", noise), check_number("scale", scale)
        self.warp, self.crop = check_number("warp", warp), check_number("crop", crop, below_one=True)
        self._held: dict[Path, Any] = {}
        self.save_hyperparameters()
        self.root, self.folder = self._path("root"), self._path("folder")

    def _read(self, file: Path) -> tuple[Series, list[str], list[str]]:
        if file not in self._held:
            self._held[file] = read_ts(file)
        found: tuple[Series, list[str], list[str]] = self._held[file]
        return found

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
    def _uneven(self) -> bool:
        """Whether series differ in length, so that there is a channel more."""
        return len({series.shape[1] for series in self._read(self._file("train"))[0]}) > 1

    @property
    def _variables(self) -> int:
        """Channels that have values: the variables, and their differences."""
        return len(self._read(self._file("train"))[0][0]) * (1 + self.differences)

    @property
    def in_chans(self) -> int:
        """Variables of a series, their differences, and the channel of its length or mask if there is one."""
        return self._variables + self._uneven

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
        """Read the file of a part, which is small."""
        if part is None and self.folder is None:
            raise ConfigurationError("folder is not given: predict needs a .ts file or a folder of them, data.folder")
        files = [self._file("train"), *([self._file("test")] if part == "test" else [])]
        if self.folder is not None and part is None:
            files += list_files(self.folder, ".ts")
        for file in files if part == "test" else files[:1]:
            if not self._read(file)[1]:
                raise ConfigurationError(f"{str(file)!r} must hold series with class labels, and has none")
        variables = {file: len(self._read(file)[0][0]) for file in files}
        for file, number in variables.items():
            if number != variables[files[0]]:
                raise ConfigurationError(
                    f"the series in {str(file)!r} have {number} variables, and those of training {variables[files[0]]}"
                )
        unknown = sorted({label for file in files for label in self._read(file)[1]} - set(self.class_names))
        if unknown and part is not None:
            raise ConfigurationError(
                f"unknown class {unknown[0]!r} in {str(files[-1])!r}: the header names {', '.join(self.class_names)}"
            )
        _ = self.image_size

    def _laid_out(self, series: Series) -> Tensor:
        """Series (N, C, 1, L): stretched, with a channel of lengths if they differ; or NaN where there is nothing."""
        _, length = self.image_size
        if self.differences:
            series = [np.concatenate([values, _differences(values)]) for values in series]
        channels = len(series[0]) + (self.aligned and self._uneven)
        rows = torch.full((len(series), channels, 1, length), torch.nan)
        for row, values in zip(rows, series, strict=True):
            variables, size = values.shape
            if self.aligned:
                places = torch.linspace(0, size - 1, length, dtype=torch.float64)
                row[:variables, 0] = _between(torch.from_numpy(values).unsqueeze(0), places.unsqueeze(0))[0]
                row[variables:] = size / length
            else:
                row[:, 0, :size] = torch.from_numpy(values[:, :length])
        return rows

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the series of a part, with their lengths or NaN where one is shorter, and their classes."""
        series, labels, _ = self._read(self._file(part))
        return self._laid_out(series), torch.tensor([self.class_names.index(label) for label in labels])

    def read_unknown(self) -> NamedDataset:
        """Read what is to be predicted: each series is named by its file and number."""
        assert self.folder is not None
        files = list_files(self.folder, ".ts")
        every = [(values, f"{file}:{n}") for file in files for n, values in enumerate(self._read(file)[0], 1)]
        return NamedDataset(self._laid_out([values for values, _ in every]), [name for _, name in every])

    def prepare(self, inputs: Tensor) -> None:
        """Take mean and standard deviation of each variable, and the length; the last channel stays as it is."""
        self.hparams["length"] = self.length = self.image_size[1]
        values = inputs[:, : self._variables].double().transpose(0, 1).flatten(1)
        mean = values.nanmean(1)
        std = (values - mean[:, None]).square().nanmean(1).sqrt()
        more = [0.0] * self._uneven
        std = torch.where(std > 0, std, 1.0)  # of a constant, whatever its units
        self.mean, self.std = [*mean.tolist(), *more], [*std.tolist(), *(x + 1.0 for x in more)]

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Normalise series (B, C, 1, L), fill what is not there with zeros, and add the channel of length or mask."""
        variables = self._variables
        if training and (self.warp or self.crop):
            inputs = warp_series(inputs, self.warp, self.crop)
        series, last = inputs[:, :variables], [inputs[:, variables:]]
        mean, std = (torch.tensor(x[:variables], device=inputs.device).view(-1, 1, 1) for x in (self.mean, self.std))
        values = (series - mean) / std
        if training:
            factor = 1 + self.scale * (2 * torch.rand(len(values), 1, 1, 1) - 1)
            noise = self.noise * torch.randn(values.shape)
            values = values * factor.to(values.device) + noise.to(values.device)
        if not self.aligned:
            last = [(~series[:, :1].isnan()).to(values.dtype)] * self._uneven
        return torch.cat([values.nan_to_num(0.0), *last], 1)
