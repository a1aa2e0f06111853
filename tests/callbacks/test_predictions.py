"""Predictions as a CSV file: checked before any work, written as they come, whole at the end."""

import csv
import os
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_msnn.callbacks import PredictionWriter
from lightning_msnn.callbacks.predictions import _order
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import write_whole
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet

NAMES = ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\tx", "\rx", "plain", 'com,ma "quoted"', "a=b", "ä.png"]


class Named(pl.LightningModule):
    """Predicts a name for each row, and can break."""

    def __init__(self, breaks_at=None, watch=lambda: None):
        super().__init__()
        self.breaks_at, self.watch = breaks_at, watch

    def predict_step(self, batch, batch_idx):
        self.watch()
        if batch_idx == self.breaks_at:
            raise RuntimeError("broken")
        indices = batch.long().tolist()
        return {"file": [NAMES[i] for i in indices], "class": [NAMES[-1 - i] for i in indices], "probability": batch}


def predict(module, path):
    trainer = quiet(path.parent, PredictionWriter(str(path)))
    trainer.predict(module, DataLoader(torch.arange(len(NAMES)).double(), 2), return_predictions=False)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_no_cell_is_a_formula(tmp_path):
    predict(Named(), tmp_path / "p.csv")
    head, *body = rows(tmp_path / "p.csv")
    assert head == ["file", "class", "probability"]
    assert [row[0] for row in body] == [("'" if name[0] in "=+-@\t\r" else "") + name for name in NAMES]
    assert not any(cell[0] in "=+-@\t\r" for row in body for cell in row)
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_rows_come_as_they_are_made_and_an_older_file_stays_until_the_end(tmp_path):
    (tmp_path / "p.csv").write_text("old")
    seen, part = [], tmp_path / f"p.csv.part{os.getpid()}"  # another process has another
    module = Named(breaks_at=3, watch=lambda: seen.append(len(rows(part))))
    with pytest.raises(RuntimeError, match="broken"):
        predict(module, tmp_path / "p.csv")
    assert seen == [1, 3, 5, 7], "two rows a batch, below the head"
    assert (tmp_path / "p.csv").read_text() == "old"
    assert len(rows(part)) == 7, "the work done is not lost"
    predict(Named(), tmp_path / "p.csv")
    assert len(rows(tmp_path / "p.csv")) == 1 + len(NAMES)
    assert not part.exists()


def test_a_name_that_is_not_utf_8_keeps_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NAMES", [*NAMES[:-1], os.fsdecode(b"\xff.png")])
    predict(Named(), tmp_path / "p.csv")
    assert b"\n\xff.png," in (tmp_path / "p.csv").read_bytes()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigurationError, match=f"cannot write predictions to '{path}': it must be a file"):
            PredictionWriter(str(path))
    with pytest.raises(ConfigurationError, match="cannot write predictions to 'nowhere/p.csv': No such file"):
        PredictionWriter("nowhere/p.csv").setup(None, None, "predict")
    with pytest.raises(ConfigurationError, match="is no file, so that it is not replaced"):
        write_whole(b"", tmp_path / "pipe")


def test_rows_of_several_processes_are_in_order():
    rows = [("b", "10"), ("b", "2"), ("10", "1"), ("9", "1"), ("0/1", "1")]
    assert sorted(rows, key=_order) == [("9", "1"), ("10", "1"), ("0/1", "1"), ("b", "2"), ("b", "10")]


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_without_names_have_their_own_in_each_process(processes):
    task = SpikingClassifier(in_chans=1, network_kwargs={"depths": [1, 1], "widths": [8, 8]}).eval()
    task.trainer = SimpleNamespace(world_size=processes, global_rank=1)
    names = task.predict_step(torch.rand(2, 1, 8, 8), 3)["file"]
    assert names == (["3/0", "3/1"] if processes == 1 else ["1/3/0", "1/3/1"])
