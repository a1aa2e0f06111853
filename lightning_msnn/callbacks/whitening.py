"""Filters of a whitened stem, from the images of the training."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.nn.blocks import WhitenedStem
from lightning_msnn.runs.trainer import planned, refuse_shards

__all__ = ["Whitening", "whitening_filters"]


def whitening_filters(batches: Iterable[Tensor], images: int = 5000) -> Tensor:
    """Return filters whose answers to the 2x2 patches of images have nothing in common, and a mean square of 1.

    Args:
        batches: Images ``(B, C, H, W)``, as a network takes them.
        images: How many of them are enough.

    Returns:
        Filters ``(8 C, C, 2, 2)``: eigenvectors of the patches' second moment, each divided by the root of its
        eigenvalue plus 5e-4, so that what hardly varies stays small; and their negatives.
    """
    moment, number, seen = torch.zeros((), dtype=torch.float64), 0, 0
    for batch in batches:
        patches = batch.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        moment = moment + (patches.mT @ patches).cpu().double()
        number, seen = number + len(patches), seen + len(batch)
        if seen >= images:
            break
    values, vectors = torch.linalg.eigh(moment / number)
    filters = (vectors / (values + 5e-4).sqrt()).mT.float()
    return torch.cat([filters, -filters]).view(2 * len(values), -1, 2, 2)


class Whitening(pl.Callback):
    """Whiten the patches that a network with ``stem: whitened`` sees; its biases learn for a part of the training.

    The filters come from the first 5,000 training images, augmented and normalised. All processes use those of the
    first. A stem that was whitened before, in the entry or checkpoint that the training starts or resumes from, keeps
    its filters.

    Args:
        until: Share of the training after which the biases stay, in [0, 1].

    Raises:
        ConfigurationError: If ``until`` is not allowed; when training starts, if the network has no such stem, a
            strategy shards it, or the end of training is not known.
    """

    def __init__(self, until: float = 0.6) -> None:
        self.until = check_number("until of Whitening", until)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the filters, unless they have been."""
        refuse_shards(trainer.strategy, "Whitening")
        stems = [module for module in pl_module.modules() if isinstance(module, WhitenedStem)]
        if not stems:
            raise ConfigurationError("Whitening must be left out: the network has no whitened stem (stem: whitened)")
        self._stem, self._last = stems[0], self.until * planned(trainer, "Whitening")
        if not self._stem.is_whitened:
            batches: Iterable[Any] = trainer.train_dataloader  # type: ignore[assignment]
            filters = whitening_filters(trainer.strategy.batch_to_device(batch)[0] for batch in batches)
            self._stem.whitening.weight.copy_(trainer.strategy.broadcast(filters))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Leave the biases out of the last steps: an optimizer passes over a parameter that has no gradient."""
        if trainer.global_step >= self._last:
            self._stem.whitening.zero_grad()
