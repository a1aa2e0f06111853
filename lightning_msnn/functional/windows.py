"""Windows: cutting a feature map into four and putting them back.

Windows are numbered 1 top-left, 2 top-right, 3 bottom-left, 4 bottom-right, all four of one shape, so that a membrane
can travel from each to the next. For an axis of ``n`` pixels:

=============  =======================  ==============================================================================
kind           side                     window k
=============  =======================  ==============================================================================
single         ``n``                    the whole map: no spatial recurrence
non_dilated    ``ceil(n / 2)``          a quarter; a partition where ``n`` is even, one shared row or column where odd
dilated        ``floor(3 n / 4)``       an enlarged quarter (at least the side of non_dilated); neighbours overlap
grid           ``ceil(n / 2)``          every second pixel, phases (0, 0), (0, 1), (1, 0), (1, 1); an odd map is padded
                                        with zeros, which merging takes off again
=============  =======================  ==============================================================================

A map with a side of one pixel is too small to cut and is one window. Source: arXiv 2401.10843; grid as the grid
partition of MaxViT (arXiv 2204.01697).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["WINDOWS", "count", "merge", "side", "split"]

WINDOWS: tuple[str, ...] = ("single", "non_dilated", "dilated", "grid")
"""Kinds of windows by the name that configurations use."""


def count(kind: str, height: int, width: int) -> int:
    """Number of windows that a map is cut into: 4, or 1 where it is too small to cut or ``kind`` is ``"single"``.

    Args:
        kind: One of :data:`WINDOWS`.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
    """
    return 1 if kind == "single" or height < 2 or width < 2 else 4


def side(kind: str, size: int) -> int:
    """Side of a window in pixels on an axis of ``size`` pixels.

    Args:
        kind: One of :data:`WINDOWS`.
        size: Size of the map on this axis in pixels.

    Raises:
        ValueError: If ``kind`` is not known.
    """
    half = (size + 1) // 2
    if kind == "dilated":
        return max(3 * size // 4, half)
    if kind == "non_dilated" or kind == "grid":
        return half
    if kind == "single":
        return size
    raise ValueError(f"unknown kind of windows: {kind}")


def split(x: Tensor, kind: str) -> list[Tensor]:
    """Cut a map into its windows, in the order in which a neuron visits them.

    Args:
        x: Map of shape ``(B, C, H, W)``.
        kind: One of :data:`WINDOWS`.

    Returns:
        Four tensors ``(B, C, side(H), side(W))``, or the map alone where it is one window. They are views, but for the
        grid windows of a map with an odd side.

    Raises:
        ValueError: If ``kind`` is not known.
    """
    height, width = x.shape[2], x.shape[3]
    h, w = side(kind, height), side(kind, width)
    if count(kind, height, width) == 1:
        return [x]
    if kind == "grid":
        if height % 2 == 1 or width % 2 == 1:
            x = F.pad(x, [0, width % 2, 0, height % 2])
        return [x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]]
    top, bottom = x[:, :, :h], x[:, :, height - h :]
    return [top[:, :, :, :w], top[:, :, :, width - w :], bottom[:, :, :, :w], bottom[:, :, :, width - w :]]


def _join(first: Tensor, second: Tensor, size: int, dim: int) -> Tensor:
    """Put two windows side by side on axis ``dim`` of ``size`` pixels, with their mean where they overlap."""
    h = first.shape[dim]
    overlap = 2 * h - size
    if overlap == 0:
        return torch.cat([first, second], dim)
    own = size - h
    shared = (first.narrow(dim, own, overlap) + second.narrow(dim, 0, overlap)) * 0.5
    return torch.cat([first.narrow(dim, 0, own), shared, second.narrow(dim, overlap, own)], dim)


def merge(windows: list[Tensor], kind: str, height: int, width: int) -> Tensor:
    """Put windows back on the map; where they overlap, their mean. The inverse of :func:`split`.

    Args:
        windows: Four tensors ``(B, C, side(H), side(W))``, or one ``(B, C, H, W)``.
        kind: The kind that they were cut with, one of :data:`WINDOWS`.
        height: Height ``H`` of the map in pixels.
        width: Width ``W`` of the map in pixels.

    Returns:
        Map of shape ``(B, C, H, W)``.
    """
    if len(windows) == 1:
        return windows[0]
    if kind == "grid":
        top = torch.stack([windows[0], windows[1]], 4).flatten(3)
        bottom = torch.stack([windows[2], windows[3]], 4).flatten(3)
        return torch.stack([top, bottom], 3).flatten(2, 3)[:, :, :height, :width]
    # Two means of two are the mean of four in the middle, where all windows overlap.
    top = _join(windows[0], windows[1], width, 3)
    bottom = _join(windows[2], windows[3], width, 3)
    return _join(top, bottom, height, 2)
