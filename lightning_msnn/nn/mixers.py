"""Token mixers: two layers of spiking neurons that visit the windows of a map and merge what they saw."""

from typing import Final

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, suggestion
from lightning_msnn.functional.windows import WINDOWS, merge, split
from lightning_msnn.nn.neuron import CoupledMembrane, Membrane, Spike, make_decay
from lightning_msnn.nn.projection import make_projection

__all__ = ["CONTEXTS", "ConvMixer", "Synapse"]

CONTEXTS: tuple[str, ...] = ("shared", "isolated")
"""What a synapse sees beyond the border of a window: the rest of the map, or zeros."""


class Synapse(nn.Module):
    """A convolution that turns spikes into a synaptic current, and its batch norm, which folds into it at inference.

    Args:
        in_channels: Channels of the spikes.
        out_channels: Channels of the current.
        kernel_size: Side of the kernel in pixels, odd; the border is padded with zeros to keep the size.
        norm: Whether batch norm follows; without it the convolution has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, spikes: Tensor) -> Tensor:
        """Map spikes ``(B, in_channels, H, W)`` to a current ``(B, out_channels, H, W)``."""
        current: Tensor = self.norm(self.conv(spikes))
        return current


@register_notrace_module  # the number of windows depends on the size of the map
class ConvMixer(nn.Module):
    """Mix the tokens of each window by two 3x3 convolutions with spiking neurons (arXiv 2401.10843).

    With *shared* context the synapses run once over the whole map; their currents are cut into windows, the membranes
    are merged (mean where windows overlap), and the merged membrane fires. With *isolated* context, the published form,
    a synapse sees zeros beyond the border of a window, all windows pass it as one batch, and the windows' outputs are
    merged; the output projection comes before the mean over overlaps, so that its input is still spikes.

    Args:
        dim: Channels of input and output.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``.
        projection: Name of the projection Omega.
        theta: Radian factor of the projection in units of pi; the initial one if it is learnt.
        learn_theta: Whether the mixer learns its theta.
        tau: Decay of the membranes from window to window; the initial one if it is learnt.
        learn_tau: Whether each channel learns its own decay.
        threshold: Threshold ``V`` of the neurons.
        surrogate: Name of the surrogate gradient.
        norm: Whether batch norm follows each synapse.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    isolated: Final[bool]
    windows: Final[str]

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        projection: str = "sine",
        theta: float = 0.25,
        learn_theta: bool = False,
        tau: float = 0.1,
        learn_tau: bool = True,
        threshold: float = 0.5,
        surrogate: str = "triangular",
        norm: bool = True,
    ) -> None:
        super().__init__()
        if windows not in WINDOWS:
            raise ConfigurationError(
                f"unknown kind of windows {windows!r}: allowed are {', '.join(WINDOWS)}{suggestion(windows, WINDOWS)}"
            )
        if context not in CONTEXTS:
            raise ConfigurationError(
                f"unknown context {context!r}: allowed are {', '.join(CONTEXTS)}{suggestion(context, CONTEXTS)}"
            )
        self.windows = windows
        self.isolated = context == "isolated"
        # Over a single window nothing is carried, so there is nothing to learn.
        learn_tau, learn_theta = (learn and windows != "single" for learn in (learn_tau, learn_theta))
        self.synapse1 = Synapse(dim, dim, 3, norm)
        self.membrane1 = Membrane(make_decay(dim, tau, learn_tau))
        self.spike1 = Spike(threshold, surrogate)
        self.synapse2 = Synapse(dim, dim, 3, norm)
        self.membrane2 = CoupledMembrane(
            make_decay(dim, tau, learn_tau), make_projection(projection, theta, learn_theta)
        )
        self.spike2 = Spike(threshold, surrogate)
        self.project = Synapse(dim, dim, 1, norm)

    def membranes(self, spikes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the membranes of both layers after each window.

        Args:
            spikes: Input spikes ``(B, C, H, W)``.

        Returns:
            Membranes of layer 1 and of layer 2, each a list over the windows of ``(B, C, h, w)``.
        """
        height, width = spikes.shape[2], spikes.shape[3]
        if self.isolated:
            seen = split(spikes, self.windows)
            n = len(seen)
            u1 = self.membrane1(list(self.synapse1(torch.cat(seen)).chunk(n)))
            u2 = self.membrane2(list(self.synapse2(self.spike1(torch.cat(u1))).chunk(n)), u1)
        else:
            u1 = self.membrane1(split(self.synapse1(spikes), self.windows))
            s1 = self.spike1(merge(u1, self.windows, height, width))
            u2 = self.membrane2(split(self.synapse2(s1), self.windows), u1)
        return u1, u2

    def forward(self, spikes: Tensor) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current ``(B, C, H, W)`` for the residual stream."""
        height, width = spikes.shape[2], spikes.shape[3]
        u2 = self.membranes(spikes)[1]
        if self.isolated:
            return merge(list(self.project(self.spike2(torch.cat(u2))).chunk(len(u2))), self.windows, height, width)
        current: Tensor = self.project(self.spike2(merge(u2, self.windows, height, width)))
        return current

    def extra_repr(self) -> str:
        """Show windows and context."""
        return f"windows={self.windows!r}, context={'isolated' if self.isolated else 'shared'!r}"
