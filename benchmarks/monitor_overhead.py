"""What the monitors cost: time of training steps with both, logging every 50 steps, over that without, in one run.

Blocks of steps with and without take turns, so that what else the machine does falls on both alike; the ratio is that
of the medians over the blocks. On a machine that is busy with something else, the processor's time says more than the
clock's. Prints a table.

    python benchmarks/monitor_overhead.py --network msnn_resnet12 --batch_size 128 --blocks 5
"""

import argparse
import platform
import statistics
import tempfile
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_msnn.callbacks import EnergyMonitor, SpikeRateMonitor
from lightning_msnn.tasks import SpikingClassifier


class Turns(Callback):
    """Switches callbacks on and off by blocks of steps, and times the blocks."""

    def __init__(self, monitors: list[Callback], steps: int) -> None:
        self.monitors, self.steps = monitors, steps
        self.seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        self.begun = (0.0, 0.0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: D102
        block, step = divmod(batch_idx, self.steps)
        if step == 0:
            self.begun = (time.perf_counter(), time.process_time())
            others = [c for c in trainer.callbacks if c not in self.monitors]
            trainer.callbacks[:] = [*self.monitors, *others] if block % 2 else others

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: D102
        block, step = divmod(batch_idx, self.steps)
        if step == self.steps - 1 and block >= 2:  # the first of each kind warms up
            clock, processor = self.begun
            self.seconds[bool(block % 2)].append((time.perf_counter() - clock, time.process_time() - processor))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="msnn_resnet12")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--every_n_steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each kind, besides one that warms up")
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()
    steps, n = args.every_n_steps, args.batch_size
    total = steps * 2 * (args.blocks + 1)
    images = torch.randn(n, 3, args.image_size, args.image_size)
    data = torch.utils.data.ConcatDataset([TensorDataset(images, torch.arange(n) % 10)] * total)
    monitors: list[Callback] = [EnergyMonitor(every_n_steps=steps), SpikeRateMonitor(every_n_steps=steps)]
    turns = Turns(monitors, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=total,
            accelerator=args.accelerator,
            devices=1,
            callbacks=[*monitors, turns],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(SpikingClassifier(args.network, num_classes=10), DataLoader(data, batch_size=n))
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else platform.processor()
    print(f"{args.network}, {args.image_size}x{args.image_size}, batches of {n}, {device or platform.machine()}")
    print(f"medians of {args.blocks} blocks of {steps} steps, with and without taking turns, ms a step")
    print(f"{'':20} {'without':>10} {f'every {steps}':>10} {'ratio':>8}")
    for row, name in enumerate(("clock", "processor")):
        without, watched = (statistics.median(t[row] for t in turns.seconds[kind]) / steps for kind in (False, True))
        print(f"{name:20} {without * 1e3:10.2f} {watched * 1e3:10.2f} {watched / without:8.4f}")


if __name__ == "__main__":
    main()
