"""Predictions as a CSV file."""

import csv
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_msnn.errors import ConfigurationError

__all__ = ["PredictionWriter"]

COLUMNS = ("file", "class", "probability")


class PredictionWriter(pl.Callback):
    """Write what ``predict_step`` returned to a CSV file with the columns file, class, probability.

    Rows are written batch by batch to a file ``<path>.part<process>`` of each process, which stays if the prediction
    is interrupted. The file itself appears whole at the end; with several processes it has the rows of all,
    in the order of the files' names. A cell that a spreadsheet would take for a formula is quoted by an apostrophe.

    Args:
        path: The CSV file; one that is there already is replaced at the end.

    Raises:
        ConfigurationError: If the file cannot be written there.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = Path(path)
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ConfigurationError(f"cannot write predictions to {str(path)!r}: it must be a file, no device")
        self._file: TextIO | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the file of this process, before any work is done."""
        if stage == "predict":
            self._part = self.path.with_name(f"{self.path.name}.part{os.getpid()}")
            try:
                # Names of images that are not UTF-8 keep their bytes.
                self._file = self._part.open("w+", newline="", encoding="utf-8", errors="surrogateescape")
                self._write([COLUMNS])
            except OSError as error:
                raise ConfigurationError(f"cannot write predictions to {str(self.path)!r}: {error.strerror}") from error

    def _write(self, rows: Iterable[Sequence[str]]) -> None:
        assert self._file is not None
        csv.writer(self._file).writerows(rows)
        self._file.flush()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Write the rows of a batch."""
        probabilities = [f"{probability:.6f}" for probability in outputs["probability"].tolist()]
        self._write(zip(map(_plain, outputs["file"]), map(_plain, outputs["class"]), probabilities, strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the file its name, with the rows of all processes."""
        assert self._file is not None
        if trainer.world_size > 1:
            self._file.seek(0)
            head, *rows = csv.reader(self._file)
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, rows)
            # A distributed sampler repeats files to give every process as many: a set takes the repeats out.
            every = sorted({tuple(row) for part in parts for row in part}, key=_order)
            self._file.seek(0)
            self._file.truncate()
            self._write([head, *every])
        self._file.close()
        if trainer.is_global_zero:
            self._part.replace(self.path)
            rank_zero_info(f"predictions written to {self.path}")
        else:
            self._part.unlink()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep the rows so far."""
        if self._file is not None:
            with suppress(OSError):  # of what a full disk did not take
                self._file.close()


def _order(row: tuple[str, ...]) -> list[tuple[int, float, str]]:
    """Key that sorts cells that are whole numbers as numbers, before others."""
    return [(0, float(cell), "") if cell.isdecimal() else (1, 0.0, cell) for cell in row]


def _plain(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
