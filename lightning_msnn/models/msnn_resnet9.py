"""Residual CNN of our own: branches of two 3x3 convolutions of spikes, three stages, no channel mixer.

The neurons, their windows and the projection are those of Yao, Wu, Chen, Zhang, *Training a General Spiking Neural
Network with Improved Efficiency and Minimum Latency*, ACML 2023, arXiv 2401.10843. The order of a branch (norm,
neurons, convolution) is that of He et al., *Identity Mappings in Deep Residual Networks*, arXiv 1603.05027.
Licence: Apache-2.0.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.layer import fire
from lightning_msnn.nn.mixer import Mixer
from lightning_msnn.nn.neuron import Membrane, Neuron, Spike
from lightning_msnn.nn.synapse import Synapse

__all__ = ["ConvBlock", "MSNNResNet9"]  # the registry adds the entry points


@register_notrace_module  # the number of windows depends on the size of the map
class ConvBlock(Mixer):
    """Residual block: norm, neurons, 3x3 synapse, norm, neurons, 3x3 synapse, added to the analogue stream.

    Both layers of neurons visit the windows of the map. Layer 1's current is the normalised stream, layer 2 is coupled
    with layer 1 by the projection Omega.

    Args:
        dim: Channels of the stream.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: what the convolutions see beyond the border of a window.
        norm: Whether batch norm comes before each layer of neurons.
        neuron: Decay, threshold and surrogate of the neurons.
        drop_path: Probability with which a sample skips the branch in training (stochastic depth).

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
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(windows, context)
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.membrane1 = Membrane("first", neuron, dim, windows)
        self.spike1 = Spike(neuron, dim)
        self.synapse1 = Synapse(dim, dim, 3, norm)
        self.membrane2 = Membrane("coupled", neuron, dim, windows)
        self.spike2 = Spike(neuron, dim)
        self.synapse2 = Synapse(dim, dim, 3, norm)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @property
    def last_synapses(self) -> tuple[Synapse, ...]:
        """The synapse that ends the branch."""
        return (self.synapse2,)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` to that of the next block."""
        size = (x.shape[2], x.shape[3])
        first = self.cut._replace(windows_in=False, handed=x.shape[1])
        s1, u1, _ = fire(x, self.norm, self.spike1, self.membrane1, cut=first, size=size)
        current = self.synapse1.conv(s1)
        s2, _, _ = fire(current, self.synapse1.norm, self.spike2, self.membrane2, u1, cut=self.cut, size=size)
        if isinstance(self.drop_path, nn.Identity):
            return self.leave(self.synapse2, s2, size, x)
        after: Tensor = x + self.drop_path(self.leave(self.synapse2, s2, size, None))
        return after


class MSNNResNet9(MSNN):
    """Spiking residual CNN of three stages; each block has one branch of two 3x3 convolutions.

    Arguments are those of :class:`lightning_msnn.models.MSNN`, without those of its channel mixers and of the coding.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 4, 3),
        widths: Sequence[int] = (64, 128, 256),
        stem_stride: int = 2,
        stem: str = "whitened",
        windows: str = "alternate",
        context: str = "shared",
        projection: str = "sine",
        theta: float | Sequence[float] = 0.25,
        learn_theta: bool = False,
        tau: float = 0.1,
        learn_tau: bool | str = True,
        threshold: float = 0.6,
        learn_threshold: bool | str = False,
        levels: int = 1,
        surrogate: str = "triangular",
        norm: bool = True,
        spiking: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            in_chans, num_classes, global_pool, depths, widths, stem_stride, stem,
            windows=windows, context=context, projection=projection, theta=theta, learn_theta=learn_theta, tau=tau,
            learn_tau=learn_tau, threshold=threshold, learn_threshold=learn_threshold, levels=levels,
            surrogate=surrogate, norm=norm, spiking=spiking, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        )  # fmt: skip

    def make_block(
        self, dim: int, neuron: Neuron, windows: str, drop_path: float, *, context: str, norm: bool, **_: Any
    ) -> nn.Module:
        """Return a block of the stream's ``dim`` channels."""
        return ConvBlock(dim, windows, context, norm, neuron, drop_path)


default_cfgs = generate_default_cfgs(
    zoo_cfgs("msnn_resnet9", "msnn_resnet9_tiny", arguments={"depths": (2, 4, 3), "stem": "whitened"})
)


@register_model
def msnn_resnet9(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nine blocks, widths 64 to 256: 5 M parameters, 0.18 G operations at 32x32."""
    return create(MSNNResNet9, "msnn_resnet9", pretrained, {"depths": (2, 4, 3), "widths": (64, 128, 256)}, **kwargs)


@register_model
def msnn_resnet9_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nine blocks, widths 16 to 48: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNResNet9, "msnn_resnet9_tiny", pretrained, {"depths": (2, 4, 3), "widths": (16, 32, 48)}, **kwargs)
