"""Where the files of a run go."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_msnn.errors import ConfigurationError

__all__ = ["LOCAL_LOGGERS", "check_folder", "place_logger", "put_aside", "run_of", "with_local_first"]

LOCAL_LOGGERS = ("CSVLogger", "TensorBoardLogger")
"""Loggers of Lightning that write files of this machine."""


def _is_local(logger: Any) -> bool:
    return logger.class_path.rpartition(".")[2] in LOCAL_LOGGERS


def with_local_first(given: Any) -> list[Any]:
    """Return loggers, one of local files before those of services: the folder of the first is that of the run."""
    loggers = [logger for logger in (given if isinstance(given, list) else [given]) if hasattr(logger, "class_path")]
    if not any(map(_is_local, loggers)):
        name = f"lightning.pytorch.loggers.{LOCAL_LOGGERS[0]}"
        loggers.append(Namespace(class_path=name, init_args=Namespace(save_dir=".")))
    return sorted(loggers, key=_is_local, reverse=True)


def run_of(base: Path, version: int | str | None) -> Path:
    """Folder of one run of an experiment, or of the experiment where there is no run."""
    return base if version is None else base / (version if isinstance(version, str) else f"version_{version}")


def place_logger(logger: Any, base: Path, version: int | str | None, given: Namespace) -> None:
    """Let a logger write into the folder of the run.

    One of local files that has a version and a folder of its own keeps it, if nothing is there yet.

    Args:
        logger: Class and arguments of a logger, changed in place.
        base: Folder of the experiment.
        version: The run's number, or name, in it.
        given: The options ``folder`` and ``name`` of the run.
    """
    arguments = logger.init_args
    if not _is_local(logger):
        if arguments.get("save_dir") == ".":  # Weights & Biases
            arguments.save_dir = str(run_of(base, version))
        return
    name, number = arguments.get("name"), arguments.get("version")
    usual = {  # runs: in configurations that earlier versions have saved
        "save_dir": {Path(), Path("runs"), base.parent, Path(given.folder)},
        "name": {Path("lightning_logs"), Path(base.name), Path(given.name)},
    }
    for option, places in usual.items():
        value = arguments.get(option)
        if number is None and value is not None and Path(value) not in places:
            rank_zero_warn(
                f"{option} {value!r} of {logger.class_path.rpartition('.')[2]} has no effect: run.folder and run.name "
                "say where the files of a run are"
            )
    if number is None or run_of(Path(arguments.save_dir) / str(name), number).exists():
        arguments.save_dir, arguments.name, arguments.version = str(base.parent), base.name, version


def check_folder(folder: Path) -> None:
    """Raise a ConfigurationError if a folder cannot be made or written to; make nothing."""
    if "\0" in str(folder):
        raise ConfigurationError(f"cannot write to {str(folder)!r}: a path has no character 0")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(there)!r} is read-only")


@rank_zero_only
def put_aside(folder: Path, *names: str) -> dict[Path, Path]:
    """Give files of the run that is resumed a number: what comes would overwrite them.

    Returns:
        Where each lies now, by where it lay.
    """
    moved: dict[Path, Path] = {}
    for file in (folder / name for name in names):
        if file.is_file():
            free = next(f for i in count() if not (f := folder / f"{file.stem}.{i}{file.suffix}").exists())
            moved[file] = file.rename(free)
    return moved
