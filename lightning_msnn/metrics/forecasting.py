"""How far forecasts are off, in a unit that does not depend on the series."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanAbsoluteScaledError", "mean_absolute_scaled_error"]


def _update(preds: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, int]:
    """Sum of the scaled errors, and their number."""
    return ((preds - target).abs() / scale).double().sum(), target.numel()


def mean_absolute_scaled_error(preds: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean absolute error in units of that of a naive forecast (Hyndman and Koehler, 2006).

    Below 1, forecasts are better than the naive one was on the series that is trained on.

    Args:
        preds: Forecasts of any shape.
        target: What came, of that shape.
        scale: Mean absolute error of the naive forecast over the training part, broadcast to that shape.

    Examples:
        >>> mean_absolute_scaled_error(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor(3.0))
        tensor(0.5000)
    """
    total, number = _update(preds, target, scale)
    return (total / number).to(preds.dtype)


class MeanAbsoluteScaledError(Metric):
    """Mean absolute error in units of that of a naive forecast: :func:`mean_absolute_scaled_error` over batches.

    Args:
        scale: Mean absolute error of the naive forecast over the training part, broadcast to the forecasts.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    scale: Tensor
    total: Tensor
    number: Tensor

    def __init__(self, scale: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("scale", scale, persistent=False)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("number", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of forecasts and what came."""
        total, number = _update(preds, target, self.scale)
        self.total += total
        self.number += number

    def compute(self) -> Tensor:
        """Return the mean."""
        return (self.total / self.number).float()
