"""Exponential moving average of weights."""

from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.runs.strategies import shards_weights

__all__ = ["EMA"]


class EMA(WeightAveraging):
    """Lightning's weight averaging with an exponential moving average that warms up.

    The average is what validation sees and what a checkpoint holds as its weights. A fixed decay would keep the
    untrained weights alive for about ``1 / (1 - decay)`` steps; here the decay after ``n`` steps is
    ``min(decay, (1 + n) / (10 + n))``, so that short trainings profit too.

    Args:
        decay: Decay per optimizer step in the long run, in [0, 1).

    Raises:
        ConfigurationError: If the decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = check_number("the decay of the moving average", decay, below_one=True)
        super().__init__(use_buffers=True)
        self._training: list[Tensor] = []

    def decay_at(self, step: int) -> float:
        """Return the decay of the update that follows optimizer step number ``step``, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after every optimizer step; the first one is where the average begins."""
        if trainer.global_step <= self._latest_update_step:
            return
        assert self._average_model is not None
        share = 1.0 - self.decay_at(trainer.global_step - 1) if self._latest_update_step else 1.0
        pairs = list(zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True))
        floats = [average for average, _ in pairs if average.is_floating_point()]
        currents = [current.to(average) for average, current in pairs if average.is_floating_point()]
        torch._foreach_lerp_(floats, currents, share)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)  # counters of batch norm have no mean
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average, in float32 where the weights have less and would hold no small change of it.

        Raises:
            ConfigurationError: If the strategy shards the weights, which Lightning cannot average.
        """
        if stage == "fit" and shards_weights(trainer.strategy):
            strategy = type(trainer.strategy).__name__
            raise ConfigurationError(f"EMA must be left out of the callbacks with {strategy}, which shards the weights")
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # of a training before it, or a checkpoint that was tested; a resumed one is restored later
            self._latest_update_step, self._latest_update_epoch = 0, -1
        if self._average_model is not None and trainer.precision == "64-true":
            self._average_model.double()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over what no checkpoint has, as the scale of a forecast's errors, which the data has just set."""
        assert self._average_model is not None
        for average, current in zip(self._average_model.module.modules(), pl_module.modules(), strict=True):
            for name in current._non_persistent_buffers_set:
                if (buffer := current._buffers[name]) is not None:
                    average._buffers[name] = buffer.detach().clone()

    def _agree(self) -> None:
        """Let all processes have the statistics of batch norm that the first has averaged, as DDP does in training."""
        if self._average_model is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            for buffer in self._average_model.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    # Lightning swaps and restores the weights being trained in every stage. Outside of fit that would test the last
    # weights in place of those of the checkpoint asked for, so it is left to fit.

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average while fitting."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._agree()
            self._training = [tensor.clone() for tensor in _tensors(pl_module)]
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights being trained."""
        if trainer.state.fn == TrainerFn.FITTING:
            for tensor, kept in zip(_tensors(pl_module), self._training, strict=True):
                tensor.copy_(kept)
            self._training = []

    # Lightning puts the average in the place of the weights before callbacks write what they write as training ends:
    # a training with more epochs that went on from there would not be the one that was never interrupted.

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep both sets of weights for the checkpoints that are written now."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average as the result."""
        self._agree()
        super().on_train_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights to go on fitting."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module, without their history."""
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
