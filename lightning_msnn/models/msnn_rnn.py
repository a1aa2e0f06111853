"""Recurrent family: the token mixer is a bidirectional recurrent cell over the tokens of each window.

Beside the residual stream a membrane map travels from block to block; it is passed and returned, never kept.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.blocks import PatchMerging, RecurrentBlock
from lightning_msnn.nn.mixers import RecurrentMixer

__all__ = ["MSNNRNN", "RecurrentStage"]  # the registry adds the entry points


class RecurrentStage(nn.Module):
    """Blocks at one resolution, after the patch merging of the stream and of the membrane map.

    Args:
        downsample: Patch merging of the stream, or identity in the first stage.
        membrane: Patch merging of the membrane map, identity in the first stage, or None where no block takes the map.
        blocks: Residual blocks.
    """

    def __init__(self, downsample: nn.Module, membrane: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.travels = membrane is not None
        self.membrane: nn.Module = nn.Identity() if membrane is None else membrane
        self.blocks = nn.ModuleList(blocks)
        self.feature = nn.Identity()  # names the stream for feature extraction, since a stage returns two tensors

    def forward(self, x: Tensor, membrane: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Map stream and membrane map of the stage before to those of this stage.

        Args:
            x: Residual stream ``(B, C, H, W)``.
            membrane: Membrane map ``(B, 2 C, H, W)``.
            state: What the layers of neurons carried out of the time step before, if there is one.
        """
        x = self.downsample(x)
        membrane = self.membrane(membrane) if self.travels else torch.zeros_like(x).repeat(1, 2, 1, 1)
        for block in self.blocks:
            if self.grad_checkpointing and state is None:
                x, membrane = checkpoint(block, x, membrane, use_reentrant=False)
            else:
                x, membrane = block(x, membrane, state)
        return self.feature(x), membrane


class MSNNRNN(MSNN):
    """Spiking recurrent network.

    Args:
        cell: Recurrent cell, one of :data:`lightning_msnn.nn.CELLS`.
        **kwargs: Arguments of :class:`lightning_msnn.models.msnn.MSNN` but for ``mixer``.
    """

    block = RecurrentBlock
    feature_module = "stages.{}.feature"

    def __init__(self, cell: str = "lstm", **kwargs: Any) -> None:
        super().__init__(partial(RecurrentMixer, cell=cell), **kwargs)

    def make_stage(
        self,
        before: int | None,
        width: int,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        encoder: Callable[[int], nn.Module],
        norm: bool,
    ) -> nn.Module:
        """Make a stage that merges the patches of the membrane map too."""
        membrane: nn.Module | None = PatchMerging(2 * before, 2 * width, norm) if before else nn.Identity()
        if all(
            module.windows == "single"
            for block in blocks
            for module in block.modules()
            if isinstance(module, RecurrentMixer)
        ):
            membrane = None  # no window takes anything from the map
        return RecurrentStage(downsample, membrane, blocks)

    def _pass(self, x: Tensor, state: list[Tensor] | None, last: int) -> list[Tensor]:
        outputs: list[Tensor] = []
        membrane = torch.zeros_like(x).repeat(1, 2, 1, 1)
        for i, stage in enumerate(self.stages):
            if i <= last:
                x, membrane = stage(x, membrane, state)
                outputs.append(x)
        return outputs


default_cfgs = generate_default_cfgs(zoo_cfgs("msnn_rnn12", "msnn_rnn12_tiny"))


@register_model
def msnn_rnn12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 48 to 384, a bidirectional LSTM each."""
    return create(MSNNRNN, "msnn_rnn12", pretrained, **kwargs)


@register_model
def msnn_rnn12_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twelve blocks, widths 16 to 32: under 0.3 M parameters, for tests and a first look."""
    return create(MSNNRNN, "msnn_rnn12_tiny", pretrained, {"widths": (16, 16, 24, 32)}, **kwargs)
