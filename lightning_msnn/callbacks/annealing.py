"""Spikes that sharpen while a network trains: from a rectifier, with a true gradient, to the exact step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Spike, set_annealing
from lightning_msnn.runs.trainer import planned

__all__ = ["SpikeAnnealing"]


class SpikeAnnealing(pl.Callback):
    """Let neurons return ``a s + (1 - a) max(u, 0)`` in training, with ``a`` rising from 0 to 1; then exact spikes.

    A step has no gradient, so a training that has one from the start follows a guess. At ``a = 0`` neurons are
    rectifiers. (Whetstone, Severa et al., Nature Machine Intelligence 2019, sharpens a bounded rectifier layer by
    layer instead.)

    Evaluation always uses exact spikes. Before ``until`` batch norm's running statistics are those of soft spikes, so
    validation says little; they settle in the rest of the training. ``a`` is logged as ``annealing``.

    Args:
        until: Share of the training after which spikes are exact, in (0, 1).

    Raises:
        ConfigurationError: If ``until`` is not allowed; when training starts, if the network has no spiking neurons or
            the end of training is not known.
    """

    def __init__(self, until: float = 0.6) -> None:
        if not 0.0 < until < 1.0:
            raise ConfigurationError(
                f"until, the share of the training that is annealed, must be above 0 and below 1, not {until}: batch "
                "norm settles on exact spikes in the rest"
            )
        self.until = until
        self._total = 1

    def share_at(self, step: int, total: int) -> float:
        """Return the share ``a`` of the step that follows ``step`` of ``total`` optimizer steps."""
        return min(1.0, step / (self.until * max(1, total)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to anneal, and how many steps there will be."""
        if not any(isinstance(module, Spike) for module in pl_module.modules()):
            raise ConfigurationError(
                f"{type(pl_module).__name__} has no spiking neurons to anneal: leave out SpikeAnnealing"
            )
        self._total = planned(trainer, "SpikeAnnealing")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Set the share of this step."""
        share = self.share_at(trainer.global_step, self._total)
        set_annealing(pl_module, share)
        pl_module.log("annealing", share, batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that spikes are still soft."""
        share = self.share_at(trainer.global_step, self._total)
        if share < 1.0 and not trainer.sanity_checking and trainer.state.fn == "fit":
            rank_zero_info(
                "spikes are still soft (annealing %.2f): validation has exact ones, but batch norm has seen soft ones",
                share,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Return to exact spikes."""
        set_annealing(pl_module, None)

    on_exception = on_train_end  # type: ignore[assignment]
