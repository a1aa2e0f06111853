"""Checkpoints are written whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import AtomicCheckpointIO, read_checkpoint, write_whole


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_written_whole(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "new" / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, f"{prefix}{path}")
    assert read_checkpoint(path)["state_dict"]["w"].tolist() == [1, 1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]


def test_an_interruption_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is half written lies beside it, in the same folder and so on the same disk."""
    path = tmp_path / "x.ckpt"
    write_whole({"state_dict": {}, "epoch": 1}, path)

    def interrupt(self: Path, *_: Any) -> None:
        assert self.parent == tmp_path
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole({"state_dict": {}, "epoch": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 1
    write_whole({"state_dict": {}, "epoch": 3}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_full_disk_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(b"old", path := tmp_path / "x.ckpt")

    def write(self: Path, _: bytes = b"") -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(ConfigurationError, match=f"cannot write '{path}': No space left on device"):
        write_whole(b"new", path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.ckpt", b"old")]
    monkeypatch.setattr(Path, "unlink", write)  # of a folder that is read-only
    with pytest.raises(ConfigurationError, match="cannot write"):
        write_whole(b"new", path)
