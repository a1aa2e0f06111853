"""Mixed images: mixup and cutmix."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_msnn.errors import ConfigurationError, check_integer, check_number
from lightning_msnn.runs.trainer import planned
from lightning_msnn.tasks import Task, TrainingStepCallback

__all__ = ["Mixing"]


class Mixing(TrainingStepCallback):
    """Mix the images of a batch by mixup or cutmix (arXiv 1710.09412, 1905.04899), and their labels in the same shares.

    Args:
        mixup: Alpha of the Beta distribution that mixup draws from; 0 is off.
        cutmix: Alpha of the Beta distribution that cutmix draws from; 0 is off. With both, each batch gets one.
        share: Share of the batches that are mixed, in [0, 1]; or shares by the epoch that they begin with, such as
            ``{0: 0.5, 40: 0}``: before the first of them no batch is mixed.
        until: Share of the training after which no batch is mixed, in [0, 1].

    Raises:
        ConfigurationError: If an argument is not allowed; when training starts, if ``until`` is below 1 and the end of
            training is not known.
    """

    def __init__(
        self, mixup: float = 0.0, cutmix: float = 1.0, share: float | dict[int, float] = 0.5, until: float = 1.0
    ) -> None:
        if min(mixup, cutmix) < 0.0 or max(mixup, cutmix) == 0.0:
            raise ConfigurationError(
                f"mixup and cutmix must be at least 0, and one of them above 0, not {mixup} and {cutmix}"
            )
        self.mixup, self.cutmix = mixup, cutmix
        self.until = check_number("until of Mixing", until)
        self._last = math.inf
        self.shares = {int(epoch): s for epoch, s in (share if isinstance(share, dict) else {0: share}).items()}
        for epoch, value in self.shares.items():
            check_integer("an epoch of share", epoch, 0)
            check_number("share", value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the step from which on no batch is mixed."""
        self._last = self.until * planned(trainer, "Mixing") if self.until < 1.0 else math.inf

    def change_batch(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the batch, if it is its turn; targets are then ``(B, num_classes)``."""
        begun = [epoch for epoch in self.shares if epoch <= task.current_epoch]
        share = self.shares[max(begun)] if begun and task.global_step < self._last else 0.0
        # No number is drawn where nothing depends on it.
        if share == 0.0 or (share < 1.0 and torch.rand(()).item() >= share):
            return inputs, targets
        kinds = {v2.MixUp: self.mixup, v2.CutMix: self.cutmix}
        mixers = [kind(alpha=a, num_classes=task.hparams["num_classes"]) for kind, a in kinds.items() if a]
        mixed: tuple[Tensor, Tensor] = v2.RandomChoice(mixers)(inputs, targets)
        return mixed
