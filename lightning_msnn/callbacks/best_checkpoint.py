"""The checkpoint that did best in validation."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, suggestion

__all__ = ["BestCheckpoint"]


def _at_target(trainer: pl.Trainer) -> bool:
    """Whether the last validation found the network at its target of rate or energy; true without one."""
    return all(getattr(callback, "met", True) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class BestCheckpoint(ModelCheckpoint):
    """Keep ``checkpoints/best.ckpt`` in the run's folder, where a metric was best so far.

    Of equally good networks it keeps the last, which has learnt for longest.
    With :class:`~lightning_msnn.callbacks.EnergyTarget` only networks at the target count.

    Args:
        monitor: Metric, as it is logged.
        mode: ``"max"`` or ``"min"``: whether the highest or the lowest value is best.

    Raises:
        ConfigurationError: At the first validation, if a task of this package does not log the metric; another module
            gets a warning.
    """

    def __init__(self, monitor: str = "val/top1", mode: Literal["max", "min"] = "max") -> None:
        super().__init__(
            monitor=monitor, mode=mode, filename="best", auto_insert_metric_name=False, enable_version_counter=False
        )
        self._said = False

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether a value is the best so far, or as good as that."""
        if super().check_monitor_top_k(trainer, current):
            return True
        tie = current is not None and bool(current == self.best_model_score)
        return bool(trainer.strategy.reduce_boolean_decision(tie))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where there is no validation, if the metric was logged."""
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if validated and not str(self.monitor).startswith("val/"):
            self._look_for_monitor(trainer, pl_module)
        if self._counts(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation, if the metric was logged."""
        if trainer.state.fn == "fit" and str(self.monitor).startswith("val/"):
            self._look_for_monitor(trainer, pl_module)
        if self._counts(trainer):
            super().on_validation_end(trainer, pl_module)

    def _look_for_monitor(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise a ConfigurationError, or warn once, if the metric is not logged.

        The check before the first step may lack metrics that are logged in training alone: those of a callback's
        ``logged_in_training``, and any of a module that is not of this package.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        later = {name for each in callbacks for name in getattr(each, "logged_in_training", ())}
        allowed = {*trainer.callback_metrics, *(later if trainer.sanity_checking else ())}
        foreign = not type(pl_module).__module__.startswith("lightning_msnn.")
        if self.monitor in allowed or self._said or (trainer.sanity_checking and foreign):
            return
        message = (
            f"no metric {self.monitor!r} is logged, which is to choose the best checkpoint: logged are "
            f"{', '.join(sorted(allowed))}{suggestion(str(self.monitor), allowed)}"
        )
        if not foreign:
            raise ConfigurationError(message)
        self._said = True
        rank_zero_warn(f"{message}; give BestCheckpoint(monitor=...) one of them, else no best.ckpt is kept")

    def _counts(self, trainer: pl.Trainer) -> bool:
        """Whether there is a metric, of a network that is at its target if it has one."""
        return self.monitor in trainer.callback_metrics and _at_target(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why no checkpoint was kept."""
        if not self.best_model_path and not _at_target(trainer):
            rank_zero_warn(
                "no best.ckpt is kept: the network was above its target of rate or energy at every validation"
            )
