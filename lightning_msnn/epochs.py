"""Values that change with the epochs of a training."""

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["value_at"]

T = TypeVar("T")


def value_at(values: Mapping[int, T], epoch: int, before: T) -> T:
    """Return the value of an epoch.

    Args:
        values: Values by the epoch that they begin with, in any order.
        epoch: Epoch, counted from 0.
        before: Value before the first of them.
    """
    begun = [first for first in values if first <= epoch]
    return values[max(begun)] if begun else before
