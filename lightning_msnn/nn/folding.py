"""Batch norm folded away for inference: into the synapse before it, or into the thresholds after it."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import native
from lightning_msnn.kernels.geometry import Layer
from lightning_msnn.kernels.layer import kernels_of, neurons
from lightning_msnn.nn.blocks import Encoder, PatchMerging, Stem
from lightning_msnn.nn.neuron import FixedDecay, LearntDecay, Spike, refuse_gradient
from lightning_msnn.nn.projection import LearntProjection, Projection
from lightning_msnn.nn.synapse import Synapse

__all__ = ["ThresholdEncoder", "fold_batch_norm"]

M = TypeVar("M", bound=nn.Module)


class ThresholdEncoder(nn.Module):
    """Spikes that leave the residual stream, by one comparison with a threshold for each channel.

    A batch norm before a threshold fires where ``scale x + shift >= V``: where ``x`` reaches ``(V - shift) / scale``
    or, for a negative scale, where it does not exceed it.

    Args:
        encoder: Encoder with batch norm, in evaluation mode.
    """

    bytes = False
    """Whether spikes are stored as bytes, uint8."""

    level: Tensor
    sign: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        norm: Any = encoder.norm
        fixed = torch.full_like(norm.running_mean, encoder.spike.threshold)
        threshold = (fixed if encoder.spike.level is None else encoder.spike.level.detach().expand_as(fixed)).double()
        scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.detach().double() - norm.running_mean.double() * scale
        level = ((threshold - shift) / scale).to(fixed.dtype)
        # A channel of scale 0 always fires or never does.
        always = torch.where(shift >= threshold, -torch.inf, torch.inf).to(fixed.dtype)
        level = torch.where(scale == 0, always, level)
        # "x <= level" is "-x >= -level".
        sign = torch.where(scale < 0, -1.0, 1.0).to(fixed.dtype)
        self.register_buffer("level", level * sign)
        self.register_buffer("sign", sign)
        self.mixed = bool((scale < 0).any())
        # Counters of spikes know neurons by this attribute.
        self.threshold = encoder.spike.threshold

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mixed = self.sign.is_meta or bool((self.sign < 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` to spikes of that shape.

        Raises:
            ConfigurationError: If a gradient to the stream is wanted: a comparison has none.
        """
        refuse_gradient(x)
        if self.mixed:
            x = x * self.sign.to(x.dtype).view(-1, 1, 1)
        if kernels_of(x) is native:
            layer = Layer(fires=True, bytes=self.bytes)
            return neurons(x, layer, (x.shape[2], x.shape[3]), level=self.level)[0]
        return (x >= self.level.to(x.dtype).view(-1, 1, 1)).to(torch.uint8 if self.bytes else x.dtype)


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a module is a batch norm whose inference is a scale and a shift."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None


def _becomes_threshold(encoder: Encoder) -> bool:
    return _has_statistics(encoder.norm) and isinstance(encoder.spike, Spike) and encoder.spike.levels == 1


def _fixed(module: nn.Module) -> nn.Module | None:
    """Return a fixed decay or projection in the place of a learnt one; None for other modules."""
    fixed: FixedDecay | Projection | None = None
    if type(module) is LearntDecay:
        fixed = FixedDecay(0.0)
        fixed.tau = module().detach()
    elif type(module) is LearntProjection:
        fixed = Projection(module.name)
        fixed.theta = module.radian().detach()
    return None if fixed is None else fixed.eval()


def fold_batch_norm(model: M) -> M:
    """Return a copy of a network for inference, with its batch norms folded where they can be.

    Batch norms after convolutions go into their weights, those of encoders into thresholds by channel. Batch norm after
    attention or a recurrent cell, before graded spikes of the stream, and before the read-out stays. Learnt decays and
    radian factors become fixed ones.

    Args:
        model: Network in evaluation mode.

    Returns:
        The copy, which refuses a gradient to its input. Outputs differ by rounding: it flips a few spikes near the
        threshold, which changes the logits of 2 to 3 % of images and almost never the class.

    Raises:
        ConfigurationError: If the network is in training mode.
    """
    if model.training:
        raise ConfigurationError("batch norm can only be folded in evaluation mode: call eval() first")

    folded = copy.deepcopy(model)
    for parent in list(folded.modules()):
        if isinstance(parent, Synapse | Stem | PatchMerging) and _has_statistics(parent.norm):
            parent.conv = fuse_conv_bn_eval(parent.conv, parent.norm)  # type: ignore[arg-type]
            parent.norm = nn.Identity()
        for name, child in parent.named_children():
            if isinstance(child, Encoder) and _becomes_threshold(child):
                setattr(parent, name, ThresholdEncoder(child))
            elif (fixed := _fixed(child)) is not None:
                setattr(parent, name, fixed)
            elif callable(getattr(child, "for_inference", None)):
                setattr(parent, name, child.for_inference())  # type: ignore[operator]
    return folded.requires_grad_(False)
