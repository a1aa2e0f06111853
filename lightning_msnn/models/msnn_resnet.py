"""Residual CNN family: the token mixer is two 3x3 convolutions with spiking neurons.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.layer import fire
from lightning_msnn.nn.mixer import Mixer
from lightning_msnn.nn.neuron import Membrane, Neuron, Spike
from lightning_msnn.nn.synapse import Synapse

__all__ = ["ConvMixer", "MSNNResNet"]  # the registry adds the entry points


@register_notrace_module  # the number of windows depends on the size of the map
class ConvMixer(Mixer):
    """Mix the tokens of each window by two 3x3 convolutions with spiking neurons (arXiv 2401.10843).

    Args:
        dim: Channels of input and output.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: what the convolutions see beyond the border of a window.
        norm: Whether batch norm follows each synapse.
        neuron: Decay, threshold and surrogate of the neurons.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    byte_spikes = ("spike1", "spike2")

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        norm: bool = True,
        neuron: Neuron = Neuron(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(windows, context)
        self.synapse1 = Synapse(dim, dim, 3, norm)
        self.membrane1 = Membrane("first", neuron, dim, windows)
        self.spike1 = Spike(neuron, dim)
        self.synapse2 = Synapse(dim, dim, 3, norm)
        self.membrane2 = Membrane("coupled", neuron, dim, windows)
        self.spike2 = Spike(neuron, dim)
        self.project = Synapse(dim, dim, 1, norm)

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, and add the residual stream."""
        size = (spikes.shape[2], spikes.shape[3])
        current, first = self.synapse1.conv(self.enter(spikes)), self.cut._replace(handed=spikes.shape[1])
        s1, u1, _ = fire(current, self.synapse1.norm, self.spike1, self.membrane1, cut=first, size=size)
        current = self.synapse2.conv(s1)
        s2, _, _ = fire(current, self.synapse2.norm, self.spike2, self.membrane2, u1, cut=self.cut, size=size)
        return self.leave(self.project, s2, size, residual)


class MSNNResNet(MSNN):
    """Spiking residual CNN; it takes the arguments of :class:`lightning_msnn.models.MSNN`."""

    mixer = ConvMixer


default_cfgs = generate_default_cfgs(
    zoo_cfgs("msnn_resnet12", "msnn_resnet12_tiny")
    | zoo_cfgs(
        "msnn_resnet20_224", input_size=(3, 224, 224), arguments={"stem_stride": 4}, crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
    )
)  # fmt: skip


@register_model
def msnn_resnet12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 48 to 384: 13.9 M parameters, 0.18 G operations at 32x32."""
    return create(MSNNResNet, "msnn_resnet12", pretrained, **kwargs)


@register_model
def msnn_resnet12_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 16 to 32: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNResNet, "msnn_resnet12_tiny", pretrained, {"widths": (16, 24, 32, 32)}, **kwargs)


@register_model
def msnn_resnet20_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twenty blocks, widths 48 to 384, a stem of stride 4: 3.5 G operations at 224x224."""
    return create(MSNNResNet, "msnn_resnet20_224", pretrained, {"depths": (2, 4, 12, 2), "stem_stride": 4}, **kwargs)
