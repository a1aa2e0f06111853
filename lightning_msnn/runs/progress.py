"""How far a training is."""

import math
from typing import Literal

import lightning.pytorch as pl

from lightning_msnn.errors import ConfigurationError

__all__ = ["planned", "steps_done"]


def planned(trainer: pl.Trainer, what: str, interval: Literal["epoch", "step"] = "step") -> int:
    """Return the optimizer steps, or the epochs, of a whole training, at least 1.

    Args:
        trainer: The trainer of a training that begins.
        what: What must know them, for the message.
        interval: What is counted.

    Raises:
        ConfigurationError: If the training has no end.
    """
    total = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
    if total is None or not 0 <= total < math.inf:
        raise ConfigurationError(
            f"{what} must know where training ends: set max_epochs, not {trainer.max_epochs}, or max_steps for data "
            "without a length"
        )
    return max(1, int(total))


def steps_done(trainer: pl.Trainer) -> int:
    """Return how many of :func:`planned` are done.

    Lightning counts the steps of all optimizers, but expects one for each batch. Where a module steps them by hand, as
    often as it likes, and batches are what ends the training, these are counted.
    """
    if trainer.lightning_module.automatic_optimization or trainer.max_steps != -1:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx
