"""The checkpoint that did best in validation."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, suggestion

__all__ = ["BestCheckpoint", "check_logged"]


def check_logged(trainer: pl.Trainer, pl_module: pl.LightningModule, monitor: str, purpose: str) -> None:
    """Raise a ConfigurationError that names a metric and its purpose if it is not among those that are logged.

    In the check before the first step a metric may be missing that is logged in training alone: those that a callback
    says (``logged_in_training``), and any of a module that is not of this package.
    """
    allowed = {*trainer.callback_metrics}
    if trainer.sanity_checking:
        if not type(pl_module).__module__.startswith("lightning_msnn."):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        allowed |= {name for each in callbacks for name in getattr(each, "logged_in_training", ())}
    if monitor not in allowed:
        raise ConfigurationError(
            f"no metric {monitor!r} is logged, {purpose}: logged are {', '.join(sorted(allowed))}"
            f"{suggestion(monitor, allowed)}"
        )


def _at_target(trainer: pl.Trainer) -> bool:
    """Whether the last validation found the network at its target of rate or energy; true without a target."""
    return all(getattr(callback, "met", True) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class BestCheckpoint(ModelCheckpoint):
    """Keep ``checkpoints/best.ckpt`` in the run's folder, where a metric was best so far.

    Of networks that are equally good it is the last, which has learnt for longer: few images tell few networks apart.
    With :class:`~lightning_msnn.callbacks.EnergyTarget` only networks at the target count.

    Args:
        monitor: Metric, as it is logged.
        mode: ``"max"`` or ``"min"``: whether the highest or the lowest value is best.
        required: Whether a metric that is not logged is an error.

    Raises:
        ConfigurationError: If the mode is neither; in training, if a metric that is required is not logged.
    """

    def __init__(self, monitor: str = "val/top1", mode: str = "max", required: bool = False) -> None:
        if mode not in ("max", "min"):
            raise ConfigurationError(f"mode of the best checkpoint must be max or min, not {mode!r}")
        super().__init__(
            monitor=monitor, mode=mode, filename="best", auto_insert_metric_name=False, enable_version_counter=False
        )
        self.required = required

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether a value is the best so far, or as good as that."""
        if super().check_monitor_top_k(trainer, current):
            return True
        tie = current is not None and bool(current == self.best_model_score)
        return bool(trainer.strategy.reduce_boolean_decision(tie))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where there is no validation, if the metric was logged."""
        if not str(self.monitor).startswith("val/"):
            self._require(trainer, pl_module)
        if self._counts(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation, if the metric was logged."""
        if trainer.state.fn == TrainerFn.FITTING and str(self.monitor).startswith("val/"):
            self._require(trainer, pl_module)
        if self._counts(trainer):
            super().on_validation_end(trainer, pl_module)

    def _require(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise a ConfigurationError if the metric is required and not among those that are logged."""
        if self.required:
            check_logged(trainer, pl_module, str(self.monitor), "which is to choose the best checkpoint")

    def _counts(self, trainer: pl.Trainer) -> bool:
        """Whether there is a metric, of a network that is at its target if it has one."""
        return self.monitor in trainer.callback_metrics and _at_target(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if nothing was kept."""
        if not self.best_model_path and not _at_target(trainer):
            rank_zero_warn(
                "no best.ckpt is kept: the network was above its target of rate or energy at every validation; train "
                "longer, or towards a higher one"
            )
        elif not self.best_model_path and not getattr(trainer, "fast_dev_run", False):
            rank_zero_info("no best.ckpt is kept: %s was not logged", self.monitor)
