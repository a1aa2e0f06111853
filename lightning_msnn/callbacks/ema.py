"""Exponential moving average of weights."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_msnn.errors import check_number
from lightning_msnn.runs.trainer import refuse_shards

__all__ = ["EMA"]


class EMA(WeightAveraging):
    """Lightning's weight averaging with an exponential moving average that warms up.

    The average is what validation sees and what a checkpoint holds as its weights. A fixed decay would keep the
    untrained weights alive for about ``1 / (1 - decay)`` steps; here the decay after ``n`` steps is
    ``min(decay, (1 + n) / (10 + n))``, so that short trainings profit too.

    Args:
        decay: Decay per optimizer step in the long run, in [0, 1).

    Raises:
        ConfigurationError: If the decay is outside [0, 1), or a strategy shards the weights.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = check_number("the decay of the moving average", decay, below_one=True)
        super().__init__(multi_avg_fn=self._average)

    @torch.no_grad()
    def _average(self, averages: list[Tensor], currents: list[Tensor], averaged: Tensor) -> None:
        if averages[0].is_floating_point():
            currents = [current.to(averages[0].dtype) for current in currents]
            step = int(averaged)
            torch._foreach_lerp_(averages, currents, 1.0 - min(self.decay, (1 + step) / (10 + step)))
        else:
            torch._foreach_copy_(averages, currents)  # counters of batch norm have no mean

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average as the result; Lightning would validate it in the place of a checkpoint."""
        self._average_model = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights to go on fitting; Lightning would warn in a test."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what Lightning cannot average."""
        if stage == "fit":
            refuse_shards(trainer.strategy, "EMA")
        self._latest_update_step = 0  # of an earlier training; a resumed one restores its own after this
        self._device = trainer.strategy.root_device  # the network is still on the CPU
        super().setup(trainer, pl_module, stage)
