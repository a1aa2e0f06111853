"""A loss that is not finite stops the training before it reaches the weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.errors import TrainingError
from lightning_msnn.runs import AtomicCheckpointIO, FiniteLoss, LastCheckpoint
from lightning_msnn.tasks import SpikingClassifier


class Break(pl.Callback):
    """Break something at step 3."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 3:
            return
        self.weights = {name: value.clone() for name, value in module.named_parameters()}
        if self.what == "batch":
            batch[0][0, 0, 0, 0] = torch.nan
        else:
            module.loss = lambda logits, targets: logits.sum() * torch.inf


@pytest.mark.parametrize("what", ["batch", "loss"])
def test_stops_before_the_weights(tmp_path: Path, what: str) -> None:
    broken, task = Break(what), SpikingClassifier(in_chans=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=1, limit_train_batches=6,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[broken, FiniteLoss()],
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"^the loss is not finite at step 3 \(epoch 0, batch 3\): the checkpoints"):
        trainer.fit(task, datamodule=Digits(batch_size=16))
    assert all(torch.equal(value, broken.weights[name]) for name, value in task.named_parameters())


def test_the_command_line_says_it_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-msnn"])
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    args = ["fit", "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *args,
                "--model.lr",
                "1e38",
                "--trainer.max_epochs",
                "3",
                "--run.every_n_steps",
                "1",
                "--trainer.limit_val_batches",
                "1",
            ]
        )
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("lightning-msnn: error: the loss is not finite at step ")
    run = tmp_path / "runs" / "quickstart" / "version_0"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 1, "the last checkpoint stays"


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
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=3, limit_train_batches=3,
        limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        callbacks=[*([EMA(0.5)] if average else []), BadGradient(5), FiniteLoss(), best, LastCheckpoint(every)],
    )  # fmt: skip
    # The sixth step is the last of the second epoch: the validation behind it sees finite losses, as zeros do.
    with pytest.raises(TrainingError, match=r"is not finite after step 6 \(epoch 1\): it is not saved"):
        trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits(batch_size=16))
    for path, step in ((tmp_path / "checkpoints" / "last.ckpt", 5 if every else 3), (tmp_path / "best.ckpt", 3)):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == step
        assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_finite_training_is_left_alone(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=1, limit_train_batches=3,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[FiniteLoss()],
    )  # fmt: skip
    trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits(batch_size=16))
    assert trainer.global_step == 3
    assert not list(tmp_path.iterdir())
