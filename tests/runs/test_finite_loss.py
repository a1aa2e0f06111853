"""A loss that is not finite stops the training before it reaches the weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import EMA
from lightning_msnn.data import Digits
from lightning_msnn.errors import TrainingError
from lightning_msnn.runs import AtomicCheckpointIO, FiniteLoss, LastCheckpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet


class Break(pl.Callback):
    """Break the batch of step 3."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            self.weights = {name: value.clone() for name, value in module.named_parameters()}
            batch[0][0, 0, 0, 0] = torch.nan


def test_stops_before_the_weights(tmp_path: Path) -> None:
    broken, task = Break(), SpikingClassifier(in_chans=1)
    trainer = quiet(tmp_path, broken, FiniteLoss(), max_epochs=1, limit_train_batches=6, limit_val_batches=0)
    with pytest.raises(TrainingError, match=r"^the loss is not finite at step 3 \(epoch 0, batch 3\): the checkpoints"):
        trainer.fit(task, datamodule=Digits(batch_size=16))
    assert all(torch.equal(value, broken.weights[name]) for name, value in task.named_parameters())


class BadGradient(pl.Callback):
    """Give one step a finite loss and a gradient that is not a number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == self.step:
            next(module.parameters()).grad.fill_(torch.nan)


@pytest.mark.parametrize(("every", "average"), [(0, False), (1, True)])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, every: int, average: bool) -> None:
    pl.seed_everything(0, verbose=False)
    best = pl.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    callbacks = [*([EMA(0.5)] if average else []), BadGradient(5), FiniteLoss(), best, LastCheckpoint(every)]
    more = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    trainer = quiet(tmp_path, *callbacks, max_epochs=3, limit_train_batches=3, limit_val_batches=1, **more)
    task = SpikingClassifier(in_chans=1)
    task.register_buffer("mask", torch.tensor(0.0 if average else -torch.inf))  # infinite on purpose
    # The sixth step is the last of the second epoch: the validation behind it sees finite losses, as zeros do.
    with pytest.raises(TrainingError, match=r"is not finite after step 6 \(epoch 1\): it is not saved"):
        trainer.fit(task, datamodule=Digits(batch_size=16))
    for path, step in ((tmp_path / "checkpoints" / "last.ckpt", 5 if every else 3), (tmp_path / "best.ckpt", 3)):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == step
        assert all(value.isfinite().all() for name, value in content["state_dict"].items() if name != "mask")
