"""Which checkpoint is kept."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_msnn.callbacks import BestCheckpoint
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import read_checkpoint
from tests.callbacks.training import quiet

LOADER = torch.utils.data.DataLoader(torch.ones(2, 1), 2)


class Scripted(pl.LightningModule):
    """Logs one given value after the other."""

    def __init__(self, values):
        super().__init__()
        self.values, self.layer = values, nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/top1", torch.tensor(self.values[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("mode", "values", "epoch"),
    [
        ("max", [0.2, 0.9, 0.5], 1),
        ("max", [1.0, 1.0, 1.0, 0.9], 2),
        ("max", [0.5, 0.9, 0.9, 0.8, 0.9, 0.1], 4),
        ("min", [0.5, 0.1, 0.1, 0.2], 2),
        ("max", [float("nan"), 0.1, float("nan")], 1),
    ],
)
def test_the_last_of_the_best_is_kept(mode, values, epoch, tmp_path):
    best = BestCheckpoint(mode=mode)
    trainer = quiet(tmp_path, best, max_epochs=len(values), enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(Scripted(values), LOADER, LOADER)
    assert read_checkpoint(best.best_model_path)["epoch"] == epoch
    assert float(best.best_model_score) == pytest.approx(values[epoch])
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["best.ckpt"]


def test_a_task_of_this_package_must_log_the_metric_in_training_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "__module__", "lightning_msnn.tasks")
    trainer = quiet(tmp_path, BestCheckpoint("val/other"), max_epochs=1, enable_checkpointing=True)
    assert "val/top1" in trainer.validate(Scripted([0.5]), LOADER, verbose=False)[0]
    with pytest.raises(ConfigurationError, match="no metric 'val/other' is logged"):
        trainer.fit(Scripted([0.5]), LOADER, LOADER)
    assert trainer.global_step == 0


def test_a_metric_that_is_missing_is_named_at_the_first_validation(tmp_path):
    best = BestCheckpoint("val/other")
    trainer = quiet(tmp_path, best, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no metric 'val/other' is logged, .* logged are val/top1; did you") as said:
        trainer.fit(Scripted([0.5, 0.6]), LOADER, LOADER)
    assert sum("'val/other'" in str(each.message) for each in said) == 1
    assert not best.best_model_path
