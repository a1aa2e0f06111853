"""Classification of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_msnn.errors import ConfigurationError, check_integer, check_number
from lightning_msnn.tasks.base import Task

__all__ = ["SpikingClassifier"]


class SpikingClassifier(Task):
    """Image classification.

    Batches are ``(images, targets)``: float images ``(B, in_chans, H, W)``, normalised, and integer targets ``(B,)``.
    To predict, they are ``(images, files)``.

    Args:
        network: Registered name of the network, ``timm.list_models("msnn*")`` or any other of timm's; the path of a
            class of your own that is imported, such as ``"my_package.MyNet"``; or a module.
        num_classes: Classes; by default the data's on the command line.
        in_chans: Channels of the images; by default the data's on the command line.
        network_kwargs: Further arguments of the network, such as ``theta``, ``windows``, ``context``;
            ``{spiking: false, windows: single}`` is its ReLU baseline.
        pretrained: True starts from the weights that belong to the name. An entry of the zoo, such as
            ``"msnn_resnet12.c100"``, or a checkpoint (a path that ends in ``.ckpt``) starts from those of its weights
            that fit by name and shape.
        optimizer: Name in ``timm.optim.list_optimizers()``; ``"sgd"`` has Nesterov momentum 0.9, and ``"muon"`` is
            :class:`~lightning_msnn.tasks.optimization.Muon`.
        lr: Peak learning rate.
        weight_decay: Weight decay of weights; norms, biases, tau and theta have none.
        schedule: ``"cosine"`` (after a linear warm-up), ``"one_cycle"``, ``"triangle"`` (from 0.2 of the peak, up over
            23 % of the training, down in a line to 0.07) or ``"constant"``, each by the step.
        warmup_epochs: Length of the warm-up in epochs, or of one-cycle's rise; at most 30 % of the training.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss of a training step, by default 1.

    Raises:
        ConfigurationError: If an argument is not allowed, or the data does not fit the network.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: str | nn.Module = "msnn_resnet12_tiny",
        num_classes: int = 10,
        in_chans: int = 3,
        network_kwargs: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        optimizer: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        schedule: Literal["cosine", "one_cycle", "triangle", "constant"] = "cosine",
        warmup_epochs: float = 5.0,
        label_smoothing: float = 0.1,
        class_weights: list[float] | None = None,
    ) -> None:
        check_integer("num_classes", num_classes, 2)
        check_number("label_smoothing", label_smoothing, below_one=True)
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None and (weights.shape != (num_classes,) or not (weights >= 0).all() or not weights.any()):
            raise ConfigurationError(
                f"class_weights must be {num_classes} numbers of at least 0, not all 0, not {class_weights}"
            )
        super().__init__(
            network, num_classes, in_chans, network_kwargs, pretrained, optimizer, lr, weight_decay, schedule,
            warmup_epochs,
        )  # fmt: skip
        self.register_buffer("class_weights", weights, persistent=False)

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return top-1 and top-5 accuracy; of fewer than five classes, the right one is always among the top."""
        return {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        }

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each image, ``(B,)``."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of a training step, with smoothed labels and weighted classes."""
        weights = None if self.class_weights is None else self.class_weights.to(outputs.dtype)
        loss = F.cross_entropy(outputs, targets, weights, label_smoothing=self.hparams["label_smoothing"])
        if weights is None or not targets.is_floating_point():
            return loss
        return loss / (targets.to(weights.dtype) @ weights).mean()  # of mixed labels torch has no weighted mean

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Classify a batch.

        Args:
            batch: Images ``(B, in_chans, H, W)``, alone or followed by the names of their files.
            batch_idx: Number of the batch.

        Returns:
            ``file`` (names, or numbers of process, batch and image where there are none), ``class`` (names), ``index``
            ``(B,)``, ``probability`` ``(B,)`` of that class and ``logits`` ``(B, num_classes)``.
        """
        images, *rest = batch if isinstance(batch, list | tuple) else (batch,)
        logits = self(images).float()
        probability, index = logits.softmax(1).max(1)
        names = [self.class_names[i] for i in index.tolist()]
        if rest and not isinstance(rest[0], Tensor):
            files = list(rest[0])
        else:
            process = f"{self.global_rank}/" if self._trainer is not None and self.trainer.world_size > 1 else ""
            files = [f"{process}{batch_idx}/{i}" for i in range(len(names))]
        return {"file": files, "class": names, "index": index, "probability": probability, "logits": logits}
