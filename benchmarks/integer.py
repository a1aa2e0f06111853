"""How fast inference in integers is, beside the same network folded in bf16 and its trained ReLU twin.

    python -m benchmarks.integer                                      # AMX, where the processor has it
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.integer  # AVX-512 with VNNI alone
    python -m benchmarks.integer --out                                # and into results/integer_<isa>.csv
    python -m benchmarks.integer report                               # the table of docs/export.md

The contenders take turns in one process, in alternating order. A ratio is the median over the rounds of the ratio
within a round, beside its quartiles. One thread (``--threads 1``) is timed by its processor time, which other work on
the machine hardly moves. Integers run with the analogue stream in bf16 and in float32.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import images
from benchmarks.pages import fill
from benchmarks.speed import FLAGS, processor
from lightning_msnn import zoo
from lightning_msnn.kernels.layer import kernels_of
from lightning_msnn.models.twins import ann_twin, calibrate
from lightning_msnn.nn.folding import fold_batch_norm

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "export.md"
ISAS = {"amx": "with AMX", "avx512_core_bf16": "AVX-512 with VNNI alone"}
FOLDED, TWIN, NARROW, WIDE = "folded, bf16", "ReLU twin, folded, bf16", "integers, bf16", "integers, float32"


def contenders(name: str) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Return the networks with the types of their analogue parts; the twin is the trained one where there is one."""
    twin = f"{name}_relu"
    narrow, wide = torch.bfloat16, torch.float32
    made: dict[str, tuple[nn.Module, torch.dtype]] = {
        FOLDED: (zoo.load(name, fuse=True), narrow),
        TWIN: (
            zoo.load(twin, fuse=True)
            if twin in zoo.list_models()
            else fold_batch_norm(calibrate(ann_twin(zoo.load(name)), images(64))),
            narrow,
        ),
        NARROW: (zoo.load(name, integer=True), narrow),
        WIDE: (zoo.load(name, integer=True), wide),
    }
    return {key: (net.to(dtype, memory_format=torch.channels_last), dtype) for key, (net, dtype) in made.items()}


def timed(step: Callable[[], object], least: float) -> float:
    """Return the seconds of a step, the mean of as many as fill a time, after one that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    step()
    count, start = 0, clock()
    while count == 0 or clock() - start < least:
        step()
        count += 1
    return (clock() - start) / count


@torch.inference_mode()
def race(networks: dict[str, tuple[nn.Module, torch.dtype]], batch: int, seconds: float) -> dict[str, list[float]]:
    """Let networks take turns for a time; return the seconds of each by round."""
    x = images(batch)
    steps = {name: partial(network, x.to(dtype)) for name, (network, dtype) in networks.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[FOLDED]) < 3:
        for name in list(steps)[:: 1 if len(times[FOLDED]) % 2 else -1]:
            times[name].append(timed(steps[name], 0.05))
    return times


def rows_of(times: dict[str, list[float]], place: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """One row for each contender: its time, and its speed relative to the folded network and to the twin."""
    rows = []
    for name, values in times.items():
        row = {**place, "batch": batch, "contender": name, "rounds": len(values), "ms": statistics.median(values) * 1e3}
        for column, other in (("folded", FOLDED), ("twin", TWIN)):
            ratios = [a / b for a, b in zip(times[other], values, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row |= {f"relative_to_{column}_{part}": v for part, v in (("q1", low), ("median", middle), ("q3", high))}
        rows.append(row)
    return rows


def table() -> str:
    """The table of what is measured: of each processor, times as fast as the folded network and as the trained twin."""
    lines = [
        f"| processor | batch | {FOLDED} | {NARROW} | times as fast as folded | as {TWIN} |",
        "|---|---|---|---|---|---|",
    ]
    sources = []
    for file in sorted(RESULTS.glob("integer_*.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row["contender"] in (FOLDED, NARROW)]
        for folded, own in zip(rows[::2], rows[1::2], strict=True):
            ratios = [
                f"{float(own[f'relative_to_{of}_median']):.2f} "
                f"({float(own[f'relative_to_{of}_q1']):.2f} to {float(own[f'relative_to_{of}_q3']):.2f})"
                for of in ("folded", "twin")
            ]
            times = [f"{float(row['ms']):.1f} ms" for row in (folded, own)]
            lines.append(" | ".join([f"| {ISAS.get(own['isa'], own['isa'])}", own["batch"], *times, *ratios]) + " |")
        sources.append(f"`{rows[0]['network']}`, {rows[0]['device']}; {rows[0]['versions']}; {rows[0]['date']}.")
    return "\n".join([*lines, "", *dict.fromkeys(sources)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["msnn_resnet12.c100"], help="entries of the zoo, or 'report'")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--seconds", type=float, default=15.0, help="time of each race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", action="store_true", help="write a CSV file too")
    given = parser.parse_args()
    if given.names == ["report"]:
        fill(PAGE, "integers", table())
        return
    torch.set_num_threads(given.threads)
    device, flags = processor()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", next((name for name, flag in FLAGS.items() if flag in flags), "other"))
    kernels = getattr(kernels_of(images(1, 16)), "__name__", "reference").rpartition(".")[2]
    about = {
        "isa": isa.lower(),
        "device": f"{given.threads} cores of {device}",
        "versions": f"torch {version('torch')}, kernels: {kernels}",
        "date": date.today().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    for name in map(zoo.resolve, given.names):
        networks = contenders(name)
        for batch in given.batch:
            rows += rows_of(race(networks, batch, given.seconds), {"network": name}, batch)
            for row in rows[-len(networks) :]:
                print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), sep=" | ", flush=True)
    if given.out:
        with (RESULTS / f"integer_{isa.lower()}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | about).items()} for row in rows
            )


if __name__ == "__main__":
    main()
