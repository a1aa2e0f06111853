"""How far a training is."""

import lightning.pytorch as pl

__all__ = ["steps_done"]


def steps_done(trainer: pl.Trainer) -> int:
    """Return how many of ``trainer.estimated_stepping_batches`` are over.

    Lightning counts the steps of all optimizers, but expects one for each batch. Where a module steps them by hand, as
    often as it likes, and batches are what ends the training, these are counted.
    """
    if trainer.lightning_module.automatic_optimization or trainer.max_steps != -1:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx
