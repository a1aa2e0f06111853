"""A short training of a small task on digits."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_msnn.data import Digits
from lightning_msnn.runs import AtomicCheckpointIO
from lightning_msnn.tasks import SpikingClassifier

NETWORK = {"depths": [1, 1], "widths": [8, 8]}
RELU = {**NETWORK, "spiking": False, "windows": "single"}
ENTRY = "msnn_resnet12_tiny.digits"


class StopEarly(pl.Callback):
    """Stop after the first epoch of those that are planned."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


def quiet(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes, logs and shows nothing unless an option says so."""
    given: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    given |= {"enable_progress_bar": False, "enable_model_summary": False, **options}
    return pl.Trainer(callbacks=list(callbacks), accelerator="cpu", default_root_dir=folder, **given)


def fit(
    folder: Path,
    *callbacks: pl.Callback,
    epochs: int = 1,
    ckpt_path: Path | None = None,
    trainer: dict[str, Any] | None = None,
    data: Any = None,
    **task: Any,
) -> tuple[SpikingClassifier, pl.Trainer]:
    """Train four batches an epoch, write ``x.ckpt``, and return task and trainer."""
    pl.seed_everything(0, verbose=False)
    given = {"network": "msnn_resnet12_tiny", "in_chans": 1, "network_kwargs": dict(NETWORK), "schedule": "constant"}
    module = SpikingClassifier(**{**given, **task})
    options = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0, **(trainer or {})}
    own = quiet(folder, *callbacks, max_epochs=epochs, plugins=[AtomicCheckpointIO()], **options)
    data = Digits(batch_size=16, image_size=8, num_workers=0) if data is None else data
    own.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    own.save_checkpoint(folder / "x.ckpt")
    return module, own
