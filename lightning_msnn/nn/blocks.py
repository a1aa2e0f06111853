"""Blocks of the backbone: stem, patch merging, encoder of the residual stream, MLP, residual block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.nn.layer import fire, normalise
from lightning_msnn.nn.neuron import Neuron, Spike
from lightning_msnn.nn.synapse import PatchConv2d, Synapse

__all__ = [
    "MLP", "STEMS", "AnalogueMLP", "BernoulliEncoder", "Block", "Encoder", "PatchMerging", "Stem", "WhitenedStem",
]  # fmt: skip


@register_notrace_module  # runs on a kernel
class Stem(nn.Module):
    """Analogue convolution with batch norm, 3x3 of stride 2 or 7x7 of stride 4: pixels to the residual stream.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the residual stream.
        norm: Whether batch norm follows; without it the convolution has a bias.
        stride: 2, or 4 for images of many pixels.
        kernel: Side of the convolution's kernel, ``2 stride - 1`` by default.
    """

    def __init__(self, in_chans: int, dim: int, norm: bool = True, stride: int = 2, kernel: int | None = None) -> None:
        super().__init__()
        kernel = kernel or 2 * stride - 1
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride, kernel - stride, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(B, in_chans, H, W)`` to ``(B, dim, ceil(H / stride), ceil(W / stride))``."""
        return normalise(self.conv(x), self.norm)


@register_notrace_module  # runs on a kernel
class WhitenedStem(Stem):
    """Stem behind a frozen whitening of 2x2 patches: ON and OFF cells, ``max(w x + b, 0)`` and ``max(b' - w x, 0)``.

    :class:`lightning_msnn.callbacks.Whitening` sets the ``4 in_chans`` filters ``w`` by images of the training. Before,
    they are Haar's: for each channel the sum of a patch and three differences, halved. Only the biases learn. The
    stem is analogue, so its products are multiply-accumulates. The convolution behind the whitening has a kernel as
    large as its stride. Arguments are those of :class:`Stem`. Source: K. Jordan, arXiv 2404.00498.
    """

    def __init__(self, in_chans: int, dim: int, norm: bool = True, stride: int = 2) -> None:
        super().__init__(8 * in_chans, dim, norm, stride, kernel=stride)
        self.whitening = nn.Conv2d(in_chans, 8 * in_chans, 2)
        self.whitening.weight.requires_grad_(False).copy_(self._haar())

    @property
    def is_whitened(self) -> bool:
        """Whether the filters are those of images."""
        return not torch.equal(self.whitening.weight, self._haar().to(self.whitening.weight))

    def _haar(self) -> Tensor:
        channels, pair = self.whitening.in_channels, torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        filters = torch.kron(torch.eye(channels), torch.kron(pair, pair) / 2)
        return torch.cat([filters, -filters]).view(8 * channels, channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(B, in_chans, H, W)`` to ``(B, dim, ceil(H / stride), ceil(W / stride))``."""
        x = F.pad(x, [0, int(x.shape[3] == 1), 0, int(x.shape[2] == 1)])  # a patch has two rows and columns
        height, width = (1 + -side % self.conv.stride[0] for side in x.shape[2:])
        return super().forward(F.pad(F.relu(self.whitening(x)), [0, width, 0, height]))


STEMS = {"convolution": Stem, "whitened": WhitenedStem}
"""Stems by the name that configurations use."""


@register_notrace_module  # runs on a kernel
class PatchMerging(nn.Module):
    """Analogue 2x2 convolution of stride 2 with batch norm: four patches of the residual stream become one.

    Args:
        in_dim: Channels before.
        out_dim: Channels after.
        norm: Whether batch norm follows; without it this is the linear patch merging of the paper, with a bias.
    """

    def __init__(self, in_dim: int, out_dim: int, norm: bool = True) -> None:
        super().__init__()
        self.conv = PatchConv2d(in_dim, out_dim, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm2d(out_dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_dim, H, W)`` to ``(B, out_dim, ceil(H / 2), ceil(W / 2))``; an odd side is padded with zeros."""
        of_one_row = x.shape[2] == 1 and x.shape[3] > 1
        x = F.pad(x, [0, x.shape[3] % 2, 0, 0 if of_one_row else x.shape[2] % 2])
        return normalise(self.conv(x), self.norm)


@register_notrace_module  # runs on a kernel
class Encoder(nn.Module):
    """Spikes that leave the residual stream: batch norm, then threshold. At inference a threshold for each channel.

    Args:
        dim: Channels.
        norm: Whether batch norm comes before the threshold.
        neuron: Decay, threshold and surrogate of the neurons.
    """

    def __init__(self, dim: int, norm: bool = True, neuron: Neuron = Neuron()) -> None:  # noqa: B008  # frozen
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.spike = Spike(neuron, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, dim, H, W)`` to spikes of that shape."""
        return fire(x, self.norm, self.spike)[0]


class BernoulliEncoder(nn.Module):
    """Rate coding in one step: a spike with the probability that the residual stream gives, cut to [0, 1].

    Random in evaluation too. The backward pass takes the derivative of the expected spike: 1 inside [0, 1], 0 outside.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, dim, H, W)`` to spikes of that shape."""
        probability = x.clamp(0.0, 1.0)
        spikes = torch.bernoulli(probability.detach())
        # Exactly the spikes, since the difference is exactly 0.
        return spikes + (probability - probability.detach())


@register_notrace_module  # runs on a kernel
class MLP(nn.Module):
    """Spiking channel mixer: linear layer, spikes, linear layer, each with batch norm.

    Args:
        dim: Channels of input and output.
        hidden: Channels in between.
        norm: Whether batch norm follows each linear layer.
        neuron: Decay, threshold and surrogate of the neurons.
    """

    byte_spikes = ("spike",)

    def __init__(self, dim: int, hidden: int, norm: bool = True, neuron: Neuron = Neuron()) -> None:  # noqa: B008
        super().__init__()
        self.fc1 = Synapse(dim, hidden, 1, norm)
        self.spike = Spike(neuron, hidden)
        self.fc2 = Synapse(hidden, dim, 1, norm)

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, dim, H, W)`` to a current of that shape, to which the residual stream is added."""
        hidden = fire(self.fc1.conv(spikes), self.fc1.norm, self.spike)[0]
        current: Tensor = self.fc2(hidden, residual)
        return current


@register_notrace_module  # runs on a kernel
class AnalogueMLP(nn.Module):
    """Channel mixer of the published networks, on the analogue stream: a :class:`MLP` with GELU, not neurons."""

    def __init__(self, dim: int, hidden: int, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = Synapse(dim, hidden, 1, norm)
        self.act = nn.GELU()
        self.fc2 = Synapse(hidden, dim, 1, norm)
        self.fc1.spike_weights = self.fc2.spike_weights = ()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map the stream ``(B, dim, H, W)`` to a branch of that shape, to which the residual stream is added."""
        current: Tensor = self.fc2(self.act(self.fc1(x)), residual)
        return current


class Block(nn.Module):
    """Residual block on an analogue stream: ``x = x + mixer(spikes(x)); x = x + mlp(spikes(x))``.

    Args:
        encoder1: Spikes for the mixer.
        mixer: Token mixer, spikes to current.
        encoder2: Spikes for the MLP, or None for an MLP on the analogue stream.
        mlp: Channel mixer.
        drop_path: Probability with which a sample skips a branch in training (stochastic depth).
    """

    def __init__(
        self, encoder1: nn.Module, mixer: nn.Module, encoder2: nn.Module | None, mlp: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder1 = encoder1
        self.mixer = mixer
        self.encoder2: nn.Module | None = encoder2
        self.mlp = mlp
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @property
    def last_synapses(self) -> tuple[Synapse, ...]:
        """The synapses that end the two branches."""
        return self.mixer.project, self.mlp.fc2  # type: ignore[return-value]

    def _join(self, branch: Callable[..., Any], x: Tensor) -> Any:
        """Return what a branch returns, with the stream added to it."""
        if isinstance(self.drop_path, nn.Identity):
            return branch(residual=x)
        returned = branch()
        if isinstance(returned, tuple):
            return x + self.drop_path(returned[0]), *returned[1:]
        return x + self.drop_path(returned)

    def _mix_channels(self, x: Tensor) -> Tensor:
        entering = x if self.encoder2 is None else self.encoder2(x)
        after: Tensor = self._join(partial(self.mlp, entering), x)
        return after

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` to that of the next block."""
        x = self._join(partial(self.mixer, self.encoder1(x)), x)
        return self._mix_channels(x)
