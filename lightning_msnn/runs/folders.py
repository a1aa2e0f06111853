"""The folder of a run: claimed, so that no two runs share one."""

from __future__ import annotations

import contextlib
import os
from itertools import count
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["Claim", "claim_version", "newest_version", "release_version", "run_folder", "writes_files"]


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


def newest_version(base: Path, resumable: bool = False) -> int | None:
    """Number of the newest run, or of the newest that has a last checkpoint; None if there is none.

    Args:
        base: Folder of an experiment, with ``version_<n>`` for each run.
        resumable: Whether only runs with ``checkpoints/last.ckpt`` count.
    """
    numbers = [int(path.name[8:]) for path in base.glob("version_*") if path.name[8:].isdigit()]
    last = "checkpoints/last.ckpt"
    return max((n for n in numbers if not resumable or (base / f"version_{n}" / last).is_file()), default=None)


class Claim(NamedTuple):
    """The folder of a new run: the number of the run, and the folders that were made for it, the outermost first."""

    version: int
    made: list[Path]


def claim_version(base: Path) -> Claim:
    """Make the folder of a new run, ``version_<n>``, which no other process has or gets.

    Of several processes of one training the first claims; the others write nothing, and Lightning tells them the
    folder of the first.

    Args:
        base: Folder of the experiment, made if it is not there.

    Raises:
        OSError: If the folder cannot be made.
    """
    newest = newest_version(base)
    if getattr(rank_zero_only, "rank", 0):
        return Claim(newest or 0, [])
    made = [folder for folder in (*reversed(base.parents), base) if not folder.exists()]
    base.mkdir(parents=True, exist_ok=True)
    for number in count(0 if newest is None else newest + 1):
        with contextlib.suppress(FileExistsError):
            (base / f"version_{number}").mkdir()
            return Claim(number, [*made, base / f"version_{number}"])
    raise AssertionError  # count has no end


def release_version(claim: Claim) -> None:
    """Remove the folders that a claim has made, as far as they are empty: the run ended before it wrote anything."""
    with contextlib.suppress(OSError):
        for folder in reversed(claim.made):
            folder.rmdir()
