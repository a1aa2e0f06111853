"""What the kernels are told of a layer of neurons: names that they know, flags, and where its windows lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from lightning_msnn.functional.windows import count, shape, split

__all__ = [
    "FORMS",
    "KINDS",
    "OMEGAS",
    "SOFT",
    "SUMS",
    "SURROGATES",
    "Layer",
    "Parameters",
    "Shapes",
    "Tables",
    "last",
    "layer_of",
    "outputs",
    "shapes",
    "sizes",
    "tables",
    "vectors",
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
KINDS = ("single", "non_dilated", "dilated", "grid", "time", "time_dilated", "time_grid")
"""Kinds of windows."""
SUMS = 6
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
        bytes: Whether spikes are bytes, uint8, not of the current's type; in inference, on CPUs.
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
    bytes: bool = False
    threshold: float = 0.5
    eps: float = 1e-5

    def spec(self) -> str:
        """All of it but its two numbers as one string, which is how an operator takes it.

        A compiler for any batch keeps numbers open, which then cannot be written down.
        """
        return (
            f"{self.form}|{self.omega}|{self.kind}|{self.surrogate}|{self.soft}|{self.windows_in:d}|"
            f"{self.windows_out:d}|{self.handed}|{self.keeps:d}|{self.training:d}|{self.synchronised:d}|"
            f"{self.bytes:d}"
        )


@lru_cache(maxsize=1024)
def layer_of(spec: str, threshold: float = Layer.threshold, eps: float = Layer.eps) -> Layer:
    """The layer of a :meth:`Layer.spec`.

    Args:
        spec: What the method returned.
        threshold: Its threshold, where that matters.
        eps: What its norm adds to the variance, where that matters.
    """
    form, omega, kind, surrogate, soft, *words = spec.split("|")
    windows_in, windows_out, keeps, training, synchronised, narrow = (words[i] == "1" for i in (0, 1, 3, 4, 5, 6))
    return Layer(
        form, omega, kind, surrogate, soft, windows_in, windows_out, int(words[2]), keeps, training, synchronised,
        narrow, threshold, eps,
    )  # fmt: skip


class Parameters(TypedDict, total=False):
    """The tensors of a layer of neurons beside its maps; what it does not have is None or left out.

    Args:
        weight: Scale of the norm by channel, if it has one.
        bias: Shift of the norm by channel, if it has one.
        running_mean: Mean by channel that a norm takes which is not ``layer.training``; without it there is no norm.
        running_var: Variance by channel, likewise.
        tau: Decay from window to window, a scalar or ``(C, 1, 1)``.
        theta: Radian factor in units of pi, a scalar tensor.
        level: Learnt threshold, one number or one for each channel.
        anneal: Share of the step in what neurons return, a scalar tensor; the rest is ``layer.soft``. None is the step.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    tau: Tensor | None
    theta: Tensor | None
    level: Tensor | None
    anneal: Tensor | None


_LENGTHS = {
    "weight": ("weight", False, True),
    "bias": ("bias", False, True),
    "running_mean": ("running_mean", False, True),
    "running_var": ("running_var", False, True),
    "tau": ("tau", True, True),
    "theta": ("theta", True, False),
    "level": ("the threshold", True, True),
    "anneal": ("the share of spikes", True, False),
}
"""What messages call a parameter, whether it may be one number, and whether one for each channel."""


def vectors(given: Parameters, channels: int) -> dict[str, Tensor]:
    """Return the parameters that there are as the kernels read them, without gaps.

    Args:
        given: The parameters.
        channels: Channels of the layer.

    Raises:
        ValueError: If one has another number of values.
    """
    made = {}
    for key, x in given.items():
        if isinstance(x, Tensor):
            name, single, by_channel = _LENGTHS[key]
            allowed = [1] * single + [channels] * by_channel
            if x.numel() not in allowed:
                raise ValueError(
                    f"{name} must have {' or '.join(map(str, dict.fromkeys(allowed)))} numbers, not {x.numel()}"
                )
            made[key] = x.contiguous()
    return made


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
    window = shape(layer.kind, height, width)
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
    x = x if dtype is None or x.dtype == dtype else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def shapes(layer: Layer, size: tuple[int, int], current: Sequence[int]) -> Shapes:
    """Shapes of what a layer is given and what it returns.

    Args:
        layer: The layer.
        size: Height and width of the map in pixels.
        current: Shape of its current, of which the number of images and channels are taken.
    """
    at, batch, channels = sizes(layer, *size), current[0], current[1]
    n, cut = max(at.windows, 1), at.windows and layer.windows_in
    images = batch // n if cut else batch
    before = ((n - 1) * images, channels, *at.window)
    return Shapes(
        current=(images * n if cut else images, channels, *at.current),
        out=(images * n if at.windows and layer.windows_out else images, channels, *at.out),
        handed=(before[0], layer.handed, *at.window) if layer.handed and at.windows else None,
        other={"coupled": before, "recurrent": (images, channels, *size)}.get(layer.form) if at.windows else None,
    )


def outputs(layer: Layer, at: Shapes, current: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Uninitialised maps in channels-last order for what a layer returns, hands on, and keeps merged.

    None is not wanted.

    Args:
        layer: The layer.
        at: Its shapes.
        current: Its current.
    """
    out = _empty(at.out, current, torch.uint8 if layer.bytes else current.dtype)
    handed = None if at.handed is None else _empty(at.handed, current, current.dtype)
    return out, handed, _empty(at.out, current, current.dtype) if layer.keeps else None


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.shape == shape:  # takes half the time
        return torch.empty_like(like, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
