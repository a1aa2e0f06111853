"""Loggers that fail without taking the training with them."""

from __future__ import annotations

from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["LoggerGuard"]

#: What a Trainer or a monitor calls on a logger to write something.
WRITES = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint", "log_image")


class LoggerGuard(Callback):
    """Go on when a logger fails: its disk is full, its server is down.

    The first failure of a logger is one warning; from then on it gets nothing more. The other loggers go on.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Guard the Trainer's loggers, each once."""
        for logger in trainer.loggers:
            if not hasattr(logger, "_guarded"):
                _guard(logger)


def _guard(logger: Logger) -> None:
    down = False

    def guarded(write: Any) -> Any:
        @wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> None:
            nonlocal down
            if down:
                return
            try:
                write(*args, **kwargs)
            except Exception as error:  # each service has errors of its own
                down = True
                reason = (str(error).splitlines() or [""])[0] or type(error).__name__
                rank_zero_warn(f"{type(logger).__name__} is down ({reason}): training goes on without it")

        return attempt

    # The object stays the one that the user made, which callbacks may look for by its class.
    for name in WRITES:
        if hasattr(logger, name):  # not every logger takes images
            setattr(logger, name, guarded(getattr(logger, name)))
    logger._guarded = True  # type: ignore[attr-defined]
