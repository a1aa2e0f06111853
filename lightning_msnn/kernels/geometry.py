"""What the kernels are told of a layer of neurons: names that they know, flags, and where its windows lie."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_msnn.functional.windows import count, side, split

__all__ = [
    "FORMS",
    "KINDS",
    "OMEGAS",
    "SOFT",
    "SUMS",
    "SURROGATES",
    "Layer",
    "Tables",
    "batches",
    "empty",
    "last",
    "layer_of",
    "outputs",
    "tables",
    "vector",
]

# What the kernels know, by the numbers that they know it by. Other names run on the reference.
FORMS = ("still", "first", "coupled", "recurrent")
"""How membranes travel: not at all, as layer 1's, as layer 2's, or on a map that goes from block to block."""
OMEGAS = ("sine", "mean", "tanh", "exponential", "polynomial", "piecewise_linear", "none")
"""Projections."""
SURROGATES = ("triangular", "rectangular", "arctan", "sigmoid")
"""Surrogate gradients."""
SOFT = ("rectifier", "ramp", "graded")
"""What neurons return in training beside the step."""
KINDS = ("single", "non_dilated", "dilated", "grid")
"""Kinds of windows."""
SUMS = 5
"""Sums by channel that a backward pass makes."""


class Layer(NamedTuple):
    """What a layer of neurons is, but for its tensors.

    Args:
        form: One of :data:`FORMS`.
        omega: Projection, one of :data:`OMEGAS`; plays no part in the first two forms.
        kind: Kind of windows, one of :data:`KINDS`.
        surrogate: Surrogate gradient, one of :data:`SURROGATES`; ``""`` for a layer that returns its membranes.
        soft: One of :data:`SOFT`; plays a part where the operation is given ``anneal``.
        windows_in: Whether the current is a batch of windows ``(n B, C, h, w)``, not a map.
        windows_out: Whether the windows fire, not the merged map.
        handed: Of how many of the last channels the membranes of all windows but the last are returned.
        keeps: Whether the merged membranes are returned beside the spikes.
        training: Whether the norm takes the statistics of the current, not the running ones.
        synchronised: Whether it takes those of all processes.
        threshold: Threshold, where none is learnt.
        eps: What the norm adds to the variance.
    """

    form: str = "still"
    omega: str = "none"
    kind: str = "single"
    surrogate: str = ""
    soft: str = "rectifier"
    windows_in: bool = False
    windows_out: bool = False
    handed: int = 0
    keeps: bool = False
    training: bool = False
    synchronised: bool = False
    threshold: float = 0.5
    eps: float = 1e-5

    def spec(self) -> str:
        """All of it as one string, which is how an operator takes it."""
        return (
            f"{self.form}|{self.omega}|{self.kind}|{self.surrogate}|{self.soft}|{self.windows_in:d}|"
            f"{self.windows_out:d}|{self.handed}|{self.keeps:d}|{self.training:d}|{self.synchronised:d}|"
            f"{self.threshold!r}|{self.eps!r}"
        )


@lru_cache(maxsize=1024)
def layer_of(spec: str) -> Layer:
    """The layer of a :meth:`Layer.spec`.

    Args:
        spec: What the method returned.
    """
    form, omega, kind, surrogate, soft, *words = spec.split("|")
    windows_in, windows_out, keeps, training, synchronised = (words[i] == "1" for i in (0, 1, 3, 4, 5))
    return Layer(
        form, omega, kind, surrogate, soft, windows_in, windows_out, int(words[2]), keeps, training, synchronised,
        float(words[6]), float(words[7]),
    )  # fmt: skip


class Sizes(NamedTuple):
    """Sizes of a layer's maps.

    Args:
        windows: Number of windows; 0 where nothing is cut, so that pixels are independent of each other.
        current: Height and width of the maps of the current: of the map, or of a window.
        out: The same of what the layer returns.
        window: Height and width of a window.
    """

    windows: int
    current: tuple[int, int]
    out: tuple[int, int]
    window: tuple[int, int]


def sizes(layer: Layer, height: int, width: int) -> Sizes:
    """Sizes of a layer's maps.

    Args:
        layer: The layer.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
    """
    n, whole = count(layer.kind, height, width), (height, width)
    if n == 1:
        return Sizes(0, whole, whole, whole)
    window = (side(layer.kind, height), side(layer.kind, width))
    return Sizes(n, window if layer.windows_in else whole, window if layer.windows_out else whole, window)


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
def tables(layer: Layer, height: int, width: int, device: torch.device) -> Tables:
    """Where the windows of a layer lie on a map.

    Args:
        layer: The layer.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
        device: Where the tables are wanted.
    """
    (n, current, out, window), pixels = sizes(layer, height, width), height * width
    if n == 0:
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        return Tables(0, pixels, pixels, 1, False, False, current, out, window, nothing, nothing, nothing, None)
    numbered = torch.arange(1.0, pixels + 1, dtype=torch.float64, device="cpu").view(1, 1, height, width)
    numbers = torch.stack([w.flatten() for w in split(numbered, layer.kind)]).long() - 1
    covering = torch.bincount(numbers[numbers >= 0], minlength=pixels)
    on_map = torch.where(numbers < 0, pixels, numbers)
    apart = torch.arange(on_map.numel(), device="cpu").view_as(on_map)
    # Rows of a window, but where a kind skips pixels or pads them.
    rows = on_map.view(n, -1, window[1])
    padded, overlaps = int(rows.max()) >= pixels, int(covering.max()) > 1
    consecutive = bool((rows.diff(dim=2) == 1).all()) and not padded
    share = None if layer.windows_out or not overlaps else 1.0 / covering
    return Tables(
        n,
        on_map.shape[1],
        pixels,
        rows.shape[2] if consecutive else 1,
        overlaps,
        padded,
        current,
        out,
        window,
        (apart if layer.windows_in else on_map).to(device, torch.int32),
        (apart if layer.windows_out else on_map).to(device, torch.int32),
        on_map.to(device, torch.int32),
        None if share is None else share.to(device, torch.float32),
    )


def last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a map in channels-last order.

    Args:
        x: Map ``(B, C, H, W)``.
        dtype: Its data type, that of ``x`` if None.
    """
    x = x if dtype is None else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Uninitialised map in channels-last order, in the data type and on the device of another.

    Args:
        like: The other.
        batch: Images.
        channels: Channels.
        size: Height and width in pixels.
    """
    shape = (batch, channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def vector(x: Tensor | None, name: str, *sizes: int) -> Tensor | None:
    """Return a parameter as the kernels read it, without gaps.

    Args:
        x: The parameter; None stays None.
        name: Its name, for the message.
        *sizes: How many numbers it may have.

    Raises:
        ValueError: If it has another number of them.
    """
    if x is None:
        return None
    if x.numel() not in sizes:
        allowed = " or ".join(str(size) for size in dict.fromkeys(sizes))
        raise ValueError(f"{name} must have {allowed} numbers, not {x.numel()}")
    return x.detach().reshape(-1).contiguous()


def outputs(layer: Layer, at: Sizes | Tables, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tensors for what a layer returns, hands on and keeps; what there is not is an empty tensor.

    Args:
        layer: The layer.
        at: Its sizes.
        current: Its current.
    """
    _, after, before = batches(layer, at.windows, current)
    channels, (out_size, window) = current.shape[1], (at.out, at.window)
    out = empty(current, after, channels, out_size)
    handed = empty(current, before, layer.handed, window) if layer.handed and before else current.new_empty(0)
    return out, handed, torch.empty_like(out) if layer.keeps else current.new_empty(0)


def batches(layer: Layer, windows: int, current: Tensor) -> tuple[int, int, int]:
    """Images, images of the output, and images of the membranes that are handed on.

    Args:
        layer: The layer.
        windows: Number of windows, 0 where nothing is cut.
        current: Its current.
    """
    batch = current.shape[0]
    images = batch // windows if windows and layer.windows_in else batch
    return images, images * windows if windows and layer.windows_out else images, max(windows - 1, 0) * images
