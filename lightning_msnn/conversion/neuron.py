"""Neurons that stand for the rectifiers of a trained network, and the best way for them to begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.functional.membrane import scan
from lightning_msnn.functional.spike import triangular
from lightning_msnn.functional.windows import merge, split
from lightning_msnn.nn import Spike, make_decay

__all__ = ["FixedSpike", "RectifierSpike", "WindowMembrane", "one_bit_quantiser"]

_VALUES = 4096  # of a channel that a quantiser is fitted to, at most
_TAU = 0.4


class _Step(torch.autograd.Function):
    """``H(u - V)``; backward, a triangle of area 1 about ``V`` that is as wide as from 0 to ``2 V``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(membrane: Tensor, threshold: Tensor) -> Tensor:
        return (membrane >= threshold).to(membrane.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        membrane, threshold = ctx.saved_tensors
        grad = triangular(membrane / threshold - 1.0).mul_(grads[0]).div_(threshold)
        return grad, -grad.sum_to_size(threshold.shape)


class WindowMembrane(nn.Module):
    """A membrane that visits the windows of a map, with a decay learnt by channel, and is merged."""

    def __init__(self, channels: int, windows: str) -> None:
        super().__init__()
        self.windows = windows
        self.decay = make_decay(channels, _TAU, True)

    def forward(self, current: Tensor) -> Tensor:
        """Map currents to membranes, both ``(B, C, H, W)``."""
        cut = split(current, self.windows)
        return merge(scan(cut, self.decay().to(current.dtype)), self.windows, *current.shape[2:])


class RectifierSpike(Spike):
    """Neurons in the place of a rectifier: ``lambda_c H(x - V_c)`` stands for its value ``x`` in channel ``c``.

    They return ``H(x - V_c)``, exactly 0 or 1; ``lambda_c`` is multiplied into the weights that the spikes meet. As
    ``V_c`` is positive, it is the same whether the membrane is the rectifier's current or its value. While annealing
    with share ``a`` they return ``a lambda_c H(x - V_c) + (1 - a) x``, for the weights as they are: at ``a = 0``, what
    the rectifier did. Both numbers are learnt as logarithms, so that they stay positive and learn at the same pace in
    channels of any scale.

    Args:
        channels: Number of channels.
        spatial: Axes that follow that of the channels: 2 before a convolution of images, 0 before a linear layer.
        windows: Kind of windows that the membrane visits, one of :data:`lightning_msnn.functional.WINDOWS`.
    """

    def __init__(self, channels: int, spatial: int, windows: str = "single") -> None:
        super().__init__()
        self.threshold = 1.0  # in units of each channel's own
        self.shape = (channels, *[1] * spatial)
        self.windows = windows
        self.log_threshold = nn.Parameter(torch.full((channels,), 0.5).log())
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.membrane = None if windows == "single" else WindowMembrane(channels, windows)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map a rectifier's values, ``(B, C, *spatial)`` or ``(..., C)``, to spikes of that shape."""
        membrane = x if self.membrane is None else self.membrane(x)
        threshold = self.log_threshold.exp().view(self.shape).to(x.dtype)
        spikes: Tensor = _Step.apply(membrane, threshold)  # type: ignore[no-untyped-call]
        share = self.share(x)
        if share is None:
            return spikes
        scale = self.log_scale.exp().view(self.shape).to(x.dtype)
        return x * (1.0 - share) + spikes * (share * scale)  # to x the rectifier has been applied

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Begin with the best one-bit quantiser of a rectifier's values, as :meth:`forward` takes them."""
        axis = x.dim() - len(self.shape)
        membrane = x if self.membrane is None else self.membrane(x)
        threshold, scale = one_bit_quantiser(*(v.movedim(axis, 0).flatten(1).float() for v in (membrane, x)))
        self.log_threshold.copy_(threshold.log())
        self.log_scale.copy_(scale.log())

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"channels={self.shape[0]}"


class FixedSpike(nn.Module):
    """``H(x - V_c)`` with fixed thresholds in the place of neurons, for inference."""

    threshold: Tensor
    dtype: torch.dtype | None = None
    """Type of the spikes; None is that of what it is given."""

    def __init__(self, neuron: RectifierSpike) -> None:
        super().__init__()
        self.register_buffer("threshold", neuron.log_threshold.detach().exp().view(neuron.shape))
        self.membrane: WindowMembrane | None = neuron.membrane

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to spikes of that shape."""
        membrane = x if self.membrane is None else self.membrane(x)
        return (membrane >= self.threshold.to(x.dtype)).to(self.dtype or x.dtype)


def one_bit_quantiser(membrane: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Find ``V`` and ``lambda`` of each channel that minimise the mean of ``(x - lambda H(membrane - V))^2``.

    If the ``k`` largest membranes fire, the best ``lambda`` is the mean of their values, and the error is less by
    ``sum^2 / k``: the best of all ``k`` is taken. Where ``membrane`` is ``x``, this is the fixed point of Lloyd and Max
    (Lloyd, *Least squares quantization in PCM*, 1982) with levels 0 and ``lambda``, where ``V = lambda / 2``.

    Args:
        membrane: What is compared with ``V``, ``(C, N)``.
        x: What the spikes stand for, ``(C, N)``.

    Returns:
        ``V`` and ``lambda``, positive, ``(C,)``; those of a channel that is never positive are the medians of the
        others, or 0.5 and 1 if there are none.
    """
    step = max(1, membrane.shape[1] // _VALUES)
    membrane, order = membrane[:, ::step].sort(1, descending=True)
    total = x[:, ::step].gather(1, order).double().cumsum(1)
    count = torch.arange(1, total.shape[1] + 1, device=x.device)
    gain = torch.where((membrane > 0) & (total > 0), total.square() / count, -1.0)
    best = gain.argmax(1, keepdim=True)
    scale = (total.gather(1, best) / (best + 1)).squeeze(1)
    below = nn.functional.pad(membrane, (0, 1)).clamp(min=0.0).gather(1, best + 1)
    threshold = ((membrane.gather(1, best) + below) / 2).squeeze(1).double()
    alive = gain.amax(1) > 0
    most = (v[alive].median() if alive.any() else other for v, other in ((threshold, 0.5), (scale, 1.0)))
    threshold, scale = (torch.where(alive, v, other).float() for v, other in zip((threshold, scale), most, strict=True))
    return threshold, scale
