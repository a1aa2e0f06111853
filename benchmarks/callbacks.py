"""What callbacks add to a training step: the monitors, annealed spikes, and a teacher.

    python -m benchmarks.callbacks --rounds 9
    python -m benchmarks.callbacks --network msnn_vit12 --batch_size 64 --out   # and into results/callbacks.csv

Short trainings on random images take turns, with each callback and without any. A cost is the median over the rounds of
a training's time over that of the plain one of its round, beside its quartiles. The monitors log every 50 steps; the
teacher is the trained ReLU baseline of ``msnn_resnet12``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from benchmarks.common import PAUSE, processor, quartiles, read, versions, write
from lightning_msnn import callbacks
from lightning_msnn.tasks import SpikingClassifier

WARM_UP = 3
"""Steps that are not timed."""

CONTENDERS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "monitors": lambda: [callbacks.EnergyMonitor(every_n_steps=50), callbacks.SpikeRateMonitor(every_n_steps=50)],
    "annealed": lambda: [callbacks.SpikeAnnealing(until=0.99)],
    "taught": lambda: [callbacks.Teacher("msnn_resnet12.c100_relu")],
}


class Clock(pl.Callback):
    """Time the steps after the first ones."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Begin."""
        if index == WARM_UP:
            self.begun = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.begun


def seconds(name: str, given: argparse.Namespace) -> float:
    """Return how long the steps of a training take."""
    images = torch.randn(given.batch_size, 3, 32, 32)
    steps = WARM_UP + given.steps
    data = ConcatDataset([TensorDataset(images, torch.arange(given.batch_size) % 100)] * steps)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps, precision=given.precision, devices=1, callbacks=[*CONTENDERS[name](), clock],
            logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(SpikingClassifier(given.network, num_classes=100), DataLoader(data, batch_size=given.batch_size))
    return clock.seconds


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="msnn_resnet12")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", action="store_true", help="write a CSV file too")
    given = parser.parse_args()
    added: dict[str, list[float]] = {name: [] for name in CONTENDERS if name != "plain"}
    for i in range(given.rounds):
        took = {}
        for name in list(CONTENDERS)[:: 1 if i % 2 else -1]:
            time.sleep(PAUSE)
            took[name] = seconds(name, given)
        for name, values in added.items():
            values.append(100 * (took[name] / took["plain"] - 1))
    rows = list(read("callbacks.csv"))
    for name, values in added.items():
        low, middle, high = quartiles(values)
        print(f"{name}: {middle:+.1f} % of a step (quartiles {low:+.1f} and {high:+.1f})")
        row = {"what": name, "added_percent": f"{middle:.1f}", "q1": f"{low:.1f}", "q3": f"{high:.1f}"}
        about = {"rounds": given.rounds, "batch": given.batch_size, "versions": versions("torch"), "date": date.today()}
        rows.append(row | about | {"device": f"{torch.get_num_threads()} cores of {processor()[0]}"})
    if given.out:
        write("callbacks.csv", rows)


if __name__ == "__main__":
    main()
