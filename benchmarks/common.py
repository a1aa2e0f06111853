"""What benchmarks share: files of results, tables on pages, times of contenders that take turns."""

from __future__ import annotations

import csv
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAUSE = 0.02
"""Seconds before each turn, in which the threads of the contender before stop to wait actively."""


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of results, none if there is no such file."""
    file = RESULTS / name
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def write(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of results; numbers with a fraction get four digits."""
    rows = [{key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    with (RESULTS / name).open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def fill(page: Path, mark: str, text: str) -> None:
    """Put a text between the marks of a page, ``<!-- mark -->`` and ``<!-- end of mark -->``.

    Raises:
        ValueError: If the page does not have both marks once.
    """
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page} must have {start} and {end} once each")
    before, after = whole.partition(start)[0], whole.partition(end)[2]
    page.write_text(f"{before}{start}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def with_interval(values: Sequence[float], digits: int) -> str:
    """Return a mean, with half of its 95 % interval (Student's t) where there are several values."""
    from scipy.stats import t  # slow to import

    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def quartiles(values: Iterable[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    values = list(values)
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and what it can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("model name", platform.machine()), found.get("flags", "").split()


def versions(*packages: str) -> str:
    """Return packages, and this one, with their versions."""
    import lightning_msnn

    found = [f"{package} {version(package)}" for package in packages]
    return ", ".join([*found, f"lightning_msnn {lightning_msnn.__version__}"])


Times = dict[str, dict[int, float]]
"""Seconds by contender and round."""


def timed(step: Callable[[], object], least: float = 0.1) -> float:
    """Return the seconds of a step: the mean of as many as fill a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The time of one thread is that of its processor, which other work on the machine hardly moves.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    count, start = 0, clock()
    while count == 0 or clock() - start < least:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return (clock() - start) / count


def race(steps: Mapping[str, Callable[[], object]], rounds: int, least: float = 0.1) -> Times:
    """Let contenders of one process take turns, in alternating order; a step that is not timed goes before each."""
    times: Times = {name: {} for name in steps}
    for i in range(rounds + 1):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            time.sleep(PAUSE)
            steps[name]()
            times[name][i] = timed(steps[name], least)
    return {name: {i: value for i, value in values.items() if i} for name, values in times.items()}


def rows_of(times: Times, place: dict[str, Any], batch: int, references: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each contender: its time, and its speed relative to others, the quartiles over the rounds."""
    rows = []
    for name, values in times.items():
        middle = statistics.median(values.values())
        row = {**place, "batch": batch, "contender": name, "rounds": len(values), "ms": middle * 1e3}
        row["images_per_s"] = batch / middle
        for column, reference in references.items():
            both = values.keys() & times.get(reference, {}).keys()
            ratios = quartiles(times[reference][i] / values[i] for i in both) or ["", "", ""]
            for part, value in zip(("q1", "median", "q3"), ratios, strict=True):
                row[f"speed_relative_to_{column}_{part}"] = value
        rows.append(row)
        shown = {key: value for key, value in row.items() if not key.endswith(("q1", "q3")) and value != ""}
        print(*(f"{x:.3g}" if isinstance(x, float) else x for x in shown.values()), sep=" | ", flush=True)
    return rows
