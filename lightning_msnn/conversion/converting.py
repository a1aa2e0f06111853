"""A trained network with rectifiers becomes a spiking one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_msnn.conversion.layers import SpikingLayer, copied, make_spiking, revert
from lightning_msnn.conversion.neuron import RectifierSpike
from lightning_msnn.conversion.tracing import APPROXIMATE, convertible, trace
from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.models.baselines import baselines as baselines_of_msnn
from lightning_msnn.models.baselines import calibrate as take_statistics
from lightning_msnn.nn import Spike, set_annealing

__all__ = ["baselines", "calibrate", "convert", "converted_layers", "make_layers_spiking"]

M = TypeVar("M", bound=nn.Module)


def convert(model: M, sample: Tensor, *, dry_run: bool = False, levels: int = 1) -> M:
    """Return a copy of a trained network in which layers behind rectifiers receive spikes.

    Every convolution and linear layer whose input comes from a ReLU or ReLU6 (with a warning: one of
    :data:`~lightning_msnn.conversion.tracing.APPROXIMATE`) gets neurons of its own in front. They start as the best
    quantisers of the sample's activations. Sums, products, averages and what a skip connection carries stay
    as they are. Names of parameters do not change; the neurons' are added; hooks are not copied. In training with
    :func:`lightning_msnn.nn.set_annealing` at a share of 0 the copy computes what the network does; in evaluation,
    spikes are exact.

    Args:
        model: The network, on any device and in any mode; not changed.
        sample: Images as the network takes them, ``(B, C, H, W)``. The more, the better the start: 64 will do.
        dry_run: Write the table of layers to standard output, and return the network that was given.
        levels: Levels ``D`` of a spike, 1 to 15: spikes are 0, 1, ... or ``D``.

    Returns:
        The converted network, in the mode of the one that was given.

    Raises:
        ConfigurationError: If an argument is not allowed, or the network cannot be traced, has no such layers or does
            not call them.
    """
    plan = trace(model, sample)
    if not sample.isfinite().all():
        raise ConfigurationError("the sample must be finite numbers, and some are not: neurons are fitted to them")
    if dry_run:
        sys.stdout.write(str(plan))
        return model
    converted = make_layers_spiking(copied(model), [row.layer for row in plan.spiking], levels)
    calibrate(converted, sample)
    if found := [name for name in APPROXIMATE if any(name in row.why.split(" and ") for row in plan.spiking)]:
        loss = "which go below 0, as spikes do not: expect to lose more accuracy than with ReLU"
        warnings.warn(f"layers behind {' and '.join(found)} receive spikes, {loss}", stacklevel=2)
    return converted


def make_layers_spiking(model: M, layers: Iterable[str], levels: int = 1) -> M:
    """Make layers of a network receive spikes, with neurons that are not fitted yet; return the network.

    Args:
        model: The network; changed in place.
        layers: Names of the layers.
        levels: Levels of the spikes.

    Raises:
        ConfigurationError: If it has no such layer, or one that cannot receive spikes, or there is no such level.
    """
    modules = dict(model.named_modules())
    for name in layers:
        layer = choose(modules, name, f"layer of {type(model).__name__}")
        if not convertible(layer):
            raise ConfigurationError(f"{name} is a {type(layer).__name__}, which cannot receive spikes")
        make_spiking(layer, levels)
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path, which takes the weights and does not call the layers
    return model


def converted_layers(model: nn.Module) -> list[str]:
    """Return the names of the spiking layers of a converted network."""
    return [name for name, layer in model.named_modules() if isinstance(layer, SpikingLayer)]


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Fit the neurons of a converted network, each as the best quantiser of what its rectifier passes on.

    Args:
        model: The network; thresholds and scales are changed in place.
        images: A batch of images as the network takes them.

    Raises:
        ConfigurationError: If a neuron does not run, as the network does not call its layer.
    """
    modes = {module: module.training for module in model.modules()}
    annealed = {module: module.annealing for module in model.modules() if isinstance(module, Spike)}
    idle = {module: name for name, module in model.named_modules() if isinstance(module, RectifierSpike)}

    def fit(neuron: RectifierSpike, args: tuple[Tensor, ...]) -> None:
        idle.pop(neuron, None)
        neuron.fit(args[0])

    parameter = next(model.parameters())
    set_annealing(model.eval(), 0.0)
    hooks = [neuron.train().register_forward_pre_hook(fit) for neuron in idle]
    try:
        with torch.autocast(parameter.device.type, enabled=False):
            model(images.to(parameter.device, parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for spike, share in annealed.items():
            spike.annealing = share
        for module, training in modes.items():
            module.training = training
    if idle:
        names = ", ".join(name.removesuffix(".neuron") for name in [*idle.values()][:3])
        raise ConfigurationError(
            f"{type(model).__name__} computes {names} in evaluation without calling it, so its neurons would never "
            "run: it cannot be converted"
        )


def baselines(network: nn.Module, images: Tensor, lif: bool = True) -> dict[str, nn.Module]:
    """Return the networks that a network is compared with, as :func:`lightning_msnn.models.baselines.baselines` does.

    That of a converted network is its source, with the weights that it has now.

    Args:
        network: The network.
        images: Images ``(B, in_chans, H, W)`` that set the statistics of their batch norms.
        lif: Whether LIF neurons at T = 4 are among them, where the network is not converted.
    """
    if converted_layers(network):
        return {"ANN twin": take_statistics(revert(network), images)}
    return baselines_of_msnn(network, images, lif)
