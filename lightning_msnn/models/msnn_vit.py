"""Vision transformer family: the token mixer is spiking self-attention inside each window, without softmax.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from lightning_msnn.models.msnn import MSNN, Stage
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.blocks import Position
from lightning_msnn.nn.mixers import AttentionMixer

__all__ = ["MSNNViT"]  # the registry adds the entry points


class MSNNViT(MSNN):
    """Spiking vision transformer; each stage begins with a depthwise convolution that tells tokens their positions.

    Args:
        **kwargs: Arguments of :class:`lightning_msnn.models.msnn.MSNN` but for ``mixer``; widths are multiples of
            24, the channels of a head.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(AttentionMixer, **kwargs)

    def make_stage(
        self,
        before: int | None,
        width: int,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        encoder: Callable[[int], nn.Module],
        norm: bool,
    ) -> nn.Module:
        """Make a stage that begins with positions."""
        return Stage(downsample, blocks, Position(encoder(width), width, norm))


default_cfgs = generate_default_cfgs(zoo_cfgs("msnn_vit12", "msnn_vit12_tiny"))


@register_model
def msnn_vit12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 48 to 384, 2 to 16 heads of 24 channels."""
    return create(MSNNViT, "msnn_vit12", pretrained, **kwargs)


@register_model
def msnn_vit12_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 24 and 48: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNViT, "msnn_vit12_tiny", pretrained, {"widths": (24, 24, 48, 48)}, **kwargs)
