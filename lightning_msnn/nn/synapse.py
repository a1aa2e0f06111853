"""Synapses: convolutions that turn spikes into currents; they train by matrix products where that is faster on a CPU.

On small maps oneDNN's convolutions, and above all the gradients of their weights, take up to twenty times as long as
matrix products of the same size. :func:`product_is_faster` is the rule; ``python -m benchmarks.synapses`` measures it.
It holds in training alone: a product may round otherwise than a convolution, and the result for an image must not
depend on how many are evaluated at once.
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.kernels.convolution import small_convolution
from lightning_msnn.kernels.layer import eager
from lightning_msnn.nn.layer import normalise

__all__ = ["CentredConv2d", "PatchConv2d", "Synapse", "product_is_faster"]

_LARGEST = {1: (144, 9), 2: (144, 16), 3: (36, 9)}
"""By side of the kernel, most pixels of an output that is a product: in bfloat16, and in wider types."""

_FEWEST = 32
"""Images from which on a 3x3 convolution is worth its matrix."""


def product_is_faster(
    kernel: int, batch: int, height: int, width: int, dtype: torch.dtype, depthwise: bool = False
) -> bool:
    """Whether a convolution trains faster on a CPU by matrix products, output and gradients together.

    Where products gain less than a tenth on processors with AMX, or lose on those with AVX-512 alone, the answer is no.

    Args:
        kernel: Side of the kernel: 1, 2 with stride 2, or 3.
        batch: Images.
        height: Height of the output in pixels.
        width: Width of the output in pixels.
        dtype: Type that is computed in.
        depthwise: Whether each channel sees only itself.
    """
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        return False
    if kernel == 3 and (batch < _FEWEST or min(height, width) < 2):
        return False
    if depthwise:
        return kernel == 3 and height == 2  # oneDNN is slow on two rows, not on two columns
    return kernel in _LARGEST and height * width <= _LARGEST[kernel][dtype != torch.bfloat16]


def _precision(x: Tensor) -> torch.dtype:
    """Type that a convolution of a tensor is computed in."""
    cast = torch.is_autocast_enabled("cpu") and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if cast else x.dtype


def _is_product(conv: nn.Conv2d, x: Tensor, kernel: int, stride: int = 1) -> bool:
    """Whether a convolution in training is a matrix product: where nothing traces or watches operations."""
    if x.device.type != "cpu" or x.dim() != 4 or not eager(x):
        return False
    depthwise = conv.groups > 1
    if depthwise and not conv.groups == conv.in_channels == conv.out_channels:
        return False
    if x.shape[1] != conv.in_channels or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    height, width = x.shape[2] // stride, x.shape[3] // stride
    return product_is_faster(kernel, len(x), height, width, _precision(x), depthwise)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``(B, C, H, W)`` with a kernel of one pixel."""
    y: Tensor = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1), bias)
    return y.view(len(x), x.shape[2], x.shape[3], len(weight)).permute(0, 3, 1, 2)


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``(B, C, 2 H, 2 W)`` with a kernel of two by two pixels and stride 2."""
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    # A row for each patch. Rounded first: it is copied, and kept for the backward pass in the place of the map.
    pixels = x.to(_precision(x)).permute(0, 2, 3, 1).reshape(batch, height, 2, width, 2 * channels)
    y = F.linear(pixels.transpose(2, 3).flatten(3).flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.view(batch, height, width, len(weight)).permute(0, 3, 1, 2)


def _centred(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``(B, C, H, W)`` with a kernel of odd sides, in the type of autocast as ``conv2d`` does."""
    dtype = _precision(x)
    if torch.is_autocast_enabled("cpu"):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = small_convolution(x.to(dtype), weight, bias)
    return y


@register_notrace_module  # what computes it depends on the size of the map
class PatchConv2d(nn.Conv2d):
    """A 2x2 convolution of stride 2, one linear layer for all patches of four pixels; arguments as of ``nn.Conv2d``.

    On a map of a single row only the upper half of the kernel meets pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.shape[2] == 1:
            return F.conv2d(input, weight[:, :, :1], bias, [2, 2])
        even = input.shape[2] % 2 == input.shape[3] % 2 == 0  # an odd side has pixels in no patch
        if self.training and even and _is_product(self, input, 2, 2):
            return _patches(input, weight, bias)
        y: Tensor = super()._conv_forward(input, weight, bias)
        return y


@register_notrace_module  # what is read of the kernel depends on the size of the map
class CentredConv2d(nn.Conv2d):
    """A convolution of odd kernel that keeps the size of the map; arguments are those of ``nn.Conv2d``.

    On a single row or column it uses only the middle of the kernel, the part that meets pixels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, groups=groups)
        self.reach = kernel_size // 2

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.reach, self.reach
        if input.shape[2] == 1:
            weight, rows = weight[:, :, rows : rows + 1], 0
        if input.shape[3] == 1:
            weight, columns = weight[:, :, :, columns : columns + 1], 0
        if self.training and rows == columns and _is_product(self, input, 2 * rows + 1):
            return _centred(input, weight, bias) if rows else _pointwise(input, weight, bias)
        return F.conv2d(input, weight, bias, [1, 1], [rows, columns], [1, 1], self.groups)


class Synapse(nn.Module):
    """A convolution that turns spikes into a synaptic current, and its batch norm, which folds into it at inference.

    Args:
        in_channels: Channels of the spikes.
        out_channels: Channels of the current.
        kernel_size: Side of the kernel in pixels, odd; the border is padded with zeros to keep the size.
        norm: Whether batch norm follows; without it the convolution has a bias.
        groups: Groups of channels that do not see each other.
    """

    spike_weights: tuple[str, ...] = ("conv.weight",)
    """Names of the weights that meet spikes, which files may keep in 8 bits."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, norm: bool = True, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d = CentredConv2d(in_channels, out_channels, kernel_size, not norm, groups)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, in_channels, H, W)`` to a current ``(B, out_channels, H, W)``, and add a stream like it."""
        return normalise(self.conv(spikes), self.norm, residual)
