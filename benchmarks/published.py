"""The mixers as the paper writes them: the windows one after another, each with its own synapses.

Slow and plain on purpose: what the fast mixers must equal, and what the benchmarks compare them with.
"""

import copy
from typing import Any

from torch import Tensor, nn

from lightning_msnn.functional import merge, split
from lightning_msnn.models import AttentionMixer, ConvMixer, RecurrentMixer

__all__ = ["PublishedMixer", "publish"]


class PublishedMixer(nn.Module):
    """A mixer with isolated context whose windows take turns.

    Args:
        mixer: The fast mixer, whose parts are used.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, spikes: Tensor, *others: Tensor | None, residual: Tensor | None = None) -> Any:
        """Mix spikes ``(B, C, H, W)`` and add the stream; a recurrent mixer takes and returns the membrane map too."""
        stream = 0.0 if residual is None else residual
        if isinstance(self.mixer, ConvMixer):
            return stream + self._convolve(spikes)
        if isinstance(self.mixer, AttentionMixer):
            return stream + self._attend(spikes)
        current, after = self._recur(spikes, others[0])
        return stream + current, after

    def _convolve(self, spikes: Tensor) -> Tensor:
        m, u1, u2, outputs = self.mixer, None, None, []
        for window in split(spikes, m.windows):
            i1 = m.synapse1(window)
            new1 = i1 if u1 is None else m.membrane1.decay().to(i1.dtype) * u1 + i1
            i2 = m.synapse2(m.spike1(new1))
            new2 = i2 if u2 is None else m.membrane2.decay().to(i2.dtype) * m.membrane2.projection(u1, u2) + i2
            u1, u2 = new1, new2
            outputs.append(m.project(m.spike2(u2)))
        return merge(outputs, m.windows, *spikes.shape[2:])

    def _attend(self, spikes: Tensor) -> Tensor:
        m, u1, u2, outputs = self.mixer, None, None, []
        dim = spikes.shape[1]
        for window in split(spikes, m.windows):
            i1 = m.qkv(window)
            new1 = i1 if u1 is None else m.membrane1.decay().to(i1.dtype) * u1 + i1
            i2 = m.norm(m.attend(m.spike1(new1)))
            if u2 is not None:
                i2 = i2 + m.membrane2.decay().to(i2.dtype) * m.membrane2.projection(u1[:, 2 * dim :], u2)
            u1, u2 = new1, i2
            outputs.append(m.project(m.spike2(u2)))
        return merge(outputs, m.windows, *spikes.shape[2:])

    def _recur(self, spikes: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        m, new, outputs = self.mixer, [], []
        old = split(before, m.windows)
        for k, window in enumerate(split(spikes, m.windows)):
            read = m.recurrence(window.permute(0, 2, 3, 1).flatten(1, 2))
            current = m.norm(read.reshape(len(window), *window.shape[2:], -1).permute(0, 3, 1, 2))
            if len(old) > 1:
                pair = (old[k], new[k - 1]) if k > 1 else ((new[0], old[1]) if k else (old[0], old[1]))
                current = current + m.membrane.decay().to(current.dtype) * m.membrane.projection(*pair)
            new.append(current)
            outputs.append(m.project(m.spike(current)))
        return merge(outputs, m.windows, *spikes.shape[2:]), merge(new, m.windows, *spikes.shape[2:])


def publish(network: nn.Module) -> nn.Module:
    """Return a copy of a network with isolated context whose windows take turns.

    Args:
        network: The network.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvMixer | AttentionMixer | RecurrentMixer):
                assert child.isolated
                setattr(module, name, PublishedMixer(child))
    return network
