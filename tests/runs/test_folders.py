"""Each run has a folder of its own."""

from pathlib import Path

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_msnn.callbacks import BestCheckpoint, EnergyMonitor, SpikeRateMonitor, TrainingCurves
from lightning_msnn.data import Digits
from lightning_msnn.runs import AtomicCheckpointIO, LastCheckpoint, claim_version, newest_version, release_version
from lightning_msnn.tasks import SpikingClassifier


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


@pytest.mark.parametrize("place", ["~/runs", "file://{}/runs"])
def test_all_files_of_a_run_are_in_one_place(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    train(place.format(tmp_path), logger=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"checkpoints", *FILES}


@pytest.mark.parametrize("logger", [True, False])
def test_a_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: bool) -> None:
    monkeypatch.chdir(tmp_path)
    train(str(tmp_path), logger=logger, fast_dev_run=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["curves", "curves.xyz", ""])
def test_pictures_of_no_known_kind_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="filename must end with one of .png"):
        TrainingCurves(name)


def claim(base: Path, queue: "torch.multiprocessing.SimpleQueue") -> None:
    queue.put([claim_version(base).version for _ in range(25)])


def test_no_two_processes_get_one_folder(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=claim, args=(tmp_path / "runs", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    numbers = [number for _ in processes for number in queue.get()]
    for process in processes:
        process.join()
    assert sorted(numbers) == list(range(75))


def test_a_folder_that_appears_meanwhile_is_left_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir
    made: list[str] = []

    def late(self: Path, *args: object, **kwargs: object) -> None:
        if self.name == "version_0" and not made:
            made.append("by another process")
            make(self)
        make(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", late)
    assert claim_version(tmp_path).version == 1


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert claim_version(tmp_path / "runs") == (0, [])
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "version_4").mkdir(parents=True)
    assert claim_version(tmp_path / "runs") == (4, []), "which the first process claims before it starts the others"


def test_newest_and_resumable(tmp_path: Path) -> None:
    assert newest_version(tmp_path / "no") is None
    for name in ("version_0", "version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_2" / "checkpoints").mkdir()
    (tmp_path / "version_2" / "checkpoints" / "last.ckpt").touch()
    assert newest_version(tmp_path) == 10
    assert newest_version(tmp_path, resumable=True) == 2
    assert claim_version(tmp_path).version == 11


def test_released_if_nothing_was_written(tmp_path: Path) -> None:
    base = tmp_path / "of the user" / "runs" / "x"
    (tmp_path / "of the user").mkdir()
    first, second = claim_version(base), claim_version(base)
    assert (first.version, second.version) == (0, 1)
    release_version(first)
    assert [p.name for p in base.iterdir()] == ["version_1"]
    (base / "version_1" / "metrics.csv").touch()
    release_version(second)
    assert (base / "version_1" / "metrics.csv").exists()
    third = claim_version(tmp_path / "of the user" / "more" / "y")
    release_version(third)
    assert [p.name for p in (tmp_path / "of the user").iterdir()] == ["runs"], "what was there before stays"
