"""What the kernels cover, what they take of a layer of neurons, and where its windows lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from lightning_msnn.functional.projection import PROJECTIONS
from lightning_msnn.functional.spike import SURROGATES
from lightning_msnn.functional.windows import WINDOWS, split

__all__ = ["FORMS", "KINDS", "OMEGAS", "SURROGATE", "Layer", "Made", "Shapes", "Tables", "Tensors", "shapes", "tables"]

# What the kernels compute. A name of something else, or another definition under one of these names, runs on torch.
FORMS = ("still", "first", "coupled", "recurrent")
"""How membranes travel: not at all, as layer 1's, as layer 2's, or on a map that goes from block to block."""
OMEGAS = {name: PROJECTIONS[name] for name in ("sine", "none")}
"""Projections by name."""
SURROGATE = SURROGATES["triangular"]
"""The surrogate gradient."""
KINDS = dict(WINDOWS)
"""Kinds of windows by name: all of the package's own, since the kernels read where windows lie from tables."""


class Layer(NamedTuple):
    """A layer of neurons without its tensors.

    Args:
        form: One of :data:`FORMS`.
        omega: Projection, one of :data:`OMEGAS`; plays no part in the first two forms.
        kind: Kind of windows, one of :data:`KINDS`.
        fires: Whether the layer returns spikes, not membranes.
        windows_in: Whether the current is a batch of windows ``(n B, C, h, w)``, not a map.
        windows_out: Whether the windows fire, not the merged map.
        handed: How many of the last channels hand on their membranes in all windows but the last.
        keeps: Whether the merged membranes are returned beside the spikes.
        training: Whether the norm takes the statistics of the current, not the running ones.
        bytes: Whether spikes are bytes, uint8, not of the current's type; in inference, on CPUs.
        levels: Levels of a spike, which is the largest one.
        threshold: Threshold, where none is learnt.
        eps: What the norm adds to the variance.
    """

    form: str = "still"
    omega: str = "none"
    kind: str = "single"
    fires: bool = False
    windows_in: bool = False
    windows_out: bool = False
    handed: int = 0
    keeps: bool = False
    training: bool = False
    bytes: bool = False
    levels: int = 1
    threshold: float = 0.5
    eps: float = 1e-5


class Tensors(TypedDict, total=False):
    """The tensors of a layer of neurons beside its current; one that it does not have is None or left out.

    Args:
        residual: What is added to the membranes that a layer without spikes returns, of their shape.
        other: Membranes of layer 1, ``((n - 1) B, C, h, w)``, or the map ``(B, C, H, W)`` that a recurrent layer
            receives.
        weight: Scale of the norm by channel.
        bias: Shift of the norm by channel.
        running_mean: Mean by channel, if the norm takes running statistics; a layer without norm has none.
        running_var: Variance by channel, likewise.
        tau: Decay from window to window, a scalar or ``(C, 1, 1)``.
        theta: Radian factor in units of pi, a scalar tensor.
        level: Learnt threshold, one number or one for each channel.
        anneal: Share ``a`` of the step in what neurons return in training, a scalar tensor; None is 1.
    """

    residual: Tensor | None
    other: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    tau: Tensor | None
    theta: Tensor | None
    level: Tensor | None
    anneal: Tensor | None


Made = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""What a layer returns, hands on and keeps, and its norm: see :func:`lightning_msnn.kernels.layer.neurons`."""


@dataclass(frozen=True)
class Tables:
    """Where the windows of a map lie.

    Args:
        windows: Number of windows; 0 where nothing is cut, so that pixels are independent of each other.
        places: Pixels of a window.
        pixels: Pixels of the map.
        run: How many places lie one after another wherever they are read or written: a divisor of ``places``.
        overlaps: Whether windows overlap on the map.
        padded: Whether some places of windows lie beyond it.
        current: Height and width of the maps of the current: of the map, or of a window.
        out: The same of what the layer returns.
        window: Height and width of a window.
        index_in: For each window and place, the pixel of an image's current; one past the last where it is padded.
        index_out: The same of its output.
        index_map: The same of the whole map.
        share: For each pixel of the output, one over the number of windows that cover it; None where that is one.
    """

    windows: int
    places: int
    pixels: int
    run: int
    overlaps: bool
    padded: bool
    current: tuple[int, int]
    out: tuple[int, int]
    window: tuple[int, int]
    index_in: Tensor
    index_out: Tensor
    index_map: Tensor
    share: Tensor | None


@lru_cache(maxsize=256)
def tables(kind: str, windows_in: bool, windows_out: bool, height: int, width: int) -> Tables:
    """Find where the windows of a layer lie on a map, by cutting a map of numbers.

    Args:
        kind: Kind of windows.
        windows_in: Whether the current is a batch of windows.
        windows_out: Whether the output is one.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
    """
    pixels, whole = height * width, (height, width)
    cut = split(torch.arange(1.0, pixels + 1, dtype=torch.float64, device="cpu").view(1, 1, height, width), kind)
    if len(cut) == 1:
        nothing = torch.empty(0, dtype=torch.int32, device="cpu")
        return Tables(0, pixels, pixels, 1, False, False, whole, whole, whole, nothing, nothing, nothing, None)
    window = (cut[0].shape[2], cut[0].shape[3])
    numbers = torch.stack([w.flatten() for w in cut]).long() - 1
    covering = torch.bincount(numbers[numbers >= 0], minlength=pixels)
    on_map = torch.where(numbers < 0, pixels, numbers)
    apart = torch.arange(on_map.numel(), device="cpu").view_as(on_map)
    # Rows of a window lie one after another, but where a kind skips pixels or pads them.
    rows = on_map.view(len(cut), -1, window[1])
    padded, overlaps = int(rows.max()) >= pixels, int(covering.max()) > 1
    consecutive = bool((rows.diff(dim=2) == 1).all()) and not padded
    return Tables(
        windows=len(cut),
        places=on_map.shape[1],
        pixels=pixels,
        run=rows.shape[2] if consecutive else 1,
        overlaps=overlaps,
        padded=padded,
        current=window if windows_in else whole,
        out=window if windows_out else whole,
        window=window,
        index_in=(apart if windows_in else on_map).int(),
        index_out=(apart if windows_out else on_map).int(),
        index_map=on_map.int(),
        share=None if windows_out or not overlaps else (1.0 / covering).float(),
    )


class Shapes(NamedTuple):
    """Shapes of a layer's maps; None is a map that it does not have.

    Args:
        current: Of the current.
        out: Of what the layer returns and keeps, and of the residual stream.
        handed: Of the membranes that it hands on.
        other: Of the membranes of layer 1, or of the map that a recurrent layer receives.
    """

    current: tuple[int, ...]
    out: tuple[int, ...]
    handed: tuple[int, ...] | None
    other: tuple[int, ...] | None


def shapes(layer: Layer, size: tuple[int, int], current: Sequence[int]) -> Shapes:
    """Return the shapes that a layer's maps must have.

    Args:
        layer: The layer.
        size: Height and width of the map in pixels.
        current: Shape of its current, from which the number of images and channels are taken.
    """
    at, channels = tables(layer.kind, layer.windows_in, layer.windows_out, *size), current[1]
    n = max(at.windows, 1)
    images = current[0] // n if layer.windows_in else current[0]
    before = ((n - 1) * images, channels, *at.window)
    return Shapes(
        current=(images * n if layer.windows_in else images, channels, *at.current),
        out=(images * n if layer.windows_out else images, channels, *at.out),
        handed=(before[0], layer.handed, *at.window) if layer.handed and at.windows else None,
        other={"coupled": before, "recurrent": (images, channels, *size)}.get(layer.form) if at.windows else None,
    )
