"""Trainings by the command line, and the files that keep their results: one row each, so that what is there stays."""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["append", "interval", "lightning_msnn", "read", "with_interval"]


def lightning_msnn(words: Sequence[str]) -> None:
    """Run the command ``lightning-msnn`` in a process of its own.

    Args:
        words: Its arguments.

    Raises:
        RuntimeError: If it fails; the last line that it wrote.
    """
    command = [sys.executable, "-m", "lightning_msnn", *words, "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])


def read(file: Path) -> list[dict[str, str]]:
    """Return the rows of a file of comma-separated values, none if there is no such file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def append(file: Path, row: dict[str, Any]) -> None:
    """Append a row, after a header if the file is new; raise if that of the file is another."""
    there = read(file)
    if there and list(there[0]) != list(row):
        raise ValueError(f"{file} has columns {', '.join(there[0])}, and the row {', '.join(row)}")
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row), lineterminator="\n")
        if not there:
            writer.writeheader()
        writer.writerow(row)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval (Student's t), which is nan of a single value."""
    from scipy.stats import t  # slow to import

    if len(values) < 2:
        return values[0], math.nan
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def with_interval(values: Sequence[float], digits: int) -> str:
    """Return a mean as tables have it: with half of its 95 % interval where there are several values."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
