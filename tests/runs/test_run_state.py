"""Generators, last checkpoint and loggers of a run, where the tests of whole trainings do not look."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_msnn.data import Digits
from lightning_msnn.runs import LastCheckpoint, RandomState
from lightning_msnn.runs.random_state import get_generators, set_generators
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet

CPU = torch.device("cpu")
NETWORK = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8]}


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))  # noqa: NPY002


def test_generators_are_plain_values_and_repeat(tmp_path: Path) -> None:
    draw()  # so that the second of a pair of normal numbers waits in Python's and NumPy's generators
    torch.save(get_generators(CPU), tmp_path / "x")
    first = draw(), draw()
    set_generators(torch.load(tmp_path / "x", weights_only=True), CPU)
    assert (draw(), draw()) == first


def trainer(folder: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    few = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "enable_checkpointing": True}
    return quiet(folder, *callbacks, **{**few, **options})


def test_a_checkpoint_of_more_processes_begins_anew(tmp_path: Path) -> None:
    task, data = SpikingClassifier(in_chans=1, schedule="constant", network_kwargs=NETWORK), Digits(batch_size=8)
    first = trainer(tmp_path, callbacks=[RandomState(), LastCheckpoint()])
    first.fit(task, datamodule=data)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["random_state"] *= 2
    torch.save(content, path)
    second = trainer(tmp_path, max_epochs=2, callbacks=[RandomState(), LastCheckpoint()])
    with pytest.warns(UserWarning, match="the checkpoint is of 2 processes and there are 1: random numbers begin anew"):
        second.fit(task, datamodule=data, ckpt_path=path, weights_only=True)
    assert second.global_step == 4


def test_steps_between_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            path = tmp_path / "checkpoints" / "last.ckpt"
            seen.append(torch.load(path)["global_step"] if path.exists() else 0)

    trainer(tmp_path, limit_train_batches=7, max_epochs=2, callbacks=[LastCheckpoint(3), Look()]).fit(
        SpikingClassifier(in_chans=1, network_kwargs=NETWORK), datamodule=Digits(batch_size=8)
    )
    assert seen == [0, 0, 0, 3, 3, 3, 6, 7, 7, 9, 9, 9, 12, 12]


class Terminate(pl.Callback):
    """Send SIGTERM to this process when a batch begins, in training or in validation."""

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch, self.validation = batch, validation

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.validation and batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.validation and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("options", "terminate", "step"),
    [
        ({"accumulate_grad_batches": 3}, Terminate(4), 2),  # the second of three batches of a step
        ({"accumulate_grad_batches": 3}, Terminate(8), 3),  # the last of the epoch
        ({"val_check_interval": 3}, Terminate(2), 3),  # a validation follows
        ({"val_check_interval": 3}, Terminate(0, validation=True), 3),
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, Terminate(2), 2),  # within a step
    ],
)
def test_sigterm_ends_the_step_and_exits_with_143(
    tmp_path: Path, options: dict[str, Any], terminate: Terminate, step: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, callbacks=[LastCheckpoint(), terminate], limit_train_batches=9, max_epochs=2, **options).fit(
            SpikingClassifier(in_chans=1, network_kwargs=NETWORK), datamodule=Digits(batch_size=8)
        )
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert content["global_step"] == step
    batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert batches == min(9, step * options.get("accumulate_grad_batches", 1)), "no batch of another step"
