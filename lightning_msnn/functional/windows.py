"""Windows: cutting a feature map into several and putting them back.

A neuron visits the windows of a map in order, so all have one shape. For an axis of ``n`` pixels:

=============  =======================  ==============================================================================
kind           side                     window k of 1 top-left, 2 top-right, 3 bottom-left, 4 bottom-right
=============  =======================  ==============================================================================
single         ``n``                    the whole map: no spatial recurrence
non_dilated    ``ceil(n / 2)``          a quarter; a partition where ``n`` is even, one shared row or column where odd
dilated        ``floor(3 n / 4)``       an enlarged quarter (at least the side of non_dilated); neighbours overlap
grid           ``ceil(n / 2)``          every second pixel, phases (0, 0), (0, 1), (1, 0), (1, 1); an odd map is padded
                                        with zeros, which merging takes off again
=============  =======================  ==============================================================================

A map of a single column is one window. A map of a single row, such as a sequence, is cut along it, by the kind that
:data:`OF_ONE_ROW` names; with fewer than four columns it is one window. Kinds that cut any map along its width alone
are in :mod:`lightning_msnn.functional.windows_1d`. Source: arXiv 2401.10843; grid as the grid partition of MaxViT
(arXiv 2204.01697).

A new kind is an object like :class:`WindowKind` and a line in :data:`WINDOWS`. It runs on the reference until a kernel
lists its name.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_msnn.functional.windows_1d import OF_ONE_ROW, TIME_WINDOWS, join

__all__ = ["WINDOWS", "Corners", "Grid", "Single", "WindowKind", "count", "cut_by", "merge", "split"]


class WindowKind(Protocol):
    """How a map is cut into windows and put together again."""

    def count(self, height: int, width: int) -> int:
        """Number of windows of a map of ``height`` by ``width`` pixels."""

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut a map ``(B, C, H, W)``, of more than one window, into windows of one shape, in the order of visits."""

    def merge(self, windows: list[Tensor], height: int, width: int) -> Tensor:
        """Put windows back on a map of ``height`` by ``width`` pixels; where they overlap, their mean."""


class Corners:
    """Four windows, each anchored in a corner of the map; neighbours may overlap.

    Args:
        side: Side of a window in pixels on an axis of so many pixels; at least half of it, rounded up.
    """

    def __init__(self, side: Callable[[int], int]) -> None:
        self.side = side

    def count(self, height: int, width: int) -> int:
        """Four, or one where a side of the map is one pixel."""
        return 1 if height < 2 or width < 2 else 4

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of the four corners."""
        height, width = x.shape[2], x.shape[3]
        h, w = self.side(height), self.side(width)
        top, bottom = x[:, :, :h], x[:, :, height - h :]
        return [top[:, :, :, :w], top[:, :, :, width - w :], bottom[:, :, :, :w], bottom[:, :, :, width - w :]]

    def merge(self, windows: list[Tensor], height: int, width: int) -> Tensor:
        """Two means of two, which are the mean of four in the middle, where all windows overlap."""
        columns, rows = (0, width - windows[0].shape[3]), (0, height - windows[0].shape[2])
        halves = [join(pair, columns, width, 3) for pair in (windows[:2], windows[2:])]
        return join(halves, rows, height, 2)


class Single(Corners):
    """The whole map as one window."""

    def count(self, height: int, width: int) -> int:
        """One."""
        return 1


class Grid(Corners):
    """Four windows of every second row and column, one for each phase; an odd map is padded with zeros."""

    def __init__(self) -> None:
        super().__init__(lambda size: (size + 1) // 2)

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of the four phases, but for maps that are padded."""
        if x.shape[2] % 2 == 1 or x.shape[3] % 2 == 1:
            x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
        return [x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]]

    def merge(self, windows: list[Tensor], height: int, width: int) -> Tensor:
        """The phases interleaved."""
        top = torch.stack([windows[0], windows[1]], 4).flatten(3)
        bottom = torch.stack([windows[2], windows[3]], 4).flatten(3)
        return torch.stack([top, bottom], 3).flatten(2, 3)[:, :, :height, :width]


WINDOWS: dict[str, WindowKind] = {
    "single": Single(lambda size: size),
    "non_dilated": Corners(lambda size: (size + 1) // 2),
    "dilated": Corners(lambda size: max(3 * size // 4, (size + 1) // 2)),
    "grid": Grid(),
    **TIME_WINDOWS,
}
"""Kinds of windows by the name that configurations use."""


def cut_by(kind: str, height: int) -> WindowKind:
    """Return what cuts a map of so many rows: of one row, the kind in one dimension that takes its place.

    Raises:
        ValueError: If ``kind`` is none of :data:`WINDOWS`.
    """
    if kind not in WINDOWS:
        raise ValueError(f"unknown kind of windows: {kind}")
    return WINDOWS[OF_ONE_ROW.get(kind, kind) if height == 1 else kind]


def count(kind: str, height: int, width: int) -> int:
    """Number of windows that a map of ``height`` by ``width`` pixels is cut into; 1 where it is too small to cut."""
    return cut_by(kind, height).count(height, width)


def split(x: Tensor, kind: str) -> list[Tensor]:
    """Cut a map into its windows, in the order in which a neuron visits them.

    Args:
        x: Map of shape ``(B, C, H, W)``.
        kind: One of :data:`WINDOWS`.

    Returns:
        Tensors ``(B, C, h, w)``, or the map alone where it is one window; views where that is possible.
    """
    windows = cut_by(kind, x.shape[2])
    return [x] if windows.count(x.shape[2], x.shape[3]) == 1 else windows.split(x)


def merge(windows: list[Tensor], kind: str, height: int, width: int) -> Tensor:
    """Put windows back on the map; where they overlap, their mean. The inverse of :func:`split`.

    Args:
        windows: Tensors ``(B, C, h, w)``, or one ``(B, C, H, W)``.
        kind: The kind that they were cut with, one of :data:`WINDOWS`.
        height: Height ``H`` of the map in pixels.
        width: Width ``W`` of the map in pixels.
    """
    kind_ = cut_by(kind, height)
    return windows[0] if len(windows) == 1 else kind_.merge(windows, height, width)
