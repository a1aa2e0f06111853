"""Models of a neuron: how a membrane fires, and what it hands to the next time step."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_msnn.functional.membrane import hard_reset, soft_reset
from lightning_msnn.functional.spike import heaviside

__all__ = ["NEURONS", "NeuronModel"]


class NeuronModel(NamedTuple):
    """A model of a neuron, two functions of tensors.

    Args:
        fire: ``fire(membrane, surrogate, threshold)`` returns the spikes of a membrane, whose gradient is the
            surrogate's; see :func:`lightning_msnn.functional.heaviside`.
        reset: ``reset(membrane, spikes, threshold, tau)`` returns what is added to the current of the next time step;
            see :func:`lightning_msnn.functional.hard_reset`.
    """

    fire: Callable[[Tensor, Callable[[Tensor], Tensor], Tensor | float], Tensor]
    reset: Callable[[Tensor, Tensor, Tensor | float, Tensor | float], Tensor]


NEURONS: dict[str, NeuronModel] = {
    "lif": NeuronModel(heaviside, hard_reset),
    "soft_reset": NeuronModel(heaviside, soft_reset),
}
"""Neuron models by the name that configurations use; ``"lif"`` is the published one."""
