"""A convolution for small maps on CPUs, whose gradients are matrix products.

oneDNN takes several times as long as a matrix product of the same size to form the gradient of a kernel where a map has
few pixels. Here it is one product, with a matrix of the input pixels that each output pixel meets, made in the backward
pass. On two by two pixels the output and the gradient of the input are one product each, every pixel with every other.

The gradients are made of plain torch, so that it can be differentiated twice. :mod:`lightning_msnn.nn.synapse` says
where it is the faster one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dense_matrix", "small_convolution"]


def _dense(x: Tensor, weight: Tensor) -> bool:
    """Whether output and gradient of the input are products of all pixels with all."""
    return x.shape[2] == x.shape[3] == 2 and weight.shape[2] == weight.shape[3] == 3 and weight.shape[1] == x.shape[1]


def dense_matrix(weight: Tensor) -> Tensor:
    """Make the matrix ``(4 O, 4 C)`` of a 3x3 kernel on two by two pixels, pixels before channels.

    Args:
        weight: The kernel, ``(O, C, 3, 3)``.
    """
    taps = weight.permute(0, 2, 3, 1)
    # For each pixel of the output, the part of the kernel that the four pixels of the input meet.
    return torch.cat([taps[:, i : i + 2, j : j + 2] for i in (1, 0) for j in (1, 0)]).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """Lay maps ``(B, C, H, W)`` out as ``(B, H W C)``."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def _maps(rows: Tensor, channels: int) -> Tensor:
    """Return ``(B, 4 C)`` to maps ``(B, C, 2, 2)`` in channels-last order."""
    return rows.view(-1, 2, 2, channels).permute(0, 3, 1, 2)


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the kernel: one product with a matrix that has a row for each pixel and a column for each weight."""
    rows, columns = weight.shape[2], weight.shape[3]
    grads = grad.permute(0, 2, 3, 1)
    padded = F.pad(x.permute(0, 2, 3, 1), [0, 0, columns // 2, columns // 2, rows // 2, rows // 2])
    batch, height, width, channels = padded.shape
    if weight.shape[1] < channels:  # each channel sees only itself
        height, width = height - rows + 1, width - columns + 1
        taps = [
            (padded[:, i : i + height, j : j + width] * grads).sum((0, 1, 2))
            for i in range(rows)
            for j in range(columns)
        ]
        return torch.stack(taps, 1).view(len(weight), 1, rows, columns)
    # Pixels that a row of the kernel meets lie one after another.
    met = padded.as_strided(
        (batch, height - rows + 1, width - columns + 1, rows, columns * channels),
        (padded.stride(0), padded.stride(1), padded.stride(2), padded.stride(1), 1),
    )
    product = grads.reshape(-1, len(weight)).t() @ met.reshape(-1, rows * columns * channels)
    return product.view(len(weight), rows, columns, channels).permute(0, 3, 1, 2)


def _padding(weight: Tensor) -> list[int]:
    return [weight.shape[2] // 2, weight.shape[3] // 2]


class _SmallConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _dense(x, weight):
            every = None if bias is None else bias.repeat(4)
            return _maps(F.linear(_rows(x), dense_matrix(weight), every), len(weight))
        y = F.conv2d(x, weight, bias, padding=_padding(weight), groups=x.shape[1] // weight.shape[1])
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if _dense(x, weight):
                grad_x = _maps(_rows(grad) @ dense_matrix(weight), x.shape[1])
            else:
                groups = x.shape[1] // weight.shape[1]
                geometry = ([1, 1], _padding(weight), [1, 1], False, [0, 0], groups)
                grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(grad, x, weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def small_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve maps that stay as large as they are, as ``conv2d`` does.

    Args:
        x: Maps ``(B, C, H, W)`` in channels-last order.
        weight: Kernel of odd sides ``(O, C, k, l)``, or ``(C, 1, k, l)``, by which each channel sees only itself.
        bias: Bias ``(O,)``, or None.

    Returns:
        Maps ``(B, O, H, W)`` in channels-last order.
    """
    y: Tensor = _SmallConvolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
