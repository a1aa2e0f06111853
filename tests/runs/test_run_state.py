"""Generators, last checkpoint and loggers of a run, where the tests of whole trainings do not look."""

import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import LastCheckpoint, RandomState
from lightning_msnn.runs.last_checkpoint import _slurm_job
from lightning_msnn.runs.random_state import get_generators, set_generators
from lightning_msnn.tasks import SpikingClassifier

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))  # noqa: NPY002


def test_generators_are_plain_values_and_repeat(tmp_path: Path) -> None:
    draw()  # so that the second of a pair of normal numbers waits in Python's and NumPy's generators
    torch.save(get_generators(CPU), tmp_path / "x")
    first = draw(), draw()
    set_generators(torch.load(tmp_path / "x", weights_only=True), CPU)
    assert (draw(), draw()) == first


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "default_root_dir": folder, "max_epochs": 1,
            "limit_train_batches": 2, "limit_val_batches": 1, "enable_progress_bar": False,
            "enable_model_summary": False, **options,
        }
    )  # fmt: skip


def test_a_checkpoint_of_more_processes_begins_anew(tmp_path: Path) -> None:
    task, data = SpikingClassifier(in_chans=1), Digits()
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


def test_a_development_run_leaves_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True, callbacks=[LastCheckpoint(1)]).fit(
        SpikingClassifier(in_chans=1), datamodule=Digits()
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [-1, 1.5, "1", True])
def test_steps_between_checkpoints(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match="every_n_steps must be an integer of at least 0"):
        LastCheckpoint(steps)


def test_steps_between_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            path = tmp_path / "checkpoints" / "last.ckpt"
            seen.append(torch.load(path)["global_step"] if path.exists() else 0)

    trainer(tmp_path, limit_train_batches=7, max_epochs=2, callbacks=[LastCheckpoint(3), Look()]).fit(
        SpikingClassifier(in_chans=1), datamodule=Digits()
    )
    assert seen == [0, 0, 0, 3, 3, 3, 6, 7, 7, 9, 9, 9, 12, 12]


def test_slurm_names_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert _slurm_job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert _slurm_job() == "5_2"


def test_other_signals_are_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    trainer(tmp_path, callbacks=[LastCheckpoint()]).fit(SpikingClassifier(in_chans=1), datamodule=Digits())
    assert signal.getsignal(signal.SIGUSR1) == before


def test_sigterm_among_accumulated_batches_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    """Gradients are no part of a checkpoint."""
    import os

    class Terminate(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"limit_train_batches": 9, "accumulate_grad_batches": 3}
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[LastCheckpoint(1), Terminate()], **options).fit(
            SpikingClassifier(in_chans=1), datamodule=Digits()
        )
    signal.signal(signal.SIGTERM, before)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1
