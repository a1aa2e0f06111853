"""Windows along one axis: a map cut into four pieces of its width, each of its full height.

For sequences ``(B, C, 1, L)``, and for spectrograms ``(B, C, mels, frames)`` cut in time alone. For a width of ``n``:

=============  =====================================  ================================================================
kind           width of a piece                       piece k = 0, 1, 2, 3
=============  =====================================  ================================================================
time           ``ceil(n / 4)``                        a quarter; a partition where 4 divides ``n``
time_dilated   ``floor(3 n / 8)``, at least of time   an enlarged quarter, half as much again; neighbours overlap
time_grid      ``ceil(n / 4)``                        every fourth column from the k-th on; a map is padded with zeros
                                                      to a multiple of 4, which merging takes off again
=============  =====================================  ================================================================

The first piece begins at the left end, the last ends at the right, and those between are as evenly spaced as columns
allow. A map of fewer than four columns is too small to cut and is one window.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OF_ONE_ROW", "TIME_WINDOWS", "Interleaved", "Pieces", "join"]

PIECES = 4


def join(windows: Sequence[Tensor], starts: Sequence[int], size: int, dim: int) -> Tensor:
    """Put windows side by side on axis ``dim`` of ``size`` pixels, with their mean where neighbours overlap."""
    side, ended, parts = windows[0].shape[dim], 0, []
    for k, (start, window) in enumerate(zip(starts, windows, strict=True)):
        following = starts[k + 1] if k + 1 < len(starts) else size
        parts.append(window.narrow(dim, ended - start, following - ended))
        ended = start + side
        if (overlap := ended - following) > 0:
            parts.append((window.narrow(dim, side - overlap, overlap) + windows[k + 1].narrow(dim, 0, overlap)) * 0.5)
    return torch.cat(parts, dim)


class Pieces:
    """Four pieces of the width of a map; neighbours may overlap.

    Args:
        side: Width of a piece in pixels of a map of so many; at least a quarter of it, rounded up.
    """

    def __init__(self, side: Callable[[int], int]) -> None:
        self.side = side

    def count(self, height: int, width: int) -> int:
        """Four, or one where there are fewer columns than that."""
        return 1 if width < PIECES else PIECES

    def starts(self, width: int) -> list[int]:
        """First column of each piece."""
        return [(k * (width - self.side(width)) + 1) // (PIECES - 1) for k in range(PIECES)]

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of the four pieces."""
        width = x.shape[3]
        return [x.narrow(3, start, self.side(width)) for start in self.starts(width)]

    def merge(self, windows: list[Tensor], height: int, width: int) -> Tensor:
        """Put the pieces back; where neighbours overlap, their mean. No more than two lie on a column."""
        return join(windows, self.starts(width), width, 3)


class Interleaved(Pieces):
    """Four pieces of every fourth column, one for each phase."""

    def __init__(self) -> None:
        super().__init__(lambda size: -(-size // PIECES))

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of the four phases, but for maps that are padded."""
        padded = F.pad(x, [0, -x.shape[3] % PIECES]) if x.shape[3] % PIECES else x
        return [padded[..., k::PIECES] for k in range(PIECES)]

    def merge(self, windows: list[Tensor], height: int, width: int) -> Tensor:
        """The phases interleaved."""
        return torch.stack(windows, 4).flatten(3)[..., :width]


TIME_WINDOWS: dict[str, Pieces] = {
    "time": Pieces(lambda size: -(-size // 4)),
    "time_dilated": Pieces(lambda size: max(3 * size // 8, -(-size // 4))),
    "time_grid": Interleaved(),
}
"""Kinds of windows along the width by the name that configurations use."""

OF_ONE_ROW = {"non_dilated": "time", "dilated": "time_dilated", "grid": "time_grid"}
"""The kind that takes the place of one in two dimensions where a map has a single row."""
