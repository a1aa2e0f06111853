"""Convolutions and linear layers that receive spikes, from neurons of their own.

A layer changes its class in place, so that everything that refers to it, a list of the network's own too, finds it
changed. Every form is still a layer of the class that it was made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.conversion.neuron import FixedSpike, RectifierSpike
from lightning_msnn.nn.integer import IntegerConv2d
from lightning_msnn.nn.synapse import CentredConv2d

__all__ = ["SYNAPSES", "FixedLayer", "IntegerLayer", "SpikingLayer", "copied", "make_spiking", "revert"]

M = TypeVar("M", bound=nn.Module)


class _Form(nn.Module):
    """A form of a layer: a class derived from it and from the layer's own is made for each."""

    weight: Tensor
    bias: Tensor | None
    of: Any
    """Class of the layer."""

    synapse: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """What it computes of spikes, weights and bias."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, self.__dict__


class SpikingLayer(_Form):
    """A synapse behind neurons, whose ``lambda`` is multiplied into its weights in each call.

    While annealing, the neurons multiply by ``lambda``. Parameters keep their names, beside those of ``neuron``.
    """

    spike_weights = ("weight",)
    neuron: RectifierSpike

    def scaled_weight(self) -> Tensor:
        """Weights that the spikes meet, shape of ``weight``: those of input channel ``c`` times ``lambda_c``."""
        outputs, inputs = self.weight.shape[:2]  # of a group, the inputs
        scale = self.neuron.log_scale.exp().view(-1, 1, inputs)
        scale = scale.expand(-1, outputs // len(scale), -1).reshape(outputs, inputs)
        return self.weight * scale.view(outputs, inputs, *[1] * (self.weight.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to the layer's output, shapes as those of the layer itself."""
        annealed = self.neuron.share(x) is not None
        return self.synapse(self.neuron(x), self.weight if annealed else self.scaled_weight(), self.bias)

    def for_inference(self) -> nn.Module:
        """Become a :class:`FixedLayer`."""
        self.weight = nn.Parameter(self.scaled_weight().detach())
        self.neuron = FixedSpike(self.neuron)  # type: ignore[assignment]
        return _become(self, FixedLayer, self.of)


class FixedLayer(_Form):
    """A spiking layer for inference: thresholds are fixed, and ``lambda`` is in the weights."""

    neuron: FixedSpike

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to the layer's output, shapes as those of the layer itself."""
        return self.synapse(self.neuron(x), self.weight, self.bias)

    def to_integers(self) -> nn.Module:
        """Become an :class:`IntegerLayer`, unless it has other axes, another sum, or uneven or other padding."""
        conv: Any = self
        if issubclass(self.of, nn.Linear):
            conv = nn.Conv2d(conv.in_features, conv.out_features, 1, device="meta")
            conv.weight, conv.bias = nn.Parameter(self.weight[:, :, None, None]), self.bias
        elif self.of._conv_forward not in _OF_INTEGERS or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return self
        self.integer = IntegerConv2d(conv)
        self.neuron.dtype = torch.uint8
        del self.weight, self.bias
        return _become(self, IntegerLayer, self.of)


class IntegerLayer(_Form):
    """A spiking layer that adds up integers; what it returns has the type of what it is given."""

    neuron: FixedSpike
    integer: IntegerConv2d

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights in floating point, for networks that read them or their type."""
        weight = (self.integer.weight * self.integer.scale.view(-1, 1, 1, 1)).to(self.neuron.threshold.dtype)
        return weight.flatten(1) if issubclass(self.of, nn.Linear) else weight

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """The bias, float32."""
        return self.integer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to the layer's output, shapes as those of the layer itself."""
        spikes: Tensor = self.neuron(x)
        linear = issubclass(self.of, nn.Linear)
        currents: Tensor = self.integer(spikes.reshape(-1, spikes.shape[-1], 1, 1) if linear else spikes)
        return (currents.view(*spikes.shape[:-1], -1) if linear else currents).to(x.dtype)


SYNAPSES = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward, TimmLinear.forward}
"""``forward`` of layers that can receive spikes; convolutions compute by the ``_conv_forward`` of their class."""

_OF_INTEGERS = {conv._conv_forward for conv in (nn.Conv2d, CentredConv2d)}


@cache
def _class(form: Any, of: Any) -> type[nn.Module]:
    """The class of the layers of a class in one of their forms."""
    names = {"synapse": getattr(of, "_conv_forward", staticmethod(F.linear)), "of": of, "__doc__": form.__doc__}
    return type(f"{form.__name__.removesuffix('Layer')}{of.__name__}", (form, of), names)


def _become(layer: nn.Module, form: type[nn.Module], of: type[nn.Module]) -> nn.Module:
    layer.__class__ = _class(form, of)  # type: ignore[arg-type]  # a class is hashable
    return layer


def _empty(form: type[nn.Module], of: type[nn.Module]) -> nn.Module:
    """What a copied or pickled layer is filled into."""
    made = _class(form, of)  # type: ignore[arg-type]
    return made.__new__(made)


def make_spiking(layer: nn.Module, levels: int = 1) -> None:
    """Make a layer receive spikes.

    Args:
        layer: Layer whose ``forward`` is one of :data:`SYNAPSES`; changed in place.
        levels: Levels of the spikes.
    """
    weight: Any = layer.weight
    neuron = RectifierSpike(weight.shape[1] * getattr(layer, "groups", 1), weight.dim() - 2, levels)
    layer.neuron = neuron.to(weight.device, weight.dtype).train(layer.training)
    _become(layer, SpikingLayer, type(layer))


def copied(model: M) -> M:
    """Copy a network without the hooks that watch it; those of :mod:`torch.nn.utils`, which compute weights, stay."""
    made = copy.deepcopy(model)
    for module in made.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return made


def revert(model: M) -> M:
    """Return a copy of a converted network with its rectifiers in the place of neurons: its ReLU baseline.

    Args:
        model: The network; its weights are the baseline's too. An entry in 8 bits has ``lambda`` in them, so that its
            baseline is not what it was converted from.
    """
    baseline = copied(model)
    for module in baseline.modules():
        if isinstance(module, SpikingLayer):
            del module.neuron
            module.__class__ = module.of
    return baseline
