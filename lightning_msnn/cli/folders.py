"""The folder of a run: claimed, so that no two runs share one, and locked while it is trained."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from itertools import count
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs.trainer import LAST

__all__ = ["Run", "begin_run", "experiment_folder", "newest_run", "place_loggers", "resume_run"]

_LOCAL = ("CSVLogger", "TensorBoardLogger")
"""Loggers of Lightning that write files of this machine."""

_NAME = re.compile(r"\w[\w.,=+-]*(/\w[\w.,=+-]*)*")


class Run(NamedTuple):
    """The folder of a run."""

    folder: Path
    made: list[Path]  # folders that were made for it, the outermost first
    lock: int | None  # descriptor of the folder, which is locked while it is open
    aside: dict[Path, Path]  # where files of a resumed run lie now, by where they lay

    def close(self, begun: bool = False) -> None:
        """Unlock the folder, remove it if it is empty, and put files back if the run was refused before it began."""
        for file, aside in () if begun else self.aside.items():
            aside.replace(file)
        if self.lock is not None:
            os.close(self.lock)
        with contextlib.suppress(OSError):
            for folder in reversed(self.made):
                folder.rmdir()


def experiment_folder(root: str | None, name: str) -> Path:
    """Return the folder of an experiment's runs, ``<root>/<name>`` with ``~`` expanded; without a root, in ``runs``.

    It must be a folder of this machine with a name that no library reads otherwise.
    """
    if "::" in str(root) or "://" in str(root):
        raise ConfigurationError(f"trainer.default_root_dir must be a folder of this machine, not {root!r}")
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"run.name must be of letters, digits and any of '_.,=+-/', not {name!r}")
    return Path(root or "runs").expanduser() / name


def newest_run(experiment: Path) -> Path | None:
    """Return the folder of the newest run that has ``checkpoints/last.ckpt``; None if there is none."""
    numbers = [number for number in _numbers(experiment) if (experiment / f"version_{number}/{LAST}").is_file()]
    return experiment / f"version_{max(numbers)}" if numbers else None


def _numbers(experiment: Path) -> list[int]:
    names = (path.name.removeprefix("version_") for path in experiment.glob("version_*"))
    return [int(name) for name in names if name.isdecimal()]


def begin_run(experiment: Path, prefix: str = "version") -> Run:
    """Make the folder of a new run, ``<prefix>_<n>``, which no other process has or gets.

    Of several processes of one training the first makes it; Lightning tells the others its name.
    """
    if getattr(rank_zero_only, "rank", 0):
        return Run(experiment / f"{prefix}_{max(_numbers(experiment), default=0)}", [], None, {})
    try:
        made = [folder for folder in (*reversed(experiment.parents), experiment) if not folder.exists()]
        experiment.mkdir(parents=True, exist_ok=True)
        for number in count(max(_numbers(experiment), default=-1) + 1 if prefix == "version" else 0):
            folder = experiment / f"{prefix}_{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return Run(folder, [*made, folder], _lock(folder), {})
    except OSError as error:
        said = f"cannot write to the folder of the run {str(experiment)!r}: {error.strerror}"
        raise ConfigurationError(said) from error
    raise AssertionError  # count has no end


def resume_run(folder: Path) -> Run:
    """Take the folder of a run that no other process trains, and give files that would be overwritten a number."""
    if getattr(rank_zero_only, "rank", 0):
        return Run(folder, [], None, {})
    run = Run(folder, [], _lock(folder), {})
    for file in (folder / "metrics.csv", folder / "config.yaml"):
        if file.is_file():
            free = next(f for i in count() if not (f := folder / f"{file.stem}.{i}{file.suffix}").exists())
            run.aside[file] = file.rename(free)
    return run


def _lock(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigurationError(f"another process trains the run {str(folder)!r}: wait for its end") from error
    except OSError:  # a file system without locks
        pass
    return lock


def place_loggers(trainer: Namespace, folder: Path) -> None:
    """Let the loggers of a trainer write into the folder of the run, and Lightning put its checkpoints there.

    A logger that is given a folder of its own (``save_dir``) keeps it, beside one in the folder of the run.
    """
    trainer.default_root_dir = str(folder)
    if trainer.logger in (False, []):
        return
    given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    loggers = [logger for logger in given if hasattr(logger, "class_path")]  # without true, Lightning's default
    free = [logger for logger in loggers if logger.get("init_args", {}).get("save_dir") == "."]
    local = [logger for logger in free if logger.class_path.rpartition(".")[2] in _LOCAL]
    if not local:
        path = f"lightning.pytorch.loggers.{_LOCAL[0]}"
        local = [Namespace(class_path=path, init_args=Namespace(save_dir="."))]
    for logger in free:
        logger.init_args["save_dir"] = str(folder)
    for logger in local:
        place = {"save_dir": str(folder.parents[1]), "name": folder.parent.name, "version": folder.name}
        logger.init_args.update(Namespace(place))
    # Lightning takes the run's folder from the first.
    trainer.logger = [*local, *(logger for logger in loggers if logger not in local)]
