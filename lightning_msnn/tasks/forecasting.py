"""Forecasting of series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric, MetricCollection

from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.metrics.forecasting import MeanAbsoluteScaledError
from lightning_msnn.tasks.base import Task

__all__ = ["SpikingForecaster", "naive_forecasts"]


def naive_forecasts(series: Tensor, horizon: int, season: int) -> dict[str, Tensor]:
    """Forecasts that need no training.

    Args:
        series: What is known, ``(B, C, 1, L)``.
        horizon: Values to forecast.
        season: Values of a season.

    Returns:
        ``naive``, the last value, and ``seasonal_naive``, the last season again and again; each ``(B, C, horizon)``.
    """
    known = series[:, :, 0]
    later = torch.arange(horizon, device=series.device) % season
    return {"naive": known[..., -1:].repeat(1, 1, horizon), "seasonal_naive": known[..., -season:][..., later]}


def _spread(series: Tensor) -> Tensor:
    """Standard deviation of each variable of a stretch, ``(B, C, 1, 1)``."""
    return series.std(3, keepdim=True, correction=0).clamp(min=1e-6)


class SpikingForecaster(Task):
    """A network of timm's registry forecasts a series: by how much it will differ from the season before.

    Batches are ``(series, future)``: ``(B, C, 1, L)`` and ``(B, C * horizon)``, variable by variable. The network sees
    each stretch less its mean, divided by its standard deviation; its outputs, in units of that deviation, are added to
    the seasonal-naive forecast. The loss is the absolute error in units of the data's ``naive_scale``. Beside what the
    network is measured by (``mae``, ``mse``, ``mase``), the same is logged of the two forecasts that need no training,
    such as ``test/seasonal_naive_mase``.

    Args:
        network: Registered name of the network.
        num_classes: Values that are forecast: variables times horizon; by default the data's on the command line.
        in_chans: Variables of the series; by default the data's on the command line.
        network_kwargs: Further arguments of the network.
        pretrained: Whether to start from the weights that belong to the name.
        season: Values of a season; 1 for none.
        **kwargs: Arguments of :class:`lightning_msnn.tasks.Task`.

    Raises:
        ConfigurationError: If an argument is not allowed, or the data does not fit the network.
    """

    scale: Tensor

    def __init__(
        self,
        network: str = "msnn_resnet12_tiny",
        num_classes: int = 12,
        in_chans: int = 1,
        network_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        *,
        season: int = 1,
        **kwargs: Any,
    ) -> None:
        check_integer("season", season, 1)
        if num_classes % in_chans:
            raise ConfigurationError(f"num_classes must be a multiple of in_chans, {in_chans}, not {num_classes}")
        super().__init__(network, num_classes, in_chans, network_kwargs, pretrained, **kwargs)
        self.horizon = num_classes // in_chans
        self.register_buffer("scale", torch.ones(num_classes), persistent=False)  # it is of the data
        self.baselines = nn.ModuleDict(
            {
                f"{stage}_{name}": MetricCollection({**self.make_metrics(num_classes)}, prefix=f"{stage}/{name}_")
                for stage in ("val", "test")
                for name in ("naive", "seasonal_naive")
            }
        )

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return mean absolute, squared and scaled error."""
        return {
            "mae": MeanAbsoluteError(),
            "mse": MeanSquaredError(),
            "mase": MeanAbsoluteScaledError(torch.ones(num_classes)),
        }

    def check_data(self, datamodule: Any) -> None:
        """Compare channels, outputs and season with those of the data.

        Raises:
            ConfigurationError: If they differ, or the data are of classes.
        """
        if not hasattr(datamodule, "season") and hasattr(datamodule, "class_names"):
            raise ConfigurationError(
                f"model {type(self).__name__} needs a series to forecast, as data ForecastSeries has, "
                f"not {type(datamodule).__name__}"
            )
        super().check_data(datamodule)
        theirs = getattr(datamodule, "season", self.hparams["season"])
        if theirs != self.hparams["season"]:
            raise ConfigurationError(
                f"model.season is {self.hparams['season']}, but {type(datamodule).__name__} has {theirs}: "
                f"set model.season to {theirs}"
            )

    def setup(self, stage: str) -> None:
        """Take the scale of errors from the training part of the data."""
        super().setup(stage)
        scale = getattr(getattr(self.trainer, "datamodule", None), "naive_scale", None)
        if scale is not None and stage != "predict":
            self.scale.copy_(scale.repeat_interleave(self.horizon))
            for metric in self.modules():
                if isinstance(metric, MeanAbsoluteScaledError):
                    metric.scale.copy_(self.scale)

    def forward(self, images: Tensor) -> Tensor:
        """Map what is known of series, ``(B, C, 1, L)``, to forecasts ``(B, C * horizon)``.

        Raises:
            ConfigurationError: If less than a season is known.
        """
        season = self.hparams["season"]
        if images.shape[3] < season:
            raise ConfigurationError(f"a series must have at least {season} values, a season, not {images.shape[3]}")
        return self._forecast(images, super().forward(self.seen(images)))

    def _forecast(self, series: Tensor, outputs: Tensor) -> Tensor:
        """Return the forecasts that a network's outputs stand for."""
        base = naive_forecasts(series, self.horizon, self.hparams["season"])["seasonal_naive"]
        return (base + _spread(series)[:, :, 0] * outputs.view_as(base)).flatten(1)

    def taught(self, inputs: Tensor) -> Tensor:
        """Return the teacher's forecasts."""
        return self._forecast(inputs, super().taught(self.seen(inputs)))

    def distil(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """Return the scaled absolute difference to the teacher's forecasts; it has no temperature."""
        return self.losses(outputs, taught).mean()

    def load_teacher(self) -> None:
        """Load the teacher, which must be a forecaster too.

        Raises:
            ConfigurationError: If it is of another task or season.
        """
        super().load_teacher()
        if self.teacher is not None and self.teacher.season != self.hparams["season"]:
            raise ConfigurationError(
                "the teacher must be a checkpoint of a forecaster with the student's season, "
                f"{self.hparams['season']}: {self.teacher.source} has {self.teacher.season}"
            )

    def seen(self, inputs: Tensor) -> Tensor:
        """Return series less their mean, divided by their standard deviation, each stretch by itself."""
        return (inputs - inputs.mean(3, keepdim=True)) / _spread(inputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scaled absolute error of each forecast, ``(B,)``."""
        return ((outputs - targets).abs() / self.scale).mean(1)

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection, mean_loss: MeanMetric) -> None:
        super()._evaluate(batch, stage, metrics, mean_loss)
        series, future = self.unpack(batch)
        for name, forecast in naive_forecasts(series, self.horizon, self.hparams["season"]).items():
            baseline: Any = self.baselines[f"{stage}_{name}"]
            baseline.update(forecast.flatten(1), future)
            self.log_dict(baseline, on_step=False, on_epoch=True)

    prediction_columns = ("file", "variable", "step", "forecast", "naive", "seasonal_naive")
    """What a row of the predictions of ``predict`` holds."""

    def prediction_rows(self, outputs: dict[str, Any]) -> list[tuple[str | float, ...]]:
        """Rows of what :meth:`predict_step` returned, one for each value that is forecast."""
        forecasts = [outputs[name].cpu() for name in self.prediction_columns[3:]]
        samples, variables, horizon = forecasts[0].shape
        names = outputs["file"]
        return [
            (names[i], variable, step + 1, *(float(f"{float(f[i, variable, step]):.6g}") for f in forecasts))
            for i in range(samples)
            for variable in range(variables)
            for step in range(horizon)
        ]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Forecast what follows.

        Args:
            batch: Series ``(B, C, 1, L)``, alone or followed by their names.
            batch_idx: Number of the batch.

        Returns:
            ``file`` (names, or numbers of batch and series where there are none), and ``forecast``, ``naive`` and
            ``seasonal_naive``, each ``(B, C, horizon)``.
        """
        series, *rest = batch if isinstance(batch, list | tuple) else (batch,)
        forecast = self(series).float().unflatten(1, (-1, self.horizon))
        names = self._names(rest, batch_idx, len(series))
        return {"file": names, "forecast": forecast, **naive_forecasts(series, self.horizon, self.hparams["season"])}
