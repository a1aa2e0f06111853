"""A stop at the first loss or weight that is not finite."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_msnn.errors import TrainingError

__all__ = ["FiniteLoss"]


class FiniteLoss(Callback):
    """Stop at the first loss that is infinite or not a number, before that loss reaches the weights.

    A membrane that is not finite in front of a spike leaves the loss finite, but not the gradients: weights that are
    not finite are never saved, and a checkpoint that is due stops the training instead.

    Gradients that overflow in fp16 are no concern of this callback: the gradient scaler leaves such a step out.
    """

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Begin the check."""
        self._finite = loss.detach().isfinite().all()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the check; the backward pass is queued by now, so a GPU does not wait.

        Raises:
            TrainingError: If the loss is not finite.
        """
        if not self._finite:
            raise TrainingError(
                f"the loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}, batch "
                f"{trainer.fit_loop.epoch_loop.batch_idx}): the checkpoints written before are kept"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the weights and the optimizer's state before they are written.

        Raises:
            TrainingError: If a number among them is not finite.
        """
        learnt = {name.replace("_fsdp_wrapped_module.", "") for name, _ in pl_module.named_parameters()}
        weights = {  # a buffer may be infinite, as masks are; a statistic of infinities is NaN
            name: value if name in learnt else value.nan_to_num(torch.nan, 0.0, 0.0)
            for name, value in (checkpoint.get("state_dict") or {}).items() if isinstance(value, Tensor)
        }  # fmt: skip
        for name, values in {"state_dict": weights, "optimizer_states": checkpoint.get("optimizer_states")}.items():
            if not all(leaf.isfinite().all() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
                raise TrainingError(
                    f"{name} is not finite after step {trainer.global_step} (epoch {trainer.current_epoch}): it is not "
                    "saved, and the checkpoints written before are kept"
                )
