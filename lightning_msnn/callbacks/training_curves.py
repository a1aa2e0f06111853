"""A picture of the training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_msnn.energy.pictures import new_figure, png
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.runs.trainer import run_folder, writes_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TrainingCurves"]

PANELS = {
    "training loss": ("train/loss",),
    "validation loss": ("val/loss",),
    "top-1 accuracy (%)": ("train/top1", "val/top1"),
    "top-5 accuracy (%)": ("train/top5", "val/top5"),
}
"""Panels of the picture, and their metrics. With smoothed or mixed labels the two losses are not the same thing."""


class TrainingCurves(pl.Callback):
    """Draw loss and accuracies against the epoch to ``<run folder>/curves.png`` at the end of training.

    Values are those logged as ``train/<name>`` and ``val/<name>``, the last of an epoch; a resumed run continues its
    curves.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.title = ""
        self._fits = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note whether a training begins: a checkpoint that is tested has curves of its own."""
        self._fits = stage == "fit"
        self.title = str(getattr(pl_module, "hparams", {}).get("network") or type(pl_module).__name__)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the values of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._read(trainer, "val/")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the values of the epoch's training."""
        self._read(trainer, "train/")

    def _read(self, trainer: pl.Trainer, prefix: str) -> None:
        epoch = trainer.current_epoch + 1
        for name in {name for names in PANELS.values() for name in names if name.startswith(prefix)}:
            if name in trainer.callback_metrics:
                before = [point for point in self.history.get(name, ()) if point[0] != epoch]
                self.history[name] = [*before, (epoch, float(trainer.callback_metrics[name]))]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the picture."""
        path = os.path.join(run_folder(trainer), "curves.png")
        if writes_files(trainer) and self.history:
            write_whole(png(self.draw(), 120), path)

    def draw(self) -> Figure:
        """Return the picture of the curves, with the epoch of the best validation marked."""
        panels = {title: [n for n in names if self.history.get(n)] for title, names in PANELS.items()}
        panels = {title: names for title, names in panels.items() if names}
        best = max(self.history.get("val/top1", ()), key=lambda point: (point[1], point[0]), default=None)
        figure = new_figure(4.2 * len(panels), 3.6)
        figure.suptitle(self.title + (f": best validation {best[1]:.2%} in epoch {best[0]}" if best else ""))
        for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name in names:
                epochs, values = zip(*self.history[name], strict=True)
                scale = 100.0 if "%" in title else 1.0
                style, marker = "--" if name.startswith("train") else "-", "o" if len(epochs) == 1 else None
                axes.plot(epochs, [scale * v for v in values], style, marker=marker, label=name.partition("/")[0])
            if best:
                axes.axvline(best[0], color="grey", linewidth=0.8, linestyle=":")
            axes.set(xlabel="epoch", ylabel=title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if len(names) > 1:
                axes.legend()
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves of a training that is resumed."""
        if self._fits:
            self.history = state_dict["history"]
