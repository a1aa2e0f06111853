"""Token mixers: layers of spiking neurons that visit the windows of a map and merge what they saw.

With *shared* context, the membranes of the windows are merged (mean where windows overlap), and the merged membrane
fires; a synapse that does not depend on the window runs once over the whole map. With *isolated* context, the published
form, each window fires for itself, a synapse sees zeros beyond the border of its window, all windows pass it as one
batch, and the windows' outputs are merged; the output projection comes before the mean over overlaps, so that its input
is still spikes.
"""

from typing import Any, ClassVar, Final

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_msnn.errors import ConfigurationError, choose, suggestion
from lightning_msnn.functional.fused import BATCH, can_fuse, cut_windows, join_windows
from lightning_msnn.functional.windows import WINDOWS, count, merge, split
from lightning_msnn.nn.neuron import Neurons

__all__ = [
    "CELLS",
    "CONTEXTS",
    "AttentionMixer",
    "CentredConv2d",
    "ConvMixer",
    "Recurrence",
    "RecurrentMixer",
    "Synapse",
]

CONTEXTS: tuple[str, ...] = ("shared", "isolated")
"""What a synapse sees beyond the border of a window: the rest of the map, or zeros."""

CELLS: dict[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}
"""Recurrent cells by the name that configurations use, and how many gates each has."""


_PRODUCT = 128  # images from which on two by two pixels are a matrix product


@register_notrace_module  # what is read of the kernel depends on the size of the map
class CentredConv2d(nn.Conv2d):
    """A convolution of odd kernel that keeps the size of the map, and skips what falls on its padding throughout.

    On a map or window of a single row or column only the middle of the kernel meets pixels: in the last stage, cut into
    windows of one pixel, one weight in nine. On two by two pixels it is a matrix product, each pixel of the output with
    each of the input, which on a CPU trains in half the time. (In training alone: a matrix product may round otherwise
    than a convolution, and the result for an image must not depend on how many are evaluated at once.)

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel in pixels, odd.
        bias: Whether there is a bias.
        groups: Groups of channels that do not see each other.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, groups=groups)
        self.reach = kernel_size // 2

    @torch.jit.unused
    def _is_product(self, x: Tensor) -> bool:
        """Whether a matrix product is worth its matrix, which is larger than the kernel."""
        if not self.training or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return False
        return x.shape[2] == x.shape[3] == 2 and x.shape[0] >= _PRODUCT and self.groups == 1 and x.device.type == "cpu"

    @torch.jit.unused
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of maps of two by two pixels."""
        taps = weight.to(x.dtype).permute(0, 2, 3, 1)
        # A row for each pixel and channel of the output: the part of the kernel that the four pixels of the input meet.
        ends = [self.reach, self.reach - 1]
        matrix = torch.cat([taps[:, i : i + 2, j : j + 2].flatten(1) for i in ends for j in ends])
        pixels = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, None if bias is None else bias.repeat(4))
        return pixels.view(-1, 2, 2, self.out_channels).permute(0, 3, 1, 2)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.jit.is_scripting() and self._is_product(input):
            return self._product(input, weight, bias)
        rows, columns = self.reach, self.reach
        if input.shape[2] == 1:
            weight, rows = weight[:, :, rows : rows + 1], 0
        if input.shape[3] == 1:
            weight, columns = weight[:, :, :, columns : columns + 1], 0
        return F.conv2d(input, weight, bias, [1, 1], [rows, columns], [1, 1], self.groups)


class Synapse(nn.Module):
    """A convolution that turns spikes into a synaptic current, and its batch norm, which folds into it at inference.

    Args:
        in_channels: Channels of the spikes.
        out_channels: Channels of the current.
        kernel_size: Side of the kernel in pixels, odd; the border is padded with zeros to keep the size.
        norm: Whether batch norm follows; without it the convolution has a bias.
        groups: Groups of channels that do not see each other.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, norm: bool = True, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d
        if kernel_size > 1:
            self.conv = CentredConv2d(in_channels, out_channels, kernel_size, not norm, groups)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=not norm, groups=groups)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, spikes: Tensor) -> Tensor:
        """Map spikes ``(B, in_channels, H, W)`` to a current ``(B, out_channels, H, W)``."""
        current: Tensor = self.norm(self.conv(spikes))
        return current


def _windows_of(batch: Tensor, windows: int) -> list[Tensor]:
    """Take a batch of windows ``(windows B, C, h, w)`` apart, a view ``(B, C, h, w)`` for each."""
    # Not chunk, which rounds and so ties an exported program to the batch that it was traced with.
    return list(torch.unflatten(batch, 0, [windows, -1]).unbind(0))


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

    cell: Final[str]

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

    __constants__: ClassVar[list[str]] = ["isolated", "windows"]  # TorchScript leaves out what they rule out
    has_operators: ClassVar[bool] = False
    """Whether all of the fused scans are operators for ``torch.compile``."""

    def __init__(self, windows: str, context: str) -> None:
        super().__init__()
        for value, allowed, what in ((windows, WINDOWS, "kind of windows"), (context, CONTEXTS, "context")):
            if value not in allowed:
                raise ConfigurationError(
                    f"unknown {what} {value!r}: allowed are {', '.join(allowed)}{suggestion(value, allowed)}"
                )
        self.windows = windows
        self.isolated = context == "isolated"
        # Where the windows of a layer lie: on the map, or one after another on the batch axis.
        self.layout = BATCH if self.isolated else windows

    @torch.jit.unused
    def fuses(self, layout: str, height: int, width: int) -> bool:
        """Whether what visits the windows runs as one operation each.

        Not in an exported program, which is to run where this package is not installed, and not where something watches
        each operation.

        Args:
            layout: Where the windows lie.
            height: Height of the map in pixels.
            width: Width of the map in pixels.
        """
        if torch.compiler.is_exporting() or is_in_torch_dispatch_mode():
            return False
        if torch.compiler.is_compiling() and not self.has_operators:
            return False
        return count(self.windows, height, width) == 4 and can_fuse(layout, height, width)

    def enter(self, spikes: Tensor) -> Tensor:
        """Give the synapses the map ``(B, C, H, W)``, or its windows as one batch ``(windows B, C, h, w)``."""
        return self.batch(spikes) if self.isolated else spikes

    def batch(self, x: Tensor) -> Tensor:
        """Cut a map ``(B, C, H, W)`` into its windows as one batch ``(windows B, C, h, w)``."""
        if not torch.jit.is_scripting() and self.fuses(self.windows, x.shape[2], x.shape[3]):
            return cut_windows(x, self.windows)
        return torch.cat(split(x, self.windows))

    def unbatch(self, x: Tensor, windows: int, height: int, width: int) -> Tensor:
        """Put windows ``(windows B, C, h, w)`` on the map ``(B, C, height, width)``, their mean where they overlap."""
        if not torch.jit.is_scripting() and self.fuses(self.windows, height, width):
            return join_windows(x, self.windows, height, width)
        return merge(_windows_of(x, windows), self.windows, height, width)

    def cut(self, current: Tensor, windows: int) -> list[Tensor]:
        """Cut what a synapse returned into the windows, each ``(B, C, h, w)``."""
        return _windows_of(current, windows) if self.isolated else split(current, self.windows)

    def join(self, membranes: list[Tensor], height: int, width: int) -> Tensor:
        """Put the membranes of the windows into one tensor to fire: a batch of windows, or the merged map."""
        return torch.cat(membranes) if self.isolated else merge(membranes, self.windows, height, width)

    def leave(self, current: Tensor, windows: int, height: int, width: int) -> Tensor:
        """Return the map ``(B, C, height, width)`` from the output projection's current."""
        return self.unbatch(current, windows, height, width) if self.isolated else current

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

    has_operators = True

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

    def membranes(self, spikes: Tensor, state: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the membranes of both layers after each window.

        Args:
            spikes: Input spikes ``(B, C, H, W)``.
            state: What the layers of neurons carried out of the time step before, if there is one.

        Returns:
            Membranes of layer 1 and of layer 2, each a list over the windows of ``(B, C, h, w)``.
        """
        height, width = spikes.shape[2], spikes.shape[3]
        n = count(self.windows, height, width)
        u1 = self.membrane1(self.cut(self.synapse1(self.enter(spikes)), n), state)
        s1 = self.spike1(self.join(u1, height, width))
        if state is not None:
            state.append(self.membrane1.leak(u1, self.cut(s1, n)))
        u2 = self.membrane2(self.cut(self.synapse2(s1), n), u1, state)
        return u1, u2

    def forward(self, spikes: Tensor, state: list[Tensor] | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current ``(B, C, H, W)`` for the residual stream."""
        height, width = spikes.shape[2], spikes.shape[3]
        if not torch.jit.is_scripting() and state is None and self.fuses(self.layout, height, width):
            u1, first = self.membrane1.merged(self.synapse1(self.enter(spikes)), self.layout)
            merged = self.membrane2.merged(self.synapse2(self.spike1(u1)), first, self.layout)
            return self.leave(self.project(self.spike2(merged)), 4, height, width)
        u2 = self.membranes(spikes, state)[1]
        s2 = self.spike2(self.join(u2, height, width))
        if state is not None:
            state.append(self.membrane2.leak(u2, self.cut(s2, len(u2))))
        return self.leave(self.project(s2), len(u2), height, width)


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

    def forward(self, spikes: Tensor, state: list[Tensor] | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current ``(B, C, H, W)`` for the residual stream."""
        height, width = spikes.shape[2], spikes.shape[3]
        n = count(self.windows, height, width)
        if not torch.jit.is_scripting() and state is None and self.fuses(self.layout, height, width):
            first, handed = self.membrane1.handing_on(self.qkv(self.enter(spikes)), self.layout, spikes.shape[1])
            seen = self.spike1(first) if self.isolated else self.batch(self.spike1(first))
            second = self.membrane2.merged(self.norm(self.attend(seen)), handed, BATCH)
            s2 = self.spike2(second if self.isolated else self.unbatch(second, n, height, width))
            return self.leave(self.project(s2), n, height, width)
        u1 = self.membrane1(self.cut(self.qkv(self.enter(spikes)), n), state)
        s1 = self.spike1(self.join(u1, height, width))
        if state is not None:
            state.append(self.membrane1.leak(u1, self.cut(s1, n)))
        seen = s1 if self.isolated else self.batch(s1)
        values = [u[:, 2 * spikes.shape[1] :] for u in u1]
        # Compilers expect batch norm to return a gradient in the memory order of its input, whatever it is given.
        current = self.norm(self.attend(seen).contiguous())
        u2 = self.membrane2(_windows_of(current, n), values, state)
        s2 = self.spike2(self.join(u2, height, width))
        if state is not None:
            state.append(self.membrane2.leak(u2, self.cut(s2, n)))
        return self.leave(self.project(s2), n, height, width)


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

    def fire(self, spikes: Tensor, before: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Compute the spikes of the neurons and the membrane map that they leave.

        Args:
            spikes: Input spikes ``(B, C, H, W)``.
            before: Membrane map that the block before handed on, ``(B, 2 C, H, W)``.
            state: What the layers of neurons carried out of the time step before, if there is one.

        Returns:
            Spikes, ``(B, 2 C, H, W)`` or the batch of windows ``(windows B, 2 C, h, w)`` with isolated context, and
            the new membrane map ``(B, 2 C, H, W)``, the mean where windows overlap.
        """
        height, width = spikes.shape[2], spikes.shape[3]
        n = count(self.windows, height, width)
        seen = self.batch(spikes)
        h, w = seen.shape[2], seen.shape[3]
        read: Tensor = self.recurrence(seen.permute(0, 2, 3, 1).flatten(1, 2))
        if not torch.jit.is_scripting() and state is None and self.fuses(self.windows, height, width):
            # The cell's output lies token by token; batch norm is three times as fast on images in order.
            current = self.norm(torch.unflatten(read.contiguous(), 1, (h, w)).permute(0, 3, 1, 2))
            scanned = self.membrane.batched(current, self.batch(before))
            joined = self.unbatch(scanned, n, height, width)
            return self.spike(scanned if self.isolated else joined), joined
        current = self.norm(read.reshape(-1, h, w, read.shape[2]).permute(0, 3, 1, 2))
        membranes = self.membrane(_windows_of(current, n), split(before, self.windows), state)
        after = merge(membranes, self.windows, height, width)
        fired = self.spike(torch.cat(membranes) if self.isolated else after)
        if state is not None:
            state.append(self.membrane.leak(membranes, self.cut(fired, n)))
        return fired, after

    def forward(self, spikes: Tensor, before: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, and a membrane map ``(B, 2 C, H, W)`` to the next."""
        height, width = spikes.shape[2], spikes.shape[3]
        fired, after = self.fire(spikes, before, state)
        windows = count(self.windows, height, width)
        return self.leave(self.project(fired), windows, height, width), after
