"""What kernels in Triton and in C share: where the windows of a map lie in memory, and the numbers of projections."""

from torch import Tensor

from lightning_msnn.functional.eager_scan import BATCH
from lightning_msnn.functional.windows import side

__all__ = ["OMEGAS", "Geometry"]

OMEGAS: dict[str, int] = {
    name: number
    for number, name in enumerate(("sine", "mean", "tanh", "exponential", "polynomial", "piecewise_linear", "none"))
}
"""Projections that the kernels know, and their numbers there; others take the plain path."""


class Geometry:
    """Sizes and strides of a map and its windows, in elements.

    Args:
        x: Map ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`~lightning_msnn.functional.eager_scan.BATCH`.
        kind: Kind of windows.
    """

    def __init__(self, x: Tensor, kind: str) -> None:
        n, channels, height, width = x.shape
        self.batch, self.channel, self.row, self.column = x.stride()
        if kind == BATCH:
            n, h, w = n // 4, height, width
            self.offsets = [n * self.batch, 2 * n * self.batch, 3 * n * self.batch]
        else:
            h, w = side(kind, height), side(kind, width)
            down, right = (height - h) * self.row, (width - w) * self.column
            if kind == "grid":
                down, right = self.row, self.column
            self.offsets = [right, down, down + right]
        step = 2 if kind == "grid" else 1
        self.down, self.right = step * self.row, step * self.column
        self.sizes = (n, channels, height, width, h, w)
        """Images, channels, height and width of the map, height and width of a window."""
