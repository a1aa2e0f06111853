"""What ``lightning-msnn describe`` says of memory and time beside what trainings need, each in a process of its own.

    python -m benchmarks.describe [--networks msnn_resnet12 ...] [--batch_size 64] [--image_size 32] [--steps 15]

Prints a line a network and writes benchmarks/results/describe_cpu.csv. The training is Lightning's, on handwritten
digits at that size; its memory is the peak beyond what the process held before the network was made, its time the
median of the steps after the first three. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "describe_cpu.csv"
NETWORKS = ("msnn_resnet12", "msnn_resnet20", "msnn_vit12", "msnn_rnn12_tiny")
FIELDS = ("network", "batch_size", "image_size", "said_mib", "measured_mib", "said_s", "measured_s")
SKIPPED = 3


def said(network: str, batch_size: int, image_size: int, steps: int) -> dict[str, float]:
    """Return what describe says."""
    from lightning_msnn.describe import describe

    found = describe(network, "Digits", batch_size=batch_size, image_size=image_size, steps=steps)
    return {"mib": found["memory"] / 2**20, "s": found["step"]}


def measured(network: str, batch_size: int, image_size: int, steps: int) -> dict[str, float]:
    """Return what a training needs."""
    import lightning.pytorch as pl

    from lightning_msnn.data import Digits
    from lightning_msnn.describe import forget_peak, peak_memory
    from lightning_msnn.tasks import SpikingClassifier

    times: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.perf_counter() - self.start)

    data = Digits(batch_size=batch_size, image_size=image_size, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[Clock()],
    )  # fmt: skip
    before = forget_peak()
    task = SpikingClassifier(network, 10, 1)
    trainer.fit(task, datamodule=data)
    return {"mib": (peak_memory() - before) / 2**20, "s": median(times[SKIPPED:])}


def alone(what: str, *arguments: str) -> dict[str, float]:
    """Run one of the two in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.describe", "--one", what, *arguments],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", choices=("said", "measured"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        function = {"said": said, "measured": measured}[given.one]
        print(json.dumps(function(given.networks[0], given.batch_size, given.image_size, given.steps)))
        return
    sizes = [f"--{name}={getattr(given, name)}" for name in ("batch_size", "image_size", "steps")]
    rows = []
    for network in given.networks:
        ours, theirs = (alone(what, "--networks", network, *sizes) for what in ("said", "measured"))
        row = [network, given.batch_size, given.image_size]
        row += [round(ours["mib"], 1), round(theirs["mib"], 1), round(ours["s"], 4), round(theirs["s"], 4)]
        rows.append(row)
        print(
            f"{network:20s} memory {ours['mib']:7.0f} MiB said, {theirs['mib']:7.0f} measured "
            f"({ours['mib'] / theirs['mib'] - 1:+.1%}); step {ours['s']:.3f} s said, {theirs['s']:.3f} measured "
            f"({ours['s'] / theirs['s'] - 1:+.1%})",
            flush=True,
        )
    with given.output.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([FIELDS, *rows])


if __name__ == "__main__":
    main()
