"""Vision transformer family: the token mixer is spiking self-attention inside each window, without softmax.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.msnn import MSNN, Stage
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.layer import cut_windows, fire
from lightning_msnn.nn.mixer import Mixer
from lightning_msnn.nn.neuron import Membrane, Neuron, Spike
from lightning_msnn.nn.synapse import Synapse

__all__ = ["AttentionMixer", "AttentionStage", "MSNNViT", "Position"]  # the registry adds the entry points


@register_notrace_module  # the number of windows depends on the size of the map
class AttentionMixer(Mixer):
    """Mix the tokens of each window by spiking self-attention without softmax (arXiv 2401.10843).

    Queries, keys and values are spikes of layer 1; ``(Q K^T) V * scale`` is the current of layer 2, whose membrane
    starts from the projection of the value membrane and its own in the window before. A token only attends to tokens
    of its own window, whatever the context: with shared context the linear synapses run once over the map, and
    membranes rather than spikes are merged.

    Args:
        dim: Channels of input and output, a multiple of ``head_dim``.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``.
        norm: Whether batch norm follows each synapse and the attention.
        head_dim: Channels of a head.
        neuron: Decay, threshold and surrogate of the neurons.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    byte_spikes = ("spike2",)

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        norm: bool = True,
        head_dim: int = 24,
        neuron: Neuron = Neuron(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(windows, context)
        if dim % head_dim:
            raise ConfigurationError(f"widths must be multiples of {head_dim}, the channels of a head, not {dim}")
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv = Synapse(dim, 3 * dim, 1, norm)
        self.membrane1 = Membrane("first", neuron, 3 * dim, windows)
        self.spike1 = Spike(neuron, 3 * dim)
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.membrane2 = Membrane("coupled", neuron, dim, windows)
        self.spike2 = Spike(neuron, dim)
        self.project = Synapse(dim, dim, 1, norm)

    def attend(self, spikes: Tensor) -> Tensor:
        """Return ``(Q K^T) V * scale`` of every head, ``(B, C, h, w)``, of spikes Q, K and V ``(B, 3 C, h, w)``."""
        batch, channels, height, width = spikes.shape
        tokens = height * width
        # Channels are the last axis here, as they are in memory: (3, B, heads, tokens, head_dim).
        tokenwise = spikes.permute(0, 2, 3, 1).reshape(batch, tokens, 3, channels // (3 * self.head_dim), self.head_dim)
        q, k, v = tokenwise.permute(2, 0, 3, 1, 4).unbind(0)
        # Without softmax the product is associative; the number of tokens decides which order is cheaper.
        if tokens > self.head_dim:
            current = q @ (k.transpose(2, 3) @ v * self.scale)
        else:
            current = (q @ k.transpose(2, 3)) @ v * self.scale
        attended: Tensor = current.transpose(1, 2).reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)
        return attended

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, and add the residual stream."""
        size, dim = (spikes.shape[2], spikes.shape[3]), spikes.shape[1]
        current, first = self.qkv.conv(self.enter(spikes)), self.cut._replace(handed=dim)
        s1, values, _ = fire(current, self.qkv.norm, self.spike1, self.membrane1, cut=first, size=size)
        seen = s1 if self.isolated else cut_windows(s1, self.windows)
        attended = self.attend(seen)
        if not torch._C._are_functorch_transforms_active():
            # Compilers expect batch norm to return a gradient in the memory order of its input, whatever it is given.
            attended = attended.contiguous(memory_format=torch.channels_last)
        s2, _, _ = fire(attended, self.norm, self.spike2, self.membrane2, values, cut=self.cut_batch, size=size)
        return self.leave(self.project, s2, size, residual)


@register_notrace_module  # runs on a kernel
class Position(nn.Module):
    """Tells tokens their positions: a depthwise 3x3 convolution on spikes, added to the stream.

    The border, padded with zeros, gives the position away (Chu et al., arXiv 2102.10882).

    Args:
        encoder: Spikes of the stream.
        dim: Channels.
        norm: Whether batch norm follows the convolution.
    """

    byte_spikes = ("encoder",)

    def __init__(self, encoder: nn.Module, dim: int, norm: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.synapse = Synapse(dim, dim, 3, norm, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, dim, H, W)`` to one of that shape."""
        after: Tensor = self.synapse(self.encoder(x), x)
        return after


class AttentionStage(Stage):
    """Blocks at one resolution, after the depthwise convolution of :class:`Position`."""

    def __init__(
        self, before: int | None, width: int, blocks: list[nn.Module], encoder: Callable[[int], nn.Module], norm: bool
    ) -> None:
        super().__init__(before, width, blocks, encoder, norm)
        self.position = Position(encoder(width), width, norm)


class MSNNViT(MSNN):
    """Spiking vision transformer; each stage begins with a depthwise convolution that tells tokens their positions.

    It takes the arguments of :class:`lightning_msnn.models.MSNN`; widths are multiples of 24, the channels of a head.
    """

    mixer = AttentionMixer
    stage = AttentionStage


default_cfgs = generate_default_cfgs(zoo_cfgs("msnn_vit12", "msnn_vit12_tiny"))


@register_model
def msnn_vit12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 48 to 384, 2 to 16 heads of 24 channels."""
    return create(MSNNViT, "msnn_vit12", pretrained, **kwargs)


@register_model
def msnn_vit12_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 24 and 48: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNViT, "msnn_vit12_tiny", pretrained, {"widths": (24, 24, 48, 48)}, **kwargs)
