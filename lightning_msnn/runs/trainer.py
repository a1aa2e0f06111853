"""What is asked of a Trainer: where its run lies, how far a training is, and how its weights are spread."""

import math
import os
from typing import Literal

import lightning.pytorch as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_msnn.errors import ConfigurationError

__all__ = ["LAST", "planned", "refuse_shards", "run_folder", "stand_last", "writes_files"]

LAST = "checkpoints/last.ckpt"
"""The last checkpoint in the folder of a run."""


def run_folder(trainer: pl.Trainer) -> str:
    """Folder of a run's files, a path or a URL: where Lightning's ``ModelCheckpoint`` makes its ``checkpoints`` too.

    With a logger it is ``<save_dir>/<name>/<version>`` of the first, so that no two runs share it; else it is the
    trainer's ``default_root_dir``. It takes a broadcast: every rank must call it.
    """
    folder = str(trainer.default_root_dir)
    if logger := trainer.logger:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or folder, str(logger.name), version)
    files, local = url_to_fs(folder)  # a path may begin with ~ or file:
    return str(trainer.strategy.broadcast(local if isinstance(files, LocalFileSystem) else folder))


def writes_files(trainer: pl.Trainer) -> bool:
    """Whether this process writes a run's results: the first does, unless the run is only a ``fast_dev_run``."""
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)


def planned(trainer: pl.Trainer, what: str, interval: Literal["epoch", "step"] = "step") -> int:
    """Return the optimizer steps, or the epochs, of a whole training, at least 1.

    Raises:
        ConfigurationError: If the training has no end, which ``what`` must know.
    """
    if interval == "step" and not trainer.lightning_module.automatic_optimization:
        raise ConfigurationError(f"{what} must be left out of a module that steps its optimizers itself")
    total = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
    if total is None or not 0 <= total < math.inf:
        other = "max_steps for data without a length" if interval == "step" else "interval: step"
        raise ConfigurationError(
            f"{what} must know where training ends: set max_epochs, not {trainer.max_epochs}, or {other}"
        )
    return max(1, int(total))


def stand_last(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Put a callback behind all others; for its ``setup``, as Lightning then goes on along the list before."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [*(each for each in callbacks if each is not callback), callback]  # type: ignore[attr-defined]


def refuse_shards(strategy: Strategy, what: str) -> None:
    """Raise a ConfigurationError where each process may hold only a part of the weights, so that none can read all."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False):
        raise ConfigurationError(f"{what} must be left out with {type(strategy).__name__}, which shards the weights")
