"""The folder of a run."""

from __future__ import annotations

import os

import lightning.pytorch as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

__all__ = ["LAST", "run_folder", "writes_files"]

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
