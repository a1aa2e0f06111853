"""The moving average of weights and buffers beside a plain loop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from lightning_msnn.callbacks import EMA
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import fit

DECAY = 0.25  # reached after the second step, so that both sides of the minimum count


class Keep(pl.Callback):
    """Keep the weights and buffers being trained after each step, and those that validation sees."""

    def __init__(self) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.trained.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.validated.append({name: value.clone() for name, value in module.state_dict().items()})


def test_is_the_average_of_a_plain_loop(tmp_path: Path) -> None:
    keep = Keep()
    task, _ = fit(tmp_path, EMA(DECAY), keep, lr=0.05, epochs=2)
    expected = {name: value.double() for name, value in keep.trained[0].items()}
    for step, state in enumerate(keep.trained[1:], start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in state.items():
            share = 1 - decay if value.is_floating_point() else 1.0
            expected[name] = expected[name] + share * (value.double() - expected[name])
        if step % 4 == 3:
            seen = keep.validated[step // 4]
            for name, value in seen.items():
                torch.testing.assert_close(value.double(), expected[name], rtol=3e-7, atol=1e-6)
    buffers = [name for name in expected if "running" in name]
    assert buffers
    last = keep.trained[-1]
    assert all(not torch.equal(last[name].double(), expected[name]) for name in buffers), "else the test says nothing"
    found = task.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_checkpoint_is_validated_and_tested_as_it_is(tmp_path: Path) -> None:
    """After a training too, whose average is not put in its place."""
    task, trainer = fit(tmp_path, EMA(0.9))
    task.network.head.fc.weight.data.zero_()
    for evaluate in (trainer.validate, trainer.test):
        evaluate(
            task, datamodule=Digits(batch_size=16), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False
        )
        saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(task.network.head.fc.weight, saved["network.head.fc.weight"])


def test_weights_in_pieces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(ConfigurationError, match="EMA must be left out with FSDPStrategy"):
        EMA().setup(trainer, SpikingClassifier(), "fit")
