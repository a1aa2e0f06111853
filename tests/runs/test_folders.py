"""Each run has a folder of its own."""

from pathlib import Path

import pytest
import torch

from lightning_msnn.runs import claim_version, newest_version, release_version


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
