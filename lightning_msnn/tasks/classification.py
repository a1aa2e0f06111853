"""Classification of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_msnn.errors import ConfigurationError, check_integer, check_number
from lightning_msnn.tasks.base import Task, check_positive
from lightning_msnn.tasks.distillation import distillation_loss

__all__ = ["SpikingClassifier"]


class SpikingClassifier(Task):
    """Image classification by a network from timm's registry.

    Batches are ``(images, targets)``: float images ``(B, in_chans, H, W)`` or frames ``(B, T, in_chans, H, W)``,
    normalised, and integer targets ``(B,)``. To predict, they are ``(images, files)``.

    Args:
        network: Registered name of the network, ``timm.list_models("msnn*")`` or any other of timm's.
        num_classes: Classes; by default the data's on the command line.
        in_chans: Channels of the images; by default the data's on the command line.
        network_kwargs: Further arguments of the network, such as ``theta``, ``windows``, ``context``.
        pretrained: Whether to start from the weights that belong to the name.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss of a training step, by default 1.
        mixup: Alpha of the Beta distribution that mixup draws from; 0 is off.
        cutmix: Alpha of the Beta distribution that cutmix draws from; 0 is off. With both, each batch gets one.
        mix_prob: Share of the batches that are mixed, in [0, 1]; or shares by the epoch that they begin with, such as
            ``{0: 0.5, 40: 0}``, and no batch is mixed before the first of them.
        **kwargs: Arguments of :class:`lightning_msnn.tasks.Task`.

    Raises:
        ConfigurationError: If an argument is not allowed, or the data does not fit the network.
    """

    def __init__(
        self,
        network: str = "msnn_resnet12_tiny",
        num_classes: int = 10,
        in_chans: int = 3,
        network_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        *,
        label_smoothing: float = 0.1,
        class_weights: list[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float | dict[int, float] = 1.0,
        **kwargs: Any,
    ) -> None:
        check_integer("num_classes", num_classes, 2)
        check_number("label_smoothing", label_smoothing, below_one=True)
        check_positive("mixup", mixup)
        check_positive("cutmix", cutmix)
        for epoch, share in (mix_prob if isinstance(mix_prob, dict) else {0: mix_prob}).items():
            check_integer("an epoch of mix_prob", epoch, 0)
            check_number("mix_prob", share)
        class_weights = getattr(class_weights, "tolist", lambda: class_weights)()  # of a tensor or an array
        if class_weights is not None and not (
            isinstance(class_weights, Sequence)
            and len(class_weights) == num_classes
            and all(isinstance(w, SupportsFloat) and math.isfinite(w) and w >= 0.0 for w in class_weights)
            and sum(class_weights) > 0.0
        ):
            raise ConfigurationError(
                f"class_weights must be {num_classes} finite numbers of at least 0, not all 0, not {class_weights}"
            )
        class_weights = None if class_weights is None else list(class_weights)
        super().__init__(network, num_classes, in_chans, network_kwargs, pretrained, **kwargs)
        self.class_weights: Tensor | None
        weights = torch.tensor([float(weight) for weight in class_weights]) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        mixers = [
            *([v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []),
            *([v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []),
        ]
        self.mixer: nn.Module | None = v2.RandomChoice(mixers) if mixers else None

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return top-1 and top-5 accuracy; of fewer than five classes, the right one is always among the top."""
        return {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        }

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix to a batch, if they are on and it is its turn."""
        share = self.hparams["mix_prob"]
        if isinstance(share, dict):
            share = share[max(begun)] if (begun := [e for e in share if e <= self.current_epoch]) else 0.0
        # No number is drawn where nothing depends on it.
        if self.mixer is None or share == 0.0 or (share < 1.0 and torch.rand(()).item() >= share):
            return inputs, targets
        frames = inputs.dim() == 5  # of which torchvision wants to be told
        inputs, targets = self.mixer(tv_tensors.Video(inputs) if frames else inputs, targets)
        return inputs.as_subclass(Tensor) if frames else inputs, targets

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each image, ``(B,)``."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of a training step, with smoothed labels and weighted classes."""
        return F.cross_entropy(outputs, targets, self.class_weights, label_smoothing=self.hparams["label_smoothing"])

    def distil(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """Return the cross entropy from a teacher's classes to these, see :func:`~.distillation.distillation_loss`."""
        return distillation_loss(outputs, taught, self.hparams["teacher_temperature"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names of the classes and the preprocessing.

        Raises:
            ConfigurationError: If there are not as many names as classes.
        """
        super().on_load_checkpoint(checkpoint)
        if len(self.class_names) != self.hparams["num_classes"]:
            raise ConfigurationError(
                f"the checkpoint names {len(self.class_names)} classes, but has {self.hparams['num_classes']}"
            )

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Classify a batch.

        Args:
            batch: Images ``(B, in_chans, H, W)``, alone or followed by the names of their files.
            batch_idx: Number of the batch.

        Returns:
            ``file`` (names, or numbers of batch and image where there are none), ``class`` (names), ``index`` ``(B,)``,
            ``probability`` ``(B,)`` of that class and ``logits`` ``(B, num_classes)``.
        """
        images, *rest = batch if isinstance(batch, list | tuple) else (batch,)
        logits = self(images).float()
        probability, index = logits.softmax(1).max(1)
        names = [self.class_names[i] for i in index.tolist()]
        files = self._names(rest, batch_idx, len(names))
        return {"file": files, "class": names, "index": index, "probability": probability, "logits": logits}
