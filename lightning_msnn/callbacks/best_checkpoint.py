"""The checkpoint that did best in validation."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["BestCheckpoint"]


class BestCheckpoint(ModelCheckpoint):
    """Keep ``checkpoints/best.ckpt`` in the run's folder, where a metric was best so far.

    A training that does not log the metric keeps none, and says so at its end.

    Args:
        monitor: Name of the metric.
        mode: ``"max"`` or ``"min"``: which value is best.
    """

    def __init__(self, monitor: str = "val/top1", mode: str = "max") -> None:
        super().__init__(
            monitor=monitor, mode=mode, filename="best", auto_insert_metric_name=False, enable_version_counter=False
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where there is no validation, if the metric was logged."""
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation, if the metric was logged."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if nothing was kept."""
        if not self.best_model_path:
            rank_zero_info("no best.ckpt is kept: %s was not logged", self.monitor)
