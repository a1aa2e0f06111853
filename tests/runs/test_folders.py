"""Each run has a folder of its own."""

from pathlib import Path

import fsspec
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_msnn.callbacks import BestCheckpoint, EnergyMonitor, SpikeRateMonitor, TrainingCurves
from lightning_msnn.data import Digits
from lightning_msnn.runs import AtomicCheckpointIO, LastCheckpoint, RandomState
from lightning_msnn.runs.trainer import LAST
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet


class Service(DummyLogger):
    """As the logger of a service: runs of a project have identifiers, and one folder on this machine."""

    def __init__(self, save_dir: str | None = ".", version: str = "a1") -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    save_dir = property(lambda self: self._save_dir)  # type: ignore[assignment]
    name = property(lambda self: "project")  # type: ignore[assignment]
    version = property(lambda self: self._version)  # type: ignore[assignment]


SMALL = {"depths": (1, 1), "widths": (16, 16)}
FILES = {"curves.png", "energy.json", "energy.png", "spike_rate.png", "windows.png"}


def train(folder: str, epochs: int = 1, resume: str | None = None, **kwargs: object) -> None:
    callbacks = [BestCheckpoint(), LastCheckpoint(), TrainingCurves(), EnergyMonitor(), SpikeRateMonitor()]
    small = {"max_epochs": epochs, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **small, **quiet, **kwargs)  # type: ignore[arg-type]
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, SMALL, schedule="constant")
    trainer.fit(task, datamodule=Digits(batch_size=8), ckpt_path=resume)
    trainer.test(task, datamodule=Digits(batch_size=8), verbose=False)


def test_runs_of_a_service_do_not_share_a_folder(tmp_path: Path) -> None:
    """All files of a run are where Lightning's own checkpoints are."""
    train(str(tmp_path / "unused"), logger=Service(str(tmp_path), "a1"))
    train(str(tmp_path), logger=Service(None, "b2"))
    assert {path.name for path in tmp_path.iterdir()} == {"project"}
    for version in ("a1", "b2"):
        folder = tmp_path / "project" / version
        assert {path.name for path in folder.iterdir()} == {"checkpoints", *FILES}
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_run_in_a_url_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plugins = [AtomicCheckpointIO()]
    train("memory://bucket/run", logger=False, plugins=plugins)
    train("memory://bucket/run", 2, resume="memory://bucket/run/checkpoints/last.ckpt", logger=False, plugins=plugins)
    files = fsspec.filesystem("memory")
    assert {path.rpartition("/")[2] for path in files.ls("/bucket/run", detail=False)} == {"checkpoints", *FILES}
    names = {path.rpartition("/")[2] for path in files.ls("/bucket/run/checkpoints", detail=False)}
    assert names == {"best.ckpt", "last.ckpt"}
    assert not list(tmp_path.iterdir())


def test_all_files_of_a_run_are_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    train("~/runs", logger=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"checkpoints", *FILES}


def test_a_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(str(tmp_path), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_the_users_own_beside_the_last_one(tmp_path: Path) -> None:
    """Lightning takes theirs for the best, and what it kept is known when resumed, also with a slash in its name."""
    for epochs in (1, 2):
        own = ModelCheckpoint(monitor="val/top1", save_top_k=2, filename="{epoch}-{val/top1:.3f}")
        trainer = quiet(
            tmp_path, RandomState(), LastCheckpoint(), own, max_epochs=epochs, enable_checkpointing=True,
            limit_train_batches=2, limit_val_batches=1,
        )  # fmt: skip
        task, last = SpikingClassifier("msnn_resnet12_tiny", 10, 1, SMALL, schedule="constant"), tmp_path / LAST
        resumed = str(last) if last.exists() else None
        trainer.fit(task, datamodule=Digits(batch_size=8), ckpt_path=resumed, weights_only=True)
        assert len(own.best_k_models) == epochs
    trainer.test(datamodule=Digits(batch_size=8), ckpt_path="best", verbose=False, weights_only=True)
