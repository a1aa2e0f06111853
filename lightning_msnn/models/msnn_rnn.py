"""Recurrent family: the token mixer is a bidirectional recurrent cell over the tokens of each window.

Beside the residual stream a membrane map travels from block to block; it is passed and returned, never kept.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.errors import choose
from lightning_msnn.models.msnn import MSNN, recomputed
from lightning_msnn.models.registry import create, zoo_cfgs
from lightning_msnn.nn.blocks import Block, PatchMerging
from lightning_msnn.nn.layer import cut_windows, fire, join_windows
from lightning_msnn.nn.mixer import Mixer
from lightning_msnn.nn.neuron import Membrane, Neuron, Spike
from lightning_msnn.nn.synapse import Synapse

# The registry adds the entry points.
__all__ = ["CELLS", "MSNNRNN", "SPIKING_CELLS", "Recurrence", "RecurrentMixer", "RecurrentStage", "SpikingRecurrence"]

CELLS = {"lstm": 4, "gru": 3, "spiking_lstm": 4, "spiking_gru": 3}
"""Recurrent cells by the name that configurations use, and how many gates each has."""

_WEIGHTS = [f"{name}_l0{way}" for way in ("", "_reverse") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


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

    spike_weights: tuple[str, ...] = ("weight_ih_l0", "weight_ih_l0_reverse")

    def __init__(self, input_size: int, hidden_size: int, cell: str = "lstm") -> None:
        super().__init__()
        rows = choose(CELLS, cell, "recurrent cell") * hidden_size
        self.cell = cell
        self.input_size = input_size
        self.hidden_size = hidden_size
        bound = hidden_size**-0.5
        shapes = ((rows, input_size), (rows, hidden_size), (rows,), (rows,))
        for name, shape in zip(_WEIGHTS, shapes * 2, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def weights(self) -> list[Tensor]:
        """Matrix of the input, matrix of the output before, and their biases: forwards, then backwards."""
        return [getattr(self, name) for name in _WEIGHTS]

    def forward(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, L, input_size)`` in both directions and return ``(B, L, 2 hidden_size)``."""
        if tokens.is_cuda and torch.is_autocast_enabled("cuda"):  # which takes float16 for cells, also in bfloat16
            with torch.autocast("cuda", enabled=False):
                return self.forward(tokens.float()).to(tokens.dtype)
        hidden = torch.zeros([2, tokens.shape[0], self.hidden_size], dtype=tokens.dtype, device=tokens.device)
        how: Any = (self.weights(), True, 1, 0.0, self.training, True, True)  # with biases, 1 layer, no dropout, ...
        if self.cell == "gru":
            return torch.gru(tokens, hidden, *how)[0]
        return torch.lstm(tokens, [hidden, hidden], *how)[0]

    def extra_repr(self) -> str:
        """Show cell and sizes."""
        return f"{self.cell!r}, {self.input_size}, {self.hidden_size}"


class LSTMGates(nn.Module):
    """What an LSTM does between its matrix products; gates in the order of torch's."""

    def forward(self, current: Tensor, recurrent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and state after a token, from its two products ``(..., 4 H)`` and the state ``(..., H)``."""
        i, f, g, o = (current + recurrent).chunk(4, -1)
        state = torch.sigmoid(f) * state + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(state), state


class GRUGates(nn.Module):
    """What a GRU does between its matrix products; gates in the order of torch's."""

    def forward(self, current: Tensor, recurrent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and state, which are the same, from two products ``(..., 3 H)`` and the state ``(..., H)``."""
        reset, update, new = current.chunk(3, -1)
        reset_before, update_before, new_before = recurrent.chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_before) * new_before)
        state = new + torch.sigmoid(update + update_before) * (state - new)
        return state, state


SPIKING_CELLS = {"spiking_lstm": LSTMGates, "spiking_gru": GRUGates}
"""Gates of the cells that are fed back spikes."""


class FeedbackSpike(Spike):
    """Neurons that fire at a cell's own output and feed the cell; a LIF baseline leaves them as they are."""


class SpikingRecurrence(Recurrence):
    """A bidirectional recurrent cell that is fed back spikes, ``H(h - V)``, in the place of its output ``h``.

    Both of its matrices receive 0 and 1 alone, so all their products are accumulates. Gates, state and output, the
    current of the mixer's neurons, stay analogue. It has the parameters of the cell that is fed back ``h``, so that
    either starts from the other's weights.

    Args:
        input_size: Channels of a token.
        hidden_size: Channels of a direction's output.
        cell: One of :data:`SPIKING_CELLS`.
        neuron: Decay, threshold and surrogate of the neurons.
    """

    spike_weights = (*Recurrence.spike_weights, "weight_hh_l0", "weight_hh_l0_reverse")

    def __init__(self, input_size: int, hidden_size: int, cell: str, neuron: Neuron) -> None:
        super().__init__(input_size, hidden_size, cell)
        self.gates: nn.Module = choose(SPIKING_CELLS, cell, "spiking recurrent cell")()
        self.spike = FeedbackSpike(neuron, 2 * hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read tokens ``(B, L, input_size)`` in both directions and return ``(B, L, 2 hidden_size)``."""
        batch = tokens.shape[0]
        weights = self.weights()
        inputs, outputs, input_biases, output_biases = zip(weights[:4], weights[4:], strict=True)
        current = F.linear(tokens, torch.cat(inputs), torch.cat(input_biases))
        forwards, backwards = torch.unflatten(current, 2, (2, -1)).unbind(2)
        currents = torch.stack((forwards, backwards.flip(1))).transpose(1, 2)  # (2, L, B, gates H)
        weight = torch.stack(outputs).transpose(1, 2).to(current.dtype)
        bias = torch.stack(output_biases).unsqueeze(1).to(current.dtype)
        wide = torch.promote_types(current.dtype, torch.float32)  # the state sums over tokens
        h = state = torch.zeros([2, batch, self.hidden_size], dtype=wide, device=current.device)
        read: list[Tensor] = []
        for token in currents.unbind(1):
            # Neurons take channels as the second axis, the two directions one after the other.
            seen = h.movedim(0, 1).reshape(batch, 2 * self.hidden_size, 1, 1)
            fired = self.spike(seen).view(batch, 2, self.hidden_size).movedim(1, 0)
            recurrent = torch.baddbmm(bias, fired.to(weight.dtype), weight)
            h, state = self.gates(token, recurrent, state)
            read.append(h)
        forwards, backwards = torch.stack(read, 2).to(current.dtype)  # (2, B, L, H)
        return torch.cat((forwards, backwards.flip(1)), 2)


@register_notrace_module  # the number of windows depends on the size of the map
class RecurrentMixer(Mixer):
    """Mix the tokens of each window by a bidirectional recurrent cell with spiking neurons (arXiv 2401.10843).

    The cell reads the tokens of a window row by row, whatever the context. Its output is the current of the neurons;
    :func:`lightning_msnn.functional.recurrent_scan` adds the map of the block before to their membranes.

    Args:
        dim: Channels of input and output; the membrane map has ``2 dim``, for the two directions.
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: whether merged membranes fire, or each window's.
        norm: Whether batch norm follows each synapse.
        cell: Recurrent cell, one of :data:`CELLS`.
        neuron: Decay, threshold and surrogate of the neurons.

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
        neuron: Neuron = Neuron(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(windows, context)
        self.recurrence: Recurrence = (
            SpikingRecurrence(dim, dim, cell, neuron) if cell in SPIKING_CELLS else Recurrence(dim, dim, cell)
        )
        self.norm: nn.Module = nn.BatchNorm2d(2 * dim) if norm else nn.Identity()
        self.membrane = Membrane("recurrent", neuron, 2 * dim, windows)
        self.spike = Spike(neuron, 2 * dim)
        self.project = Synapse(2 * dim, dim, 1, norm)

    def forward(self, spikes: Tensor, before: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map spikes ``(B, C, H, W)`` to a current of that shape, and the membrane map ``(B, 2 C, H, W)`` to the next.

        Args:
            spikes: Input spikes.
            before: Membrane map of the block before.
            residual: Residual stream, added to the current.
        """
        size = (spikes.shape[2], spikes.shape[3])
        seen = cut_windows(spikes, self.windows)
        h, w = seen.shape[2], seen.shape[3]
        read: Tensor = self.recurrence(seen.permute(0, 2, 3, 1).flatten(1, 2))
        # The cell's output lies token by token; batch norm is three times as fast on images in order.
        current = torch.unflatten(read.contiguous(), 1, (h, w)).permute(0, 3, 1, 2)
        cut = self.cut_batch._replace(keeps=True)
        fired, _, merged = fire(current, self.norm, self.spike, self.membrane, before, cut=cut, size=size)
        assert merged is not None
        after = join_windows(merged, self.windows, size) if self.isolated else merged
        return self.leave(self.project, fired, size, residual), after


class RecurrentBlock(Block):
    """Residual block beside whose stream a membrane map travels from block to block."""

    def forward(self, x: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map the residual stream ``(B, C, H, W)`` and the membrane map ``(B, 2 C, H, W)`` to the next block's."""
        x, membrane = self._join(partial(self.mixer, self.encoder1(x), membrane), x)
        return self._mix_channels(x), membrane


class RecurrentStage(nn.Module):
    """Blocks at one resolution, after the patch merging of the stream and of the membrane map.

    It takes the arguments of :class:`lightning_msnn.models.msnn.Stage`; the cell sees where a token is by itself.
    """

    def __init__(
        self, before: int | None, width: int, blocks: list[nn.Module], encoder: Callable[[int], nn.Module], norm: bool
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = PatchMerging(before, width, norm) if before else nn.Identity()
        # A map that is one window throughout takes nothing from the one before.
        self.travels = any(block.mixer.windows != "single" for block in blocks)  # type: ignore[union-attr]
        self.membrane: nn.Module = (
            PatchMerging(2 * before, 2 * width, norm) if before and self.travels else nn.Identity()
        )
        self.blocks = nn.ModuleList(blocks)
        self.feature = nn.Identity()  # names the stream for feature extraction, since a stage returns two tensors

    def forward(self, x: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        """Map stream ``(B, C, H, W)`` and membrane map ``(B, 2 C, H, W)`` of the stage before to this stage's."""
        x = self.downsample(x)
        membrane = self.membrane(membrane) if self.travels else torch.zeros_like(x).repeat(1, 2, 1, 1)
        for block in self.blocks:
            x, membrane = recomputed(block, x, membrane) if self.grad_checkpointing else block(x, membrane)
        return self.feature(x), membrane


class MSNNRNN(MSNN):
    """Spiking recurrent network.

    Args:
        cell: Recurrent cell, one of :data:`CELLS`.
        **kwargs: Arguments of :class:`lightning_msnn.models.MSNN`.
    """

    mixer = RecurrentMixer
    block = RecurrentBlock
    stage = RecurrentStage
    feature_module = "stages.{}.feature"

    def __init__(self, cell: str = "lstm", **kwargs: Any) -> None:
        super().__init__(mixer_kwargs={"cell": cell}, **kwargs)

    def _pass(self, x: Tensor, last: int) -> list[Tensor]:
        outputs: list[Tensor] = []
        membrane = torch.zeros_like(x).repeat(1, 2, 1, 1)
        for stage in self.stages[: last + 1]:
            x, membrane = stage(x, membrane)
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
