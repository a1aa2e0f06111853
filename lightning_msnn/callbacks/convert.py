"""Train a network with rectifiers on as a spiking one."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_msnn.conversion import RectifierSpike, adopt, calibrate, converted_layers, image_shape, trace
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs.trainer import refuse_shards
from lightning_msnn.tasks import Task, TrainingStepCallback

__all__ = ["Convert"]


class Convert(TrainingStepCallback):
    """Convert a task's network with rectifiers to a spiking one as training starts, as :func:`lightning_msnn.convert`.

    Its neurons are fitted to the first batch of the training. A network that is converted already stays as it is, so
    that the same command resumes. A checkpoint holds the spiking network.

    Args:
        image_size: Side in pixels of the images that the network is traced with; by default the data's, or the
            network's own.
        levels: Levels ``D`` of a spike, 1 to 15.

    Raises:
        ConfigurationError: When training starts, if the network cannot be converted or an argument is not allowed.
    """

    def __init__(self, image_size: int | None = None, levels: int = 1) -> None:
        self.image_size, self.levels = image_size, levels
        self._unfitted = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Convert the network."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or converted_layers(network := pl_module.network):
            return
        refuse_shards(trainer.strategy, "Convert")
        if any(getattr(each, "_average_model", None) is not None for each in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigurationError("Convert must stand before EMA among the callbacks, which has copied the network")
        size = self.image_size or getattr(getattr(trainer, "datamodule", None), "image_size", None)
        shape = (pl_module.hparams["in_chans"], *image_shape(network, size)[1:])
        layers = [row.layer for row in trace(network, torch.empty(1, *shape, device="meta")).spiking]
        source, arguments = pl_module.made_of()
        source = source.partition(".")[0] if timm.is_model(source) else source
        if hasattr(getattr(network, "patch_embed", None), "img_size"):
            arguments.setdefault("img_size", list(shape[1:]))
        adopt(network, source, arguments, layers, self.levels)
        rank_zero_info("%d layers of %s receive spikes", len(layers), source)
        self._unfitted = True

    def change_batch(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the neurons to the first batch, unless a checkpoint has fitted them; processes take their mean."""
        if self._unfitted and not task.trainer.global_step:
            self._unfitted = False
            calibrate(task.network, inputs)
            for neuron in (module for module in task.network.modules() if isinstance(module, RectifierSpike)):
                for value in (neuron.log_threshold, neuron.log_scale):
                    mean = task.trainer.strategy.reduce(value.data.clone(), reduce_op="mean")
                    value.data.copy_(mean)
        return inputs, targets
