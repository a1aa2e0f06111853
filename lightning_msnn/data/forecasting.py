"""A series whose future is forecast from its past, split in time."""

import csv
import math
import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightning_msnn.data.arrays import ArrayDataModule, NamedDataset, aeon_folder
from lightning_msnn.data.base import Part
from lightning_msnn.errors import ConfigurationError, check_integer, check_number

__all__ = ["ForecastSeries"]


class ForecastSeries(ArrayDataModule):
    """Stretches ``(B, C, 1, context)`` of a series and what follows each, ``(B, C * horizon)``, variable by variable.

    The split is rolling in time: what is forecast in the test part is the end of the series, in validation what comes
    before that, and in training all before; no value is a target of two parts. Values are in the series' own unit; the
    task normalises each stretch by itself.

    Args:
        source: A CSV file with a header, in order of time; or the name of one that aeon's wheel ships, such as
            ``Airline`` (monthly, 1949 to 1960) or ``solar`` (half-hourly, six days).
        columns: Columns of the variables; by default the last one.
        context: Values that a forecast is made from.
        horizon: Values that are forecast.
        season: Values of a season, of which the seasonal-naive forecast repeats the last; at most ``context``.
        test_fraction: Share of the series at its end whose values are forecast in the test part.
        batch_size: Stretches a batch (on each device).
        val_fraction: Share of the series, before the test part, whose values are forecast in validation.
        num_workers: Worker processes of each loader.
        min_batches: Batches of an epoch, at least: a smaller training part is met several times in one, so that
            validations and checkpoints are not all that a training does.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    noun = "stretches"
    needs_root: ClassVar[bool] = False

    def __init__(
        self,
        source: str = "Airline",
        columns: list[str] | None = None,
        context: int = 36,
        horizon: int = 12,
        season: int = 12,
        test_fraction: float = 0.2,
        batch_size: int = 16,
        val_fraction: float = 0.2,
        num_workers: int = 0,
        min_batches: int = 1,
    ) -> None:
        super().__init__(batch_size, val_fraction, 0, num_workers, min_batches=min_batches)
        self.source, self.columns = source, columns
        self.context, self.horizon = check_integer("context", context, 4), check_integer("horizon", horizon, 1)
        self.season = check_integer("season", season, 1)
        if season > context:
            raise ConfigurationError(f"season must be at most {context}, the context, not {season}")
        self.test_fraction = check_number("test_fraction", test_fraction, below_one=True)
        self._values: Tensor | None = None
        self.save_hyperparameters()

    @property
    def values(self) -> Tensor:
        """The series, float64, (C, L)."""
        if self._values is None:
            file = Path(self.source).expanduser()
            if re.fullmatch(r"[\w-]+", self.source):
                file = aeon_folder() / self.source / f"{self.source}.csv"
            self._values = read_columns(file, self.columns)
        return self._values

    @property
    def in_chans(self) -> int:
        """Variables of the series."""
        return len(self.values)

    @property
    def image_size(self) -> tuple[int, int]:
        """One row of as many values as a forecast is made from."""
        return 1, self.context

    @property
    def class_names(self) -> list[str]:
        """Names of the values that are forecast, variable by variable: the outputs of a network."""
        return [f"{variable}+{step}" for variable in range(self.in_chans) for step in range(1, self.horizon + 1)]

    @property
    def _ends(self) -> tuple[int, int, int]:
        """Where the values that are forecast in training, validation and test end."""
        total = self.values.shape[1]
        test = total - round(self.test_fraction * total)
        return test - round(self.val_fraction * total), test, total

    @property
    def naive_scale(self) -> Tensor:
        """Mean absolute error by variable, (C,), of the value a season before in the training part, for MASE."""
        known = self.values[:, : self._ends[0]]
        return (known[:, self.season :] - known[:, : -self.season]).abs().mean(1).float()

    def check_part(self, part: Part | None) -> None:
        """Read the series, and find whether each part has a forecast."""
        self.mean, self.std = [0.0] * self.in_chans, [1.0] * self.in_chans  # values are in the series' own unit
        train, test, total = self._ends
        if part is None:
            if total < self.context:
                raise ConfigurationError(
                    f"the series in {self.source!r} has {total} values, too few: a forecast is made from {self.context}"
                )
            return
        if part == "test" and not self.test_fraction:
            raise ConfigurationError("test_fraction must be above 0, not 0: nothing is left to test on")
        room = {"training": train - self.context, "validation": test - train, "test": total - test}
        for name, values in room.items():
            unused = (name == "validation" and not self.val_fraction) or (name == "test" and not self.test_fraction)
            if values < self.horizon and not unused:
                raise ConfigurationError(
                    f"the series in {self.source!r} has {total} values, too few: the {name} part has room to forecast "
                    f"{max(values, 0)} of them, and the horizon is {self.horizon}"
                )
        if not (self.naive_scale > 0).all():
            raise ConfigurationError(f"the series in {self.source!r} repeats itself exactly with season {self.season}")

    def _cut(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Stretches, and the values after each of them that lie between two places."""
        windows = self.values.float().unfold(1, self.context + self.horizon, 1).transpose(0, 1)
        windows = windows[first - self.context : end - self.context - self.horizon + 1]
        return windows[..., : self.context].unsqueeze(2).contiguous(), windows[..., self.context :].flatten(1)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the stretches of a part and what follows them; those that validate come last."""
        train, test, total = self._ends
        if part == "test":
            return self._cut(test, total)
        pieces = [self._cut(self.context, train), self._cut(train, test)]
        return torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces])

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Split off what is forecast in validation."""
        first = self._ends[0] - self.context - self.horizon + 1
        return torch.arange(first), torch.arange(first, len(targets))

    def read_unknown(self) -> NamedDataset:
        """Return the end of the series, whose future is not known."""
        return NamedDataset(self.values.float()[None, :, None, -self.context :], [self.source])

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Return the stretches as they are."""
        return inputs


def read_columns(file: Path, columns: list[str] | None) -> Tensor:
    """Read columns of a CSV file, by default its last one.

    Returns:
        float64, (columns, rows).

    Raises:
        ConfigurationError: If a column is not there, or a value is not a finite number; the message says which.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            names = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot read the series in {str(file)!r}: {reason}") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"{str(file)!r} has two columns {twice[0]!r}: each needs a name of its own")
    if names and all(re.fullmatch(r"\s*[-+.\d][-+.\deE]*\s*", name) for name in names):
        raise ConfigurationError(f"{str(file)!r} must begin with the names of its columns, and begins with {names}")
    for place, row in enumerate(rows):
        if None in row:
            raise ConfigurationError(
                f"row {place + 1} of {str(file)!r} has more values than the {len(names)} columns have names"
            )
    chosen = names[-1:] if columns is None else columns
    if not chosen or not rows or (unknown := [name for name in chosen if name not in names]):
        lacks = f"column {unknown[0]!r}: it has {', '.join(names)}" if names and chosen and rows else "rows"
        raise ConfigurationError(f"{str(file)!r} has no {lacks}")
    values = torch.empty((len(chosen), len(rows)), dtype=torch.float64)
    for channel, name in enumerate(chosen):
        for place, row in enumerate(rows):
            try:
                values[channel, place] = number = float(row[name])
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise ConfigurationError(
                    f"row {place + 1} of {str(file)!r} has {row[name]!r} in column {name!r}: a finite number is needed"
                )
    return values
