"""Token mixers: layers of spiking neurons that visit the windows of a map and merge what they saw.

With *shared* context a synapse that does not depend on the window runs once over the whole map. With *isolated*
context, the published form, a synapse sees zeros beyond the border of its window, all windows pass it as one batch, and
the windows' outputs are merged; the output projection comes before the mean over overlaps, so that its input is still
spikes.
"""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose, suggestion
from lightning_msnn.functional.windows import WINDOWS
from lightning_msnn.nn.layer import Cut, cut_windows, fire, join_windows
from lightning_msnn.nn.neuron import Neurons
from lightning_msnn.nn.synapse import Synapse

__all__ = [
    "CELLS",
    "CONTEXTS",
    "AttentionMixer",
    "ConvMixer",
    "Recurrence",
    "RecurrentMixer",
]

CONTEXTS: tuple[str, ...] = ("shared", "isolated")
"""What a synapse sees beyond the border of a window: the rest of the map, or zeros."""

CELLS: dict[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}
"""Recurrent cells by the name that configurations use, and how many gates each has."""


class Recurrence(nn.Module):
    """One bidirectional layer of a recurrent cell; parameters named, shaped and initialised as torch's ``nn.LSTM``.

    Not torch's own module, since ``torch.compile`` breaks the graph at it, whereas the function that it calls compiles.

    Args:
        input_size: Channels of a token.
        hidden_size: Channels of a direction's output.
        cell: Recurrent cell, one of :data:`CELLS`.

    Raises:
        ConfigurationError: If the cell is not known.
    """

    def __init__(self, input_size: int, hidden_size: int, cell: str = "lstm") -> None:
        super().__init__()
        rows = choose(CELLS, cell, "recurrent cell") * hidden_size
        self.cell = cell
        self.input_size = input_size
        self.hidden_size = hidden_size

        def draw(*shape: int) -> nn.Parameter:
            bound = hidden_size**-0.5
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weight_ih_l0 = draw(rows, input_size)
        self.weight_hh_l0 = draw(rows, hidden_size)
        self.bias_ih_l0 = draw(rows)
        self.bias_hh_l0 = draw(rows)
        self.weight_ih_l0_reverse = draw(rows, input_size)
        self.weight_hh_l0_reverse = draw(rows, hidden_size)
        self.bias_ih_l0_reverse = draw(rows)
        self.bias_hh_l0_reverse = draw(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, L, input_size)`` in both directions and return ``(B, L, 2 hidden_size)``."""
        weights: list[Tensor] = [
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            self.weight_ih_l0_reverse,
            self.weight_hh_l0_reverse,
            self.bias_ih_l0_reverse,
            self.bias_hh_l0_reverse,
        ]
        # Biases, one layer, no dropout, both directions, batch first.
        hidden = torch.zeros([2, tokens.shape[0], self.hidden_size], dtype=tokens.dtype, device=tokens.device)
        if self.cell == "lstm":
            return torch.lstm(tokens, [hidden, hidden], weights, True, 1, 0.0, self.training, True, True)[0]
        if self.cell == "gru":
            return torch.gru(tokens, hidden, weights, True, 1, 0.0, self.training, True, True)[0]
        return torch.rnn_tanh(tokens, hidden, weights, True, 1, 0.0, self.training, True, True)[0]

    def extra_repr(self) -> str:
        """Show cell and sizes."""
        return f"{self.cell!r}, {self.input_size}, {self.hidden_size}"


class _Mixer(nn.Module):
    """What all mixers share: windows, context, and the way from currents to spikes.

    Args:
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``.

    Raises:
        ConfigurationError: If one is not known.
    """

    def __init__(self, windows: str, context: str) -> None:
        super().__init__()
        for value, allowed, what in ((windows, WINDOWS, "kind of windows"), (context, CONTEXTS, "context")):
            if value not in allowed:
                raise ConfigurationError(
                    f"unknown {what} {value!r}: allowed are {', '.join(allowed)}{suggestion(value, allowed)}"
                )
        self.windows = windows
        self.isolated = context == "isolated"
        # Where windows lie: on the map throughout, batches throughout, or a batch that leads back to the map.
        self.cut = Cut(windows, self.isolated, self.isolated)
        self.cut_batch = Cut(windows, True, self.isolated)

    def enter(self, spikes: Tensor) -> Tensor:
        """Give the synapses the map ``(B, C, H, W)``, or its windows as one batch ``(windows B, C, h, w)``."""
        return cut_windows(spikes, self.windows) if self.isolated else spikes

    def leave(self, project: Synapse, spikes: Tensor, size: tuple[int, int], residual: Tensor | None) -> Tensor:
        """Project spikes onto the map ``(B, C, *size)``, before the mean over overlaps, and add the residual stream."""
        if not self.isolated:
            current: Tensor = project(spikes, residual)
            return current
        return join_windows(project(spikes), self.windows, size, residual)

    def extra_repr(self) -> str:
        """Show windows and context."""
        return f"windows={self.windows!r}, context={'isolated' if self.isolated else 'shared'!r}"


@register_notrace_module  # the number of windows depends on the size of the map
class ConvMixer(_Mixer):
    """Mix the tokens of each window by two 3x3 convolutions with spiking neurons (arXiv 2401.10843).

    Args:
        dim: Channels of input and output.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: what the convolutions see beyond the border of a window.
        norm: Whether batch norm follows each synapse.
        **neurons: Arguments of :class:`lightning_msnn.nn.neuron.Neurons`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        norm: bool = True,
        **neurons: Any,
    ) -> None:
        super().__init__(windows, context)
        neuron = Neurons(**neurons)
        self.synapse1 = Synapse(dim, dim, 3, norm)
        self.membrane1 = neuron.first(dim, windows)
        self.spike1 = neuron.spike(dim)
        self.synapse2 = Synapse(dim, dim, 3, norm)
        self.membrane2 = neuron.second(dim, windows)
        self.spike2 = neuron.spike(dim)
        self.project = Synapse(dim, dim, 1, norm)

    def forward(self, spikes: Tensor, state: list[Tensor] | None = None, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, to which the residual stream is added.

        Args:
            spikes: Input spikes.
            state: What the layers of neurons carried out of the time step before, if there is one.
            residual: Residual stream, if it is to be added.
        """
        size = (spikes.shape[2], spikes.shape[3])
        where: dict[str, Any] = {"cut": self.cut, "size": size, "state": state}
        current = self.synapse1.conv(self.enter(spikes))
        s1, u1, _ = fire(current, self.synapse1.norm, self.spike1, self.membrane1, handed=spikes.shape[1], **where)
        s2, _, _ = fire(self.synapse2.conv(s1), self.synapse2.norm, self.spike2, self.membrane2, u1, **where)
        return self.leave(self.project, s2, size, residual)


@register_notrace_module  # the number of windows depends on the size of the map
class AttentionMixer(_Mixer):
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
        **neurons: Arguments of :class:`lightning_msnn.nn.neuron.Neurons`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        norm: bool = True,
        head_dim: int = 24,
        **neurons: Any,
    ) -> None:
        super().__init__(windows, context)
        if dim % head_dim:
            raise ConfigurationError(f"widths must be multiples of {head_dim}, the channels of a head, not {dim}")
        neuron = Neurons(**neurons)
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv = Synapse(dim, 3 * dim, 1, norm)
        self.membrane1 = neuron.first(3 * dim, windows)
        self.spike1 = neuron.spike(3 * dim)
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.membrane2 = neuron.second(dim, windows)
        self.spike2 = neuron.spike(dim)
        self.project = Synapse(dim, dim, 1, norm)

    def attend(self, spikes: Tensor) -> Tensor:
        """Attention inside each of a batch of windows.

        Args:
            spikes: Queries, keys and values ``(B, 3 C, h, w)``.

        Returns:
            ``(Q K^T) V * scale`` of every head, ``(B, C, h, w)``.
        """
        batch, channels, height, width = spikes.shape
        tokens = height * width
        # Channels are the last axis here, as they are in memory: (3, B, heads, tokens, head_dim).
        tokenwise = spikes.permute(0, 2, 3, 1).reshape(batch, tokens, 3, channels // (3 * self.head_dim), self.head_dim)
        q, k, v = tokenwise.permute(2, 0, 3, 1, 4).unbind(0)
        # Without softmax the product is associative; what is cheaper depends on the number of tokens.
        if tokens > self.head_dim:
            current = q @ (k.transpose(2, 3) @ v * self.scale)
        else:
            current = (q @ k.transpose(2, 3)) @ v * self.scale
        attended: Tensor = current.transpose(1, 2).reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)
        return attended

    def forward(self, spikes: Tensor, state: list[Tensor] | None = None, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, to which the residual stream is added.

        Args:
            spikes: Input spikes.
            state: What the layers of neurons carried out of the time step before, if there is one.
            residual: Residual stream, if it is to be added.
        """
        size, dim = (spikes.shape[2], spikes.shape[3]), spikes.shape[1]
        where: dict[str, Any] = {"size": size, "state": state}
        current = self.qkv.conv(self.enter(spikes))
        s1, values, _ = fire(current, self.qkv.norm, self.spike1, self.membrane1, handed=dim, cut=self.cut, **where)
        seen = s1 if self.isolated else cut_windows(s1, self.windows)
        # Compilers expect batch norm to return a gradient in the memory order of its input, whatever it is given.
        attended = self.attend(seen).contiguous(memory_format=torch.channels_last)
        s2, _, _ = fire(attended, self.norm, self.spike2, self.membrane2, values, cut=self.cut_batch, **where)
        return self.leave(self.project, s2, size, residual)


@register_notrace_module  # the number of windows depends on the size of the map
class RecurrentMixer(_Mixer):
    """Mix the tokens of each window by a bidirectional recurrent cell with spiking neurons (arXiv 2401.10843).

    The cell reads the tokens of a window row by row, whatever the context; its output is the current of the neurons,
    whose membranes also take in the map that the block before handed on: see
    :func:`lightning_msnn.functional.recurrent_scan`.

    Args:
        dim: Channels of input and output; the membrane map has ``2 dim``, for the two directions.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: whether merged membranes fire, or each window's.
        norm: Whether batch norm follows each synapse.
        cell: Recurrent cell, one of :data:`CELLS`.
        **neurons: Arguments of :class:`lightning_msnn.nn.neuron.Neurons`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    def __init__(
        self,
        dim: int,
        windows: str = "non_dilated",
        context: str = "shared",
        norm: bool = True,
        cell: str = "lstm",
        **neurons: Any,
    ) -> None:
        super().__init__(windows, context)
        neuron = Neurons(**neurons)
        self.recurrence = Recurrence(dim, dim, cell)
        self.norm: nn.Module = nn.BatchNorm2d(2 * dim) if norm else nn.Identity()
        self.membrane = neuron.recurrent(2 * dim, windows)
        self.spike = neuron.spike(2 * dim)
        self.project = Synapse(2 * dim, dim, 1, norm)

    def forward(
        self, spikes: Tensor, before: Tensor, state: list[Tensor] | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, and a membrane map ``(B, 2 C, H, W)`` to the next.

        Args:
            spikes: Input spikes.
            before: Membrane map that the block before handed on.
            state: What the layers of neurons carried out of the time step before, if there is one.
            residual: Residual stream, if it is to be added to the current.
        """
        size = (spikes.shape[2], spikes.shape[3])
        seen = cut_windows(spikes, self.windows)
        h, w = seen.shape[2], seen.shape[3]
        read: Tensor = self.recurrence(seen.permute(0, 2, 3, 1).flatten(1, 2))
        # The cell's output lies token by token; batch norm is three times as fast on images in order.
        current = torch.unflatten(read.contiguous(), 1, (h, w)).permute(0, 3, 1, 2)
        fired, _, merged = fire(
            current, self.norm, self.spike, self.membrane, before, cut=self.cut_batch, size=size, keeps=True,
            state=state,
        )  # fmt: skip
        assert merged is not None
        after = join_windows(merged, self.windows, size) if self.isolated else merged
        return self.leave(self.project, fired, size, residual), after
