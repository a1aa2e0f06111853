"""Residual CNN family: the token mixer is two 3x3 convolutions with spiking neurons.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.mixers import ConvMixer

__all__ = ["MSNNResNet"]  # the registry adds the entry points


class MSNNResNet(MSNN):
    """Spiking residual CNN.

    Args:
        **kwargs: Arguments of :class:`lightning_msnn.models.msnn.MSNN` but for ``mixer``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ConvMixer, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("msnn_resnet12", "msnn_resnet12_tiny"))


@register_model
def msnn_resnet12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 48 to 384: 13.9 M parameters, 0.18 G operations at 32x32."""
    return create(MSNNResNet, "msnn_resnet12", pretrained, **kwargs)


@register_model
def msnn_resnet12_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 16 to 32: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNResNet, "msnn_resnet12_tiny", pretrained, {"widths": (16, 24, 32, 32)}, **kwargs)
