"""Knowledge distillation: a network learns from the answers of a trained one to the same images.

Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.synapse import CentredConv2d, PatchConv2d
from lightning_msnn.tasks import Task, TrainingStepCallback
from lightning_msnn.tasks.base import only_size
from lightning_msnn.trained import load_trained

__all__ = ["Teacher", "distillation_loss"]


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's classes to the student's, the mean over the images.

    Logits ``(B, num_classes)`` of both are divided by the temperature, and the divergence is multiplied by its square,
    so that its gradient does not shrink with it.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(taught.float() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Teacher(TrainingStepCallback):
    """Let a task's network learn from a trained one too: ``(1 - weight) loss + weight distillation``.

    The teacher runs in evaluation mode with its batch norm folded, and sees the images of the training step under its
    own normalisation. Only ``fit`` loads it, and no checkpoint holds it. ``train/distillation``
    is logged.

    Args:
        source: A checkpoint (a path that ends in ``.ckpt``), an entry of the zoo, or any pretrained network of timm's,
            with the student's classes.
        weight: Share of the teacher in the loss, in (0, 1]; the targets have the rest.
        temperature: Logits are divided by it before classes are compared, above 0.

    Raises:
        ConfigurationError: If an argument is not allowed; when training starts, if there is no such network, or it has
            other classes or channels than the student.
    """

    def __init__(self, source: str, weight: float = 0.5, temperature: float = 2.0) -> None:
        if check_number("weight of the teacher", weight) == 0.0:
            raise ConfigurationError("weight of the teacher must be above 0, not 0: leave out the teacher")
        if not 0.0 < temperature < float("inf"):
            raise ConfigurationError(f"temperature of the teacher must be above 0, not {temperature}")
        self.source, self.weight, self.temperature = str(source), weight, temperature
        self.network: nn.Module | None = None
        """The teacher, while there is a training."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the teacher, and compare it with student and data."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._scale, self._shift = torch.ones(()), torch.zeros(())  # from the student's normalisation to the teacher's
        trained = load_trained(self.source)
        self.normalised = trained.mean, trained.std
        for name, theirs in {"num_classes": len(trained.class_names), "in_chans": trained.input_size[0]}.items():
            if (ours := pl_module.hparams[name]) != theirs:
                raise ConfigurationError(
                    f"the teacher must have the student's {name}, {ours}: {self.source} has {theirs}"
                )
        trained.check(getattr(trainer, "datamodule", None))
        self.network = fold_batch_norm(trained.network.requires_grad_(False))
        for module in self.network.modules():
            if isinstance(module, CentredConv2d | PatchConv2d):
                module.train()  # matrix products where they are faster, whose rounding depends on the batch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the teacher to the device and precision of the training."""
        assert self.network is not None
        precisions = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
        dtype = precisions.get(str(trainer.precision).partition("-")[0], torch.float32)
        network = self.network.to(pl_module.device, dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seen = getattr(pl_module, "preprocessing", {})
        if seen.get("mean") and self.normalised[0]:
            values = (seen["mean"], seen["std"], *self.normalised)
            mean, std, its_mean, its_std = (torch.tensor(x, device=pl_module.device).view(-1, 1, 1) for x in values)
            self._scale, self._shift = std / its_std, (mean - its_mean) / its_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images, normalised as the student's, to the teacher's logits ``(B, num_classes)``."""
        assert self.network is not None
        images = images * self._scale + self._shift
        size = only_size(self.network)
        if size is not None and images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(next(self.network.parameters()).dtype, memory_format=torch.channels_last)
            logits: Tensor = self.network(images)
        return logits

    def change_loss(self, task: Task, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the loss with the teacher's share."""
        distilled = distillation_loss(outputs, self(inputs), self.temperature)
        task.log("train/distillation", distilled)
        return torch.lerp(loss, distilled, self.weight)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say who taught the network."""
        checkpoint["teacher"] = self.source
