"""Inference in integers of 8 bits within a Trainer."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.integer import to_integers

__all__ = ["IntegerInference"]


class IntegerInference(Callback):
    """Validate, test and predict with integer weights: see :func:`lightning_msnn.nn.integer.to_integers`.

    The module's ``network`` is back in its place at the end.

    Raises:
        ConfigurationError: Where a Trainer fits or is not on a CPU, or the module's network does not run in integers.
    """

    def __init__(self) -> None:
        self._network: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to train."""
        if stage == "fit":
            raise ConfigurationError("integer weights are for validate, test and predict, not for fit")

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the network, which has the checkpoint's weights by now, by its integer form."""
        self._network = pl_module.get_submodule("network")
        pl_module.network = to_integers(self._network.eval())

    on_validation_start = on_test_start = on_predict_start = _begin

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the network back."""
        if self._network is not None:
            pl_module.network, self._network = self._network, None

    on_exception = teardown  # type: ignore[assignment]
