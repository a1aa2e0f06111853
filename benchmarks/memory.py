"""Train for some minutes and sample the memory of the process: does it grow after the first epoch?

    python benchmarks/memory.py [--minutes 10] [options of lightning-msnn fit ...]

Prints the resident memory at the end of each tenth of the time, and the slope of a line through all samples after the
first epoch. Exit status 1 if the line rises by more than 1 % of the memory over the whole time.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_msnn.cli import main as lightning_msnn

ROOT = Path(__file__).resolve().parents[1]


def resident() -> float:
    """Return the memory of this process in MiB, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Memory(Callback):
    """Sample the memory once an epoch, and stop after some minutes."""

    samples: ClassVar[list[tuple[float, float]]] = []

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Sample behind all that an epoch and its validation and checkpoint leave."""
        gc.collect()
        elapsed = (time.monotonic() - self.start) / 60
        if trainer.current_epoch > 0:
            self.samples.append((elapsed, resident()))
        trainer.should_stop = elapsed > self.minutes


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        lightning_msnn(
            [
                *("fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--run.folder", folder),
                *("--run.test", "false", "--run.every_n_steps", "10", "--trainer.enable_progress_bar", "false"),
                *("--trainer.max_epochs", "100000", "--trainer.accelerator", "cpu", "--data.policy", "randaugment"),
                *("--trainer.callbacks+", "benchmarks.memory.Memory"),
                *("--trainer.callbacks.minutes", str(arguments.minutes), *options),
            ]
        )
    from benchmarks.memory import Memory as Imported  # the class that the configuration named

    minutes, memory = np.array(Imported.samples).T
    for index in np.linspace(0, len(memory) - 1, 11).astype(int):
        print(f"{minutes[index]:5.1f} min  {memory[index]:7.1f} MiB")
    growth = np.polyfit(minutes, memory, 1)[0] * (minutes[-1] - minutes[0])
    print(f"{len(memory)} epochs; a line through the samples rises by {growth:.2f} MiB of {memory.mean():.0f} MiB")
    sys.exit(int(growth > 0.01 * memory.mean()))


if __name__ == "__main__":
    main()
