"""The moving average of weights and buffers, in every precision, beside a plain loop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import EMA
from lightning_msnn.data import Digits
from lightning_msnn.tasks import SpikingClassifier

DECAY = 0.25  # reached after the second step, so that both sides of the minimum count
TINY = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8]}


class Keep(pl.Callback):
    """Keep the weights and buffers being trained after each step, and those that validation sees."""

    def __init__(self) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.trained.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.validated.append({name: value.clone() for name, value in module.state_dict().items()})


@pytest.mark.parametrize(
    ("precision", "kept", "of_average"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_is_the_average_of_a_plain_loop(
    tmp_path: Path, precision: Any, kept: torch.dtype, of_average: torch.dtype
) -> None:
    keep, average = Keep(), EMA(DECAY)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=2, limit_train_batches=3,
        limit_val_batches=1, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, precision=precision, callbacks=[average, keep],
    )  # fmt: skip
    torch.manual_seed(0)
    task = SpikingClassifier(in_chans=1, lr=0.05, warmup_epochs=0, network_kwargs=TINY)
    trainer.fit(task, datamodule=Digits(batch_size=16))

    expected = {name: value.double() for name, value in keep.trained[0].items()}
    for step, state in enumerate(keep.trained[1:], start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in state.items():
            assert value.dtype == (kept if value.is_floating_point() else torch.int64)
            share = 1 - decay if value.is_floating_point() else 1.0
            expected[name] = expected[name] + share * (value.double() - expected[name])
        if step % 3 == 2:
            seen = keep.validated[step // 3]
            for name, value in seen.items():
                torch.testing.assert_close(value.double(), expected[name], rtol=2 * torch.finfo(kept).eps, atol=1e-6)
    buffers = [name for name in expected if "running" in name]
    assert buffers
    last = keep.trained[-1]
    assert all(not torch.equal(last[name].double(), expected[name]) for name in buffers), "else the test says nothing"
    assert average._average_model is not None
    found = average._average_model.module.state_dict()
    assert found.keys() == expected.keys()
    eps = 8 * torch.finfo(of_average).eps
    for name, value in found.items():
        assert value.dtype == (of_average if value.is_floating_point() else torch.int64)
        torch.testing.assert_close(value.double(), expected[name], rtol=eps, atol=eps, msg=name)
    for name, value in task.state_dict().items():
        assert torch.equal(value, found[name].to(value.dtype)), "the average is the result"
