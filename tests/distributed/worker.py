"""Evaluate and train with a number of processes, and write down what each of them has then.

python worker.py ROOT OUT DEVICES
"""

import random
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_msnn.callbacks import EMA, EnergyTarget, Mixing, Whitening
from lightning_msnn.data import ImageFolder
from lightning_msnn.runs import AtomicCheckpointIO, FiniteLoss, LastCheckpoint, RandomState
from lightning_msnn.runs.random_state import get_generators, set_generators
from lightning_msnn.tasks import SpikingClassifier


class Watch(pl.Callback):
    """Keep what the generators would give next, before each step."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        states = get_generators(module.device)
        self.drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
        set_generators(states, module.device)


def main(root: str, out: str, devices: int) -> None:
    pl.seed_everything(5)
    data = ImageFolder(root=root, image_size=8, batch_size=16, val_fraction=0.35)
    task = SpikingClassifier(
        "msnn_resnet12_tiny",
        3,
        network_kwargs={"depths": [1, 1, 1, 1], "widths": [8] * 4, "stem": "whitened"},
        lr=0.001,
    )
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto", "logger": False,
        "default_root_dir": out, "enable_progress_bar": False, "enable_model_summary": False,
        "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    watch, target = Watch(), EnergyTarget(rate=0.05)
    callbacks = [
        Mixing(mixup=0.5),
        target,
        EMA(0.9),
        Whitening(),
        RandomState(),
        LastCheckpoint(2),
        FiniteLoss(),
        watch,
    ]
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **options)
    result = {
        "validate": trainer.validate(task, datamodule=data, verbose=False)[0],
        "test": trainer.test(task, datamodule=data, verbose=False)[0],
    }
    trainer.fit(task, datamodule=data)
    result |= {
        "weights": task.state_dict(),
        "keys": sorted(trainer.callback_metrics),
        "fit": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        "drawn": watch.drawn,
        "steps": trainer.global_step,
        "target": target.state_dict(),
    }
    torch.save(result, Path(out) / f"rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
