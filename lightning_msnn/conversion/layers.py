"""Convolutions and linear layers that receive spikes, from neurons of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.conversion.neuron import RectifierSpike, WindowMembrane
from lightning_msnn.nn.integer import IntegerConv2d

__all__ = [
    "SYNAPSES",
    "FixedLayer",
    "IntegerLayer",
    "SpikingLayer",
    "Threshold",
    "copied",
    "make_spiking",
    "replace",
    "revert",
]

M = TypeVar("M", bound=nn.Module)


class Threshold(nn.Module):
    """``H(x - V_c)`` with thresholds that are fixed, for inference.

    Args:
        neuron: The neurons that it takes the place of.
    """

    threshold: Tensor

    def __init__(self, neuron: RectifierSpike) -> None:
        super().__init__()
        self.register_buffer("threshold", neuron.log_threshold.detach().exp().view(neuron.shape))
        self.membrane: WindowMembrane | None = neuron.membrane

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to spikes of that shape."""
        return self.fire(x).to(x.dtype)

    def fire(self, x: Tensor) -> Tensor:
        """Return where there are spikes, boolean."""
        membrane = x if self.membrane is None else self.membrane(x)
        return membrane >= self.threshold.to(x.dtype)


class FixedLayer(nn.Sequential):
    """A layer that receives spikes, for inference: thresholds, then the layer itself with ``lambda`` in its weights.

    Args:
        threshold: The thresholds.
        layer: The layer.
    """

    def __init__(self, threshold: Threshold, layer: nn.Module) -> None:
        super().__init__(threshold, layer)

    def to_integers(self) -> nn.Module:
        """Return the same with integer weights, or itself if they are not for such a layer."""
        threshold, layer = self
        assert isinstance(threshold, Threshold)
        if isinstance(layer, nn.Linear):
            conv = nn.Conv2d(layer.in_features, layer.out_features, 1, device="meta")
            conv.weight, conv.bias = nn.Parameter(layer.weight[:, :, None, None]), layer.bias
            return IntegerLayer(threshold, IntegerConv2d(conv))
        plain = SYNAPSES[type(layer).forward] is _convolve and getattr(layer, "padding_mode", "") == "zeros"
        if not isinstance(layer, nn.Conv2d) or not plain or isinstance(layer.padding, str):
            return self  # it does not pad with as many zeros at both ends
        return IntegerLayer(threshold, IntegerConv2d(layer))


class IntegerLayer(nn.Sequential):
    """A layer that receives spikes and adds up integers; what it returns has the type of what it is given.

    Args:
        threshold: The thresholds.
        conv: The convolution, or a linear layer as one of one pixel.
    """

    def __init__(self, threshold: Threshold, conv: IntegerConv2d) -> None:
        super().__init__(threshold, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to the layer's output, shapes as those of the layer itself."""
        threshold, conv = self
        assert isinstance(threshold, Threshold)
        spikes = threshold.fire(x).to(torch.uint8)
        linear = threshold.threshold.dim() == 1
        currents: Tensor = conv(spikes.reshape(-1, spikes.shape[-1], 1, 1) if linear else spikes)
        return (currents.view(*spikes.shape[:-1], -1) if linear else currents).to(x.dtype)


class SpikingLayer(nn.Module):
    """A synapse whose input is made spikes; the neurons' ``lambda`` is multiplied into the weights in each call.

    While annealing it is in what the neurons return.

    It has the parameters of the layer that it was made of, by the same names, and those of ``neuron``.
    """

    spike_weights = ("weight",)
    neuron: RectifierSpike
    weight: Tensor
    bias: Tensor | None
    windows: str
    """Kind of windows that the neurons visit."""
    of: type[nn.Module]
    """Class of the layer that it was made of."""

    def scaled_weight(self) -> Tensor:
        """Weights that the spikes meet, shape of ``weight``: those of input channel ``c`` times ``lambda_c``."""
        outputs, inputs = self.weight.shape[:2]  # of a group, the inputs
        scale = self.neuron.log_scale.exp().view(-1, 1, inputs)
        scale = scale.expand(-1, outputs // len(scale), -1).reshape(outputs, inputs)
        return self.weight * scale.view(outputs, inputs, *[1] * (self.weight.dim() - 2))

    def synapse(self, spikes: Tensor, weight: Tensor) -> Tensor:
        """Return the currents of spikes that meet ``weight``."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.of,), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """Map a rectifier's values to the layer's output, shapes as those of the layer itself."""
        annealed = self.neuron.share(x) is not None
        return self.synapse(self.neuron(x), self.weight if annealed else self.scaled_weight())

    def plain(self) -> Any:
        """Return the layer as it was before conversion, with the weights that it has now."""
        plain = _fill(self.of.__new__(self.of), self)
        del plain.neuron
        return plain

    def for_inference(self) -> nn.Module:
        """Return the same for inference, see :class:`FixedLayer`."""
        plain = self.plain()
        plain.weight = nn.Parameter(self.scaled_weight().detach())
        return FixedLayer(Threshold(self.neuron), plain).eval()


def _convolve(layer: Any, spikes: Tensor, weight: Tensor) -> Tensor:
    currents: Tensor = layer._conv_forward(spikes, weight, layer.bias)
    return currents


def _convolve_same(layer: Any, spikes: Tensor, weight: Tensor) -> Tensor:
    where = (layer.stride, layer.padding, layer.dilation, layer.groups)
    currents: Tensor = conv2d_same(spikes, weight, layer.bias, *where)
    return currents


def _multiply(layer: Any, spikes: Tensor, weight: Tensor) -> Tensor:
    return F.linear(spikes, weight, layer.bias)


SYNAPSES: dict[Any, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Conv1d.forward: _convolve,
    nn.Conv2d.forward: _convolve,
    nn.Conv3d.forward: _convolve,
    Conv2dSame.forward: _convolve_same,
    nn.Linear.forward: _multiply,
    TimmLinear.forward: _multiply,
}
"""What a layer computes of spikes and weights, by its ``forward``: layers with another cannot receive spikes."""


@cache
def _spiking(plain: Any) -> type[SpikingLayer]:
    """The class of the spiking layers that are made of layers of a class."""
    names = {"synapse": SYNAPSES[plain.forward], "of": plain, "__doc__": SpikingLayer.__doc__}
    return type(f"Spiking{plain.__name__}", (SpikingLayer, plain), names)


def _empty(plain: type[nn.Module]) -> SpikingLayer:
    """What a copied or pickled layer is filled into."""
    kind = _spiking(plain)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def _fill(made: M, layer: nn.Module) -> M:
    """Give a new module the parameters, hooks and settings of another."""
    state = {k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
    made.__setstate__(state)  # type: ignore[no-untyped-call]
    return made


def make_spiking(layer: nn.Module, windows: str = "single") -> SpikingLayer:
    """Return a layer that receives spikes and has the parameters of another.

    Args:
        layer: Layer whose ``forward`` is one of :data:`SYNAPSES`; not changed.
        windows: Kind of windows that the neurons visit, one of :data:`lightning_msnn.functional.WINDOWS`.
    """
    made = _fill(_empty(type(layer)), layer)
    channels = made.weight.shape[1] * getattr(made, "groups", 1)
    neuron = RectifierSpike(channels, made.weight.dim() - 2, windows)
    made.neuron = neuron.to(made.weight.device, made.weight.dtype).train(layer.training)
    made.windows = windows
    return made


def copied(model: M) -> M:
    """Copy a network without the hooks that watch it; those of :mod:`torch.nn.utils`, which compute weights, stay."""
    made = copy.deepcopy(model)
    for module in made.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return made


def replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever a network has them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


def revert(model: M) -> M:
    """Return a copy of a converted network with its rectifiers in the place of neurons: its ANN twin.

    Args:
        model: The network; its weights are the twin's too.
    """
    twin = copied(model)
    spiking = [module for module in twin.modules() if isinstance(module, SpikingLayer)]
    replace(twin, {layer: layer.plain() for layer in spiking})
    return twin
