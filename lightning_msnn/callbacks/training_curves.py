"""A picture of the training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["TrainingCurves"]

PANELS = {"loss": "cross-entropy (nats)", "top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}


class TrainingCurves(Callback):
    """Draw loss and accuracies against the epoch to ``<run folder>/<filename>`` at the end of training.

    Values are those logged as ``train/<name>`` and ``val/<name>``, read once an epoch; a resumed run continues its
    curves.

    Args:
        filename: Name of the picture, with an ending that matplotlib knows.
    """

    def __init__(self, filename: str = "curves.png") -> None:
        self.filename = filename
        self.history: dict[str, list[tuple[int, float]]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the values of the epoch, after those of validation."""
        for name, value in trainer.callback_metrics.items():
            stage, _, panel = name.partition("/")
            if stage in ("train", "val") and panel in PANELS:
                self.history.setdefault(name, []).append((trainer.current_epoch + 1, float(value)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the picture."""
        folder = trainer.log_dir  # a broadcast: on every rank
        if trainer.is_global_zero and folder is not None and self.history:
            try:
                self.draw(Path(folder) / self.filename)
            except OSError as error:  # a full disk is no reason to lose the test that follows
                rank_zero_warn(f"the training curves cannot be written to {error.filename!r} ({error.strerror})")

    def draw(self, path: Path) -> None:
        """Draw the curves.

        Args:
            path: File to write.
        """
        from matplotlib.figure import Figure  # takes a second to import, which only this needs

        panels = [p for p in PANELS if any(name.endswith(f"/{p}") for name in self.history)]
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            scale = 1.0 if panel == "loss" else 100.0
            for stage, style in (("train", "--"), ("val", "-")):
                points = self.history.get(f"{stage}/{panel}", [])
                if points:
                    epochs, values = zip(*points, strict=True)
                    marker = "o" if len(points) == 1 else None
                    axes.plot(epochs, [scale * v for v in values], style, marker=marker, label=stage)
            axes.set_xlabel("epoch")
            axes.set_ylabel(PANELS[panel])
            axes.grid(alpha=0.3)
            axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far."""
        return {"history": {name: [list(p) for p in points] for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves of a checkpoint."""
        self.history = {name: [(int(e), float(v)) for e, v in points] for name, points in state_dict["history"].items()}
