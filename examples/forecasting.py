"""A data set, a task and a metric of your own: a spiking network forecasts a series, one file beside the package.

    lightning-msnn fit --run.imports examples/forecasting.py --model forecasting.Forecaster --data forecasting.Series \
        --config recipe/series --data.min_batches 25 --trainer.callbacks+=BestCheckpoint \
        --trainer.callbacks.monitor val/mase --trainer.callbacks.mode min

forecasts a made-up series of monthly sales; ``--data.file sales.csv`` (a header, rows in order of time, the values in
the last column) forecasts yours, and ``--data.season 7 --model.season 7`` is for daily values. A MASE of 1 is as good
as repeating the last season was in the training part.
"""

import csv
import functools
import math
from pathlib import Path

import torch
from torchmetrics import MeanAbsoluteError

from lightning_msnn.data import ArrayDataModule
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import Task


class Series(ArrayDataModule):
    """Stretches ``(B, 1, 1, context)`` of a series, and the values after each, ``(B, horizon)``.

    Parts follow each other in time: the end of the series is forecast in the test part, what comes before that in
    validation, and all before in training.

    Args:
        file: CSV file; by default a made-up series.
        context: Values that a forecast is made from.
        horizon: Values that are forecast.
        season: Values of a season.
        test_fraction: Share of the series at its end whose values are forecast in the test part.
        val_fraction: Share before that, for validation.
    """

    noun = "stretches"
    needs_root = False
    in_chans = 1
    mean, std = [0.0], [1.0]  # values are in the series' own unit: the task normalises each stretch by itself

    def __init__(
        self,
        file: str | None = None,
        context: int = 36,
        horizon: int = 12,
        season: int = 12,
        test_fraction: float = 0.2,
        val_fraction: float = 0.2,
        batch_size: int = 16,
        **kwargs,
    ):
        super().__init__(batch_size, val_fraction, **kwargs)
        self.file, self.context, self.horizon, self.season = file, context, horizon, season
        self.test_fraction = test_fraction

    @functools.cached_property
    def values(self):
        if self.file is None:
            month = torch.arange(144.0)
            noise = 5 * torch.randn(144, generator=torch.Generator().manual_seed(0))
            return (100 + 2 * month) * (1 + 0.2 * torch.sin(2 * math.pi * month / 12)) + noise
        with Path(self.file).open(newline="", encoding="utf-8") as lines:
            return torch.tensor([float(row[-1]) for row in list(csv.reader(lines))[1:]])

    @property
    def class_names(self):
        return [f"+{step}" for step in range(1, self.horizon + 1)]

    @property
    def image_size(self):
        return 1, self.context

    @property
    def ends(self):
        """Where the values that are forecast in training, validation and test end."""
        total = len(self.values)
        test = total - round(self.test_fraction * total)
        return test - round(self.val_fraction * total), test, total

    @property
    def naive_scale(self):
        """Mean absolute error of repeating the value a season before, in the training part."""
        known = self.values[: self.ends[0]].unfold(0, self.season + 1, 1)
        return (known[:, -1] - known[:, 0]).abs().mean().item()

    def check(self, stage):
        super().check(stage)
        train, test, total = self.ends
        if min(train - self.context, test - train, total - test) < self.horizon:
            raise ConfigurationError(f"a series of {total} values is too short for a horizon of {self.horizon}")

    def cut(self, first, end):
        """Stretches, and the values after each of them, which lie between two places."""
        size = self.context + self.horizon
        windows = self.values.unfold(0, size, 1)[first - self.context : end - size + 1]
        return windows[:, None, None, : self.context], windows[:, self.context :]

    def read(self, part):
        train, test, total = self.ends
        parts = [(test, total)] if part == "test" else [(self.context, train), (train, test)]
        return tuple(torch.cat(both) for both in zip(*(self.cut(*ends) for ends in parts)))

    def split(self, targets):
        first = self.ends[0] - self.context - self.horizon + 1
        return torch.arange(first), torch.arange(first, len(targets))

    def transform(self, inputs, training):
        return inputs


class ScaledError(MeanAbsoluteError):
    """Mean absolute error in units of that of repeating the last season: MASE (Hyndman and Koehler, 2006)."""

    scale = 1.0

    def compute(self):
        return super().compute() / self.scale


class Forecaster(Task):
    """The network says by how much the next season will differ from the last, in units of the stretch's deviation."""

    def __init__(self, season: int = 12, num_classes: int = 12, in_chans: int = 1, **kwargs):
        super().__init__(num_classes=num_classes, in_chans=in_chans, **kwargs)

    def make_metrics(self, num_classes):
        return {"mae": MeanAbsoluteError(), "mase": ScaledError()}

    def losses(self, outputs, targets):
        return (outputs - targets).abs().mean(1) / self.val_metrics["mase"].scale

    def setup(self, stage):
        super().setup(stage)
        for metric in self.modules():
            if isinstance(metric, ScaledError):
                metric.scale = getattr(self.trainer.datamodule, "naive_scale", 1.0)

    def last_season(self, series):
        """The last season again and again: the forecast that the network corrects, and that it has to beat."""
        later = torch.arange(self.hparams["num_classes"], device=series.device) % self.hparams["season"]
        return series[:, 0, 0, -self.hparams["season"] :][:, later]

    def forward(self, series):
        deviation = series.std(3, keepdim=True, correction=0).clamp(min=1e-6)
        changes = super().forward((series - series.mean(3, keepdim=True)) / deviation)
        return self.last_season(series) + deviation[:, 0, 0] * changes
