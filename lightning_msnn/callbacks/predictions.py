"""Predictions as a CSV file."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_msnn.errors import ConfigurationError

__all__ = ["PredictionWriter"]


class PredictionWriter(Callback):
    """Write what ``predict_step`` returned to a CSV file with the columns file, class, probability.

    With several processes the first one writes the rows of all, in the order of the files' names.

    Args:
        path: The CSV file; it appears whole or not at all.

    Raises:
        ConfigurationError: If the folder of the file does not exist.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise ConfigurationError(f"cannot write predictions to {path!r}: its folder does not exist")
        self._rows: list[tuple[str, str, float]] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with no rows."""
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of a batch."""
        self._rows += zip(outputs["file"], outputs["class"], outputs["probability"].tolist(), strict=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        rows = self._rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, rows)
            # A distributed sampler repeats files to give every process as many: a set takes the repeats out.
            rows = sorted({row for part in parts for row in part})
        if trainer.is_global_zero:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with temporary.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("file", "class", "probability"))
                writer.writerows((name, label, f"{probability:.6f}") for name, label, probability in rows)
            temporary.replace(self.path)
            rank_zero_info(f"{len(rows)} predictions written to {self.path}")
