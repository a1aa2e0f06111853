"""Checkpoints are written whole or not at all, and a disk that is full does not end a training."""

import csv
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_msnn.callbacks import TrainingCurves
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import AtomicCheckpointIO, LastCheckpoint, LoggerGuard, read_checkpoint, write_whole
from lightning_msnn.tasks import SpikingClassifier


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.ckpt"
    write_whole({"state_dict": {"w": torch.ones(3)}}, path)
    assert read_checkpoint(path)["state_dict"]["w"].tolist() == [1, 1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_an_interruption_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "x.ckpt"
    write_whole({"state_dict": {}, "epoch": 1}, path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if moment == "write" else (Path, "replace")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole({"state_dict": {}, "epoch": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_full_disk(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {}, "epoch": 1}, tmp_path / "a.ckpt")
    with full_disk(5000), pytest.warns(UserWarning, match=r"a.ckpt' cannot be written \(File too large\)"):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(10_000)}, "epoch": 2}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists(), "what was to take its place is not there"
    io.save_checkpoint({"state_dict": {}, "epoch": 3}, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "x.ckpt")


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    partial = tmp_path / f".best.ckpt.{platform.node()}.{child.pid}.partial"
    partial.write_text("half")
    elsewhere = tmp_path / f".best.ckpt.another-machine.{child.pid}.partial"
    elsewhere.write_text("half")
    write_whole({"state_dict": {}}, tmp_path / "last.ckpt")
    assert partial.exists(), "its process lives"
    child.kill()
    child.wait()
    write_whole({"state_dict": {}}, tmp_path / "last.ckpt")
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", elsewhere.name}


def write_again_and_again(path: Path) -> None:
    for number in range(40):
        write_whole({"state_dict": {"w": torch.full((20_000,), number)}}, path)
        assert read_checkpoint(path)["state_dict"]["w"][0] == number


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    """Each writes its own file, and neither removes what the other is writing."""
    names = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=write_again_and_again, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert {p.name for p in tmp_path.iterdir()} == {"a.ckpt", "b.ckpt"}


def test_every_flipped_bit_is_seen_or_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    values = torch.randn(500)
    write_whole({"state_dict": {"w": values}, "epoch": 7}, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    # Bits anywhere, and one of every value.
    inside = whole.index(values.numpy().tobytes()) * 8 + 32 * np.arange(500) + generator.integers(0, 32, 500)
    seen = 0
    for bit in [*generator.integers(0, len(whole) * 8, 300), *inside]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        content = {}
        with suppress(ConfigurationError):
            content = read_checkpoint(path)
        if content:
            assert bit not in inside
            assert content["epoch"] == 7
            assert torch.equal(content["state_dict"]["w"], values)
        seen += not content
    assert seen > 500


def test_other_file_systems_are_left_to_lightning(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, f"file://{tmp_path}/x.ckpt")
    assert torch.load(tmp_path / "x.ckpt") == {"epoch": 1}
    with pytest.raises(TypeError):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "y.ckpt", storage_options={})


class FullFrom(pl.Callback):
    """Have the disk full in the second epoch, and free in the third."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if trainer.current_epoch == 1 else hard, hard))


def test_training_goes_on_with_a_full_disk(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    epochs = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch:
                epochs.append(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["epoch"])

    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, max_epochs=3, limit_train_batches=1, limit_val_batches=1,
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()], log_every_n_steps=1,
        callbacks=[LoggerGuard(), FullFrom(), Look(), LastCheckpoint(),
                   pl.callbacks.ModelCheckpoint(tmp_path / "top", filename="{epoch}", monitor="val/loss", mode="max")],
    )  # fmt: skip
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert epochs == [0, 0], "the last good one stays"
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 2
    assert list((tmp_path / "top").glob("*.ckpt"))
    assert sum("last.ckpt' cannot be written" in str(w.message) for w in recwarn) == 1


class Broken(pl.loggers.CSVLogger):
    """A logger whose server is down from the second call on."""

    calls = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no route to host\nmore")
        super().log_metrics(*args, **kwargs)


def test_a_logger_that_is_down(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    broken, good = Broken(tmp_path / "broken"), pl.loggers.CSVLogger(tmp_path / "good", name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu", logger=[broken, good], max_epochs=2, limit_train_batches=2, limit_val_batches=1,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, enable_checkpointing=False,
        callbacks=[LoggerGuard()],
    )  # fmt: skip
    task, data = SpikingClassifier(in_chans=1), Digits()
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    assert broken.calls == 2
    said = [str(w.message) for w in recwarn if "is down" in str(w.message)]
    assert said == ["Broken is down (no route to host): training goes on without it"]
    with (tmp_path / "good" / "metrics.csv").open() as file:
        assert any(row.get("test/top1") for row in csv.DictReader(file))


def test_curves_that_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=1, limit_train_batches=1,
        limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[TrainingCurves()],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"the training curves .*curves.png' cannot be written \(Is a directory\)"):
        trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits())
