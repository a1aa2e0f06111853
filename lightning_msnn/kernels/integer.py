"""Convolutions of spikes, which are bytes, with weights of 8 bits: sums of integers, exact in any order.

oneDNN adds them up on processors with 8-bit dot products. Elsewhere, and where operations are traced or watched, plain
torch does so in float32, which holds every such sum below 2^24 exactly: the two agree to the last bit.
"""

import logging
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_msnn.kernels.convolution import dense_matrix
from lightning_msnn.kernels.layer import eager

__all__ = ["MOST", "Packed", "Steps", "available", "convolve"]

logger = logging.getLogger(__name__)

MOST = 2**24 // 127
"""Most weights of an output channel whose sum float32 holds."""

_FEWEST = 32
"""Images from which on a 3x3 convolution on two by two pixels is worth the matrix of every pixel with every other."""

_SHAPES = 4
"""Shapes of maps for which the order of the weights is kept."""


class Steps(NamedTuple):
    """How a kernel goes over a map; by default one of 3x3 pixels over every pixel of a map that stays as large.

    Args:
        stride: Pixels from one place to the next, by axis.
        padding: Zeros around the map, by axis.
        dilation: Pixels from one weight of the kernel to the next, by axis.
        groups: Groups of channels that do not see each other.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def _covered(spikes: Tensor, kernel: torch.Size, steps: Steps) -> bool:
    """Whether oneDNN is used: where it was found to be exact.

    On maps of one column after a stride, with dilation, and with more zeros than a kernel reaches, it reads beside the
    map (oneDNN 3.12, which torch 2.13 has).
    """
    if steps.dilation != (1, 1) or steps.padding[0] > kernel[0] // 2 or steps.padding[1] > kernel[1] // 2:
        return False
    if steps.stride == (1, 1):
        return True
    return steps.stride == (2, 2) and spikes.shape[3] + 2 * steps.padding[1] >= kernel[1] + 2  # two columns or more


class Packed:
    """Weights in oneDNN's order. They are not saved or copied: each network makes its own when it needs them."""

    def __init__(self) -> None:
        self.forms: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return Packed, ()


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether oneDNN adds up integers here; where it does not, the log says so, once."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if torch.cpu._is_vnni_supported() or able.get("avx_vnni", False):
        return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    logger.warning("this processor has no 8-bit dot products (VNNI): integer weights are added up in float32")
    return False


@lru_cache(maxsize=8)
def _adds(dtype: torch.dtype) -> bool:
    """Whether oneDNN adds a residual stream of a type: not one of bfloat16 on every processor."""
    byte, one = torch.zeros(1, 1, dtype=torch.uint8, device="cpu"), torch.ones(1, device="cpu")
    weight = torch.ops.onednn.qlinear_prepack(torch.zeros(1, 1, dtype=torch.int8, device="cpu"), None)
    try:
        _linear(byte, (weight, one, one, one.long()), False, torch.zeros(1, 1, dtype=dtype, device="cpu"))
    except RuntimeError:
        return False
    return True


def _linear(rows: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor], fires: bool, residual: Tensor | None) -> Tensor:
    """A linear layer of rows of bytes: currents, the stream with them, or whether they reach 1, as bytes."""
    weight, scale, bias, zeros = kept
    if residual is not None:
        added: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, weight, scale, zeros, residual, bias, 1.0, 0, residual.dtype, 1.0, 0, "add", 1.0, "none", [],
            "",
        )  # fmt: skip
        return added
    dtype, name, bounds = (torch.uint8, "hardtanh", [0.0, 1.0]) if fires else (torch.float32, "none", [])
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, weight, scale, zeros, bias, 1.0, 0, dtype, name, bounds, ""
    )
    return made


def _in_floats(
    spikes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: Steps, fires: bool, residual: Tensor | None
) -> Tensor:
    device = spikes.device.type
    narrow = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        sums = F.conv2d(spikes.float(), weight.float(), None, *steps)
    if fires:
        return (sums >= 1.0 - bias.view(-1, 1, 1)).to(torch.uint8)
    current = sums * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return current if residual is None else (current + residual).to(residual.dtype)


def _rows(x: Tensor) -> Tensor:
    """Lay maps ``(B, C, H, W)`` out as a row for each pixel."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def convolve(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    packed: Packed,
    steps: Steps,
    fires: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve spikes with integers.

    Args:
        spikes: Spikes ``(B, C, H, W)``, best bytes in channels-last order.
        weight: Integers, int8 ``(O, C / groups, k, l)``, at most :data:`MOST` for each output channel.
        scale: What the sum of an output channel is multiplied by, float32 ``(O,)``.
        bias: What is then added, float32 ``(O,)``.
        packed: Keeps the weight in oneDNN's order from call to call.
        steps: How the kernel goes over the map.
        fires: Whether to return spikes: 1 where that is 1 or more, else 0. The scale must then be 1 and the bias whole.
        residual: Residual stream, in the shape of the currents, that is added.

    Returns:
        Currents, float32 ``(B, O, H', W')``; the residual stream with them, in its type; or spikes as bytes.
    """
    if not (spikes.is_cpu and spikes.numel() and eager(spikes) and available()):
        return _in_floats(spikes, weight, scale, bias, steps, fires, residual)
    if weight.shape[2:] == (1, 1) and steps.padding == (0, 0) and steps.stride != (1, 1):  # the pixels that it meets
        spikes = spikes[:, :, :: steps.stride[0], :: steps.stride[1]]
        steps = steps._replace(stride=(1, 1))
    if not _covered(spikes, weight.shape[2:], steps):
        return _in_floats(spikes, weight, scale, bias, steps, fires, residual)
    spikes = spikes.to(torch.uint8)
    forms = packed.forms
    batch, channels, height, width = spikes.shape
    outputs, reach = len(weight), weight.shape[2] // 2
    alone = steps == Steps(padding=(reach, reach)) and weight.shape[2] == weight.shape[3] == 2 * reach + 1
    if alone and (reach == 0 or height == width == 1):  # only the middle of the kernel meets a pixel
        if "pixel" not in forms:
            middle = torch.ops.onednn.qlinear_prepack(weight[:, :, reach, reach].contiguous(), None)
            forms["pixel"] = middle, scale, bias, torch.zeros_like(scale).long()
        added = residual if residual is not None and _adds(residual.dtype) else None
        y = _linear(_rows(spikes), forms["pixel"], fires, None if added is None else _rows(added))
        residual = None if added is not None else residual
        current = y.view(batch, height, width, outputs).permute(0, 3, 1, 2)
    elif alone and reach == 1 and height == width == 2 and batch >= _FEWEST:
        if "pixels" not in forms:
            every = torch.ops.onednn.qlinear_prepack(dense_matrix(weight), None)
            forms["pixels"] = every, scale.repeat(4), bias.repeat(4), torch.zeros_like(scale).long().repeat(4)
        y = _linear(_rows(spikes).view(batch, 4 * channels), forms["pixels"], fires, None)
        current = y.view(batch, 2, 2, outputs).permute(0, 3, 1, 2)
    else:
        shape = tuple(spikes.shape)
        if shape not in forms:  # oneDNN's order depends on it, and weights in another would be put in order each time
            made = torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, 0, *steps, list(shape))
            if len(shapes := [form for form in forms if isinstance(form, tuple)]) == _SHAPES:
                del forms[shapes[0]]
            forms[shape] = made, scale, torch.zeros_like(scale).long(), bias
        dtype, name, bounds = (torch.uint8, "hardtanh", [0.0, 1.0]) if fires else (torch.float32, "none", [])
        current = torch.ops.onednn.qconv2d_pointwise(
            spikes, 1.0, 0, *forms[shape], *steps, 1.0, 0, dtype, name, bounds, ""
        )
    return current if residual is None else (current + residual).to(residual.dtype)
