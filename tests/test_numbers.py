"""Every precision trains without overflow, and everything can be repeated."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_msnn.data import Digits
from lightning_msnn.runs import FiniteLoss
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet
from tests.conftest import COMPILED, SHALLOW

STEPS = 12


class Losses(pl.Callback):
    """Keep the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def train(folder: Path, name: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    pl.seed_everything(0, verbose=False)
    task = SpikingClassifier(name, 10, 1, SHALLOW, lr=0.01, warmup_epochs=0, schedule="constant")
    losses = Losses()
    trainer = quiet(folder, losses, FiniteLoss(), max_steps=STEPS, limit_val_batches=0, **options)
    trainer.fit(task, datamodule=Digits(batch_size=32))
    return task.state_dict(), losses.values


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", COMPILED)
def test_precision(tmp_path: Path, name: str, precision: Any) -> None:
    """fp16 with the gradient scaler too, which Lightning would not use on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    fp16 = precision == "16-mixed"
    options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if fp16 else {"precision": precision}
    state, losses = train(tmp_path, name, **options)
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(value.isfinite().all() for value in state.values())
    assert not fp16 or scaler.get_scale() >= 2.0**12, "few steps overflowed"


@pytest.mark.parametrize("name", COMPILED)
def test_same_seed_same_result(tmp_path: Path, name: str) -> None:
    """With ``deterministic: true``."""
    (first, losses), (again, same) = (train(tmp_path, name, deterministic=True) for _ in range(2))
    torch.use_deterministic_algorithms(False)
    assert losses == same
    assert all(torch.equal(first[key], again[key]) for key in first)
