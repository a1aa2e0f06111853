"""Batch norm folded away for inference: into the synapse before it, or into the thresholds after it."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.blocks import Encoder, PatchMerging, Stem
from lightning_msnn.nn.mixers import Synapse

__all__ = ["ThresholdEncoder", "fold_batch_norm"]

M = TypeVar("M", bound=nn.Module)


class ThresholdEncoder(nn.Module):
    """Spikes that leave the residual stream, by one comparison with a threshold for each channel.

    A batch norm before a threshold fires where ``scale x + shift >= V``: where ``x`` reaches ``(V - shift) / scale``
    or, for a negative scale, where it does not exceed it.

    Args:
        encoder: Encoder with batch norm, in evaluation mode, of one time step.
    """

    level: Tensor
    inverted: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        norm = encoder.norm
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        fixed = torch.full_like(norm.running_mean, encoder.spike.threshold)
        threshold = (fixed if encoder.spike.level is None else encoder.spike.level.detach().expand_as(fixed)).double()
        scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.detach().double() - norm.running_mean.double() * scale
        level = ((threshold - shift) / scale).to(fixed.dtype)
        # A channel of scale 0 always fires or never does.
        always = torch.where(shift >= threshold, -torch.inf, torch.inf).to(fixed.dtype)
        level = torch.where(scale == 0, always, level)
        # "x <= level" is "not x >= the next number after level".
        after = torch.nextafter(level, torch.full_like(level, torch.inf))
        self.register_buffer("level", torch.where(scale < 0, after, level).view(-1, 1, 1))
        self.register_buffer("inverted", (scale < 0).view(-1, 1, 1))
        # What counts spikes knows a layer of neurons by its threshold.
        self.threshold = encoder.spike.threshold

    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` to spikes of that shape; ``state`` is not touched."""
        return torch.logical_xor(x >= self.level, self.inverted).to(x.dtype)


def fold_batch_norm(model: M) -> M:
    """Return a copy of a network for inference, with its batch norms folded where they can be.

    Those after convolutions go into their weights, those of the encoders into thresholds by channel. What remains is
    batch norm after attention or a recurrent cell, before the read-out, and in the encoders of networks of several time
    steps, whose membranes are needed.

    Args:
        model: Network in evaluation mode.

    Returns:
        The copy; outputs agree but for rounding.

    Raises:
        ConfigurationError: If the network is in training mode.
    """
    if model.training:
        raise ConfigurationError("batch norm can only be folded in evaluation mode: call eval() first")
    folded = copy.deepcopy(model)
    for parent in list(folded.modules()):
        if isinstance(parent, Synapse | Stem | PatchMerging) and isinstance(parent.norm, nn.BatchNorm2d):
            parent.conv = fuse_conv_bn_eval(parent.conv, parent.norm)
            parent.norm = nn.Identity()
        for name, child in parent.named_children():
            one_step = getattr(model, "time_steps", 1) == 1
            if isinstance(child, Encoder) and isinstance(child.norm, nn.BatchNorm2d) and one_step:
                setattr(parent, name, ThresholdEncoder(child))
    return folded.requires_grad_(False)
