"""Neurons that stand for the rectifiers of a trained network, and the best way for them to begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.functional.spike import triangular
from lightning_msnn.nn import Neuron, Spike
from lightning_msnn.nn.neuron import refuse_gradient

__all__ = ["FixedSpike", "RectifierSpike", "quantiser"]

_VALUES = 4096  # of a channel that a quantiser is fitted to, at most


def _level(membrane: Tensor, threshold: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """How many of ``V, 3 V, ..., (2 D - 1) V`` a membrane has reached: midpoints between multiples of ``2 V``."""
    spikes = (membrane >= threshold).to(dtype)
    for odd in range(3, 2 * levels, 2):
        spikes += membrane >= odd * threshold
    return spikes


class _Step(torch.autograd.Function):
    """:func:`_level`; backward, a triangle of area 1 about each threshold, ``V`` wide to either side."""

    generate_vmap_rule = True

    @staticmethod
    def forward(membrane: Tensor, threshold: Tensor, levels: int) -> Tensor:
        return _level(membrane, threshold, levels, membrane.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.levels = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        membrane, threshold = ctx.saved_tensors
        place, odd = membrane / threshold, 1.0
        if ctx.levels > 1:  # the nearest threshold
            odd = (2.0 * (place / 2.0).floor() + 1.0).clamp(1.0, 2.0 * ctx.levels - 1.0)
        grad = triangular(place - odd).mul_(grads[0]).div_(threshold)
        return grad, -(grad * odd).sum_to_size(threshold.shape), None


class RectifierSpike(Spike):
    """Neurons in the place of a rectifier: ``lambda_c s`` stands for its value ``x`` in channel ``c``.

    They return spikes ``s = H(x - V_c)``, exactly 0 or 1; with ``D`` levels, how many of the thresholds
    ``V_c, 3 V_c, ..., (2 D - 1) V_c`` the value has reached, so that it is rounded to a multiple of ``2 V_c``.
    ``lambda_c`` is multiplied into the weights that the spikes meet. As ``V_c`` is positive, it is the same whether the
    membrane is the rectifier's current or its value. While annealing with share ``a`` they return
    ``a lambda_c s + (1 - a) x``, for the weights as they are: at ``a = 0``, what the rectifier did. Both numbers are
    learnt as logarithms, so that they stay positive and learn at the same pace in channels of any scale.

    Args:
        channels: Number of channels.
        spatial: Axes that follow that of the channels: 2 before a convolution of images, 0 before a linear layer.
        levels: Levels ``D`` of a spike, 1 to 15.

    Raises:
        ConfigurationError: If there are no such levels.
    """

    def __init__(self, channels: int, spatial: int, levels: int = 1) -> None:
        super().__init__(Neuron(levels=levels))
        self.threshold = 1.0  # in units of each channel's own
        self.shape = (channels, *[1] * spatial)
        self.log_threshold = nn.Parameter(torch.full((channels,), 0.5).log())
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map a rectifier's values, ``(B, C, *spatial)`` or ``(..., C)``, to spikes of that shape."""
        threshold = self.log_threshold.exp().view(self.shape).to(x.dtype)
        spikes: Tensor = _Step.apply(x, threshold, self.levels)  # type: ignore[no-untyped-call]
        share = self.share(x)
        if share is None:
            return spikes
        scale = self.log_scale.exp().view(self.shape).to(x.dtype)
        return x * (1.0 - share) + spikes * (share * scale)  # to x the rectifier has been applied

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Begin with the best quantiser of a rectifier's values, as :meth:`forward` takes them."""
        values = x.movedim(x.dim() - len(self.shape), 0).flatten(1).float()
        values = values.cpu() if values.device.type == "mps" else values  # which has no float64
        threshold, scale = quantiser(values, self.levels)
        self.log_threshold.copy_(threshold.log())
        self.log_scale.copy_(scale.log())

    def extra_repr(self) -> str:
        """Show the number of channels, and of levels."""
        return f"channels={self.shape[0]}" + (f", levels={self.levels}" if self.levels > 1 else "")


class FixedSpike(nn.Module):
    """Spikes of fixed thresholds in the place of neurons, for inference."""

    threshold: Tensor
    dtype: torch.dtype | None = None
    """Type of the spikes; None is that of what it is given."""

    def __init__(self, neuron: RectifierSpike) -> None:
        super().__init__()
        self.register_buffer("threshold", neuron.log_threshold.detach().exp().view(neuron.shape))
        self.levels = neuron.levels

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to spikes of that shape."""
        refuse_gradient(x)
        return _level(x, self.threshold.to(x.dtype), self.levels, self.dtype or x.dtype)


def quantiser(x: Tensor, levels: int = 1) -> tuple[Tensor, Tensor]:
    """Find ``V`` and ``lambda`` of each channel that minimise the mean of ``(x - lambda s)^2``.

    ``s`` is how many of ``V, 3 V, ..., (2 D - 1) V`` the value has reached. Given ``V``, the best ``lambda`` is
    ``sum(x s) / sum(s^2)``, and the error is less by ``sum(x s)^2 / sum(s^2)``: the best of all ``V`` between two
    values is taken. With one level this is the fixed point of Lloyd and Max (Lloyd, *Least squares quantization in
    PCM*, 1982) with levels 0 and ``lambda``, where ``V = lambda / 2``.

    Args:
        x: Values that the spikes stand for, ``(C, N)``.
        levels: Levels ``D``.

    Returns:
        ``V`` and ``lambda``, positive, ``(C,)``; those of a channel that is never positive are the medians of the
        others, or 0.5 and 1 if there are none.
    """
    if x.shape[1] > _VALUES:  # at random: a fixed step could meet the same columns of every map
        chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")[:_VALUES]
        x = x[:, chosen.to(x.device)]
    x = x.contiguous().sort(1, descending=True).values
    sums = x.double().cumsum(1)  # of the values above a threshold
    thresholds = (x + nn.functional.pad(x[:, 1:], (0, 1)).clamp(min=0.0)) / 2
    total, squares = sums, torch.arange(1, sums.shape[1] + 1, device=x.device).expand_as(sums)
    for odd in range(3, 2 * levels, 2):  # a level more adds x to sum(x s), and 2 s - 1 to sum(s^2)
        reached = torch.searchsorted(-x, -odd * thresholds, right=True)
        total = total + nn.functional.pad(sums, (1, 0)).gather(1, reached)
        squares = squares + odd * reached
    gain = torch.where(x > 0, total.square() / squares, -1.0)
    best = gain.argmax(1, keepdim=True)
    scale, threshold = (v.gather(1, best).squeeze(1) for v in (total / squares, thresholds.double()))
    alive = gain.amax(1) > 0
    most = (v[alive].median() if alive.any() else other for v, other in ((threshold, 0.5), (scale, 1.0)))
    threshold, scale = (torch.where(alive, v, other).float() for v, other in zip((threshold, scale), most, strict=True))
    return threshold, scale
