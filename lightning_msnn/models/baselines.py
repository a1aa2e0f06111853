"""Baselines of a network: the same topology with ReLU, and with plain LIF neurons over several time steps.

A baseline is built from the network's own name and arguments and takes over the weights that both have. Use it to
count operations, which with ReLU do not depend on the weights. To know its accuracy, train it.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_msnn.entries import fitting
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.nn.layer import normalise
from lightning_msnn.nn.neuron import Spike

__all__ = ["LIFNetwork", "LIFNeurons", "baselines", "calibrate", "lif_network", "relu_baseline"]


def _obstacle(model: nn.Module) -> str:
    """Say why a network has no baselines; nothing if it has."""
    name, arguments = getattr(model, "architecture", ""), getattr(model, "arguments", None)
    if not name or not isinstance(arguments, dict) or "depths" not in arguments:
        return f"{type(model).__name__} has no baseline: only spiking networks made by timm.create_model have one"
    if len(getattr(model, "stages", ())) != len(arguments["depths"]):
        return f"{name} has lost stages that a baseline would have: take the baseline of the whole network"
    return ""


def _build(model: nn.Module, **changes: Any) -> nn.Module:
    """Build a network like another but for some arguments, with its weights where both have them."""
    if obstacle := _obstacle(model):
        raise ConfigurationError(obstacle)
    name: Any = model.architecture
    arguments: Any = model.arguments
    with torch.random.fork_rng(devices=[]):  # making a baseline must not change the training
        made: nn.Module = timm.create_model(name, **{**arguments, **changes})
    own = made.state_dict()
    # A network in integers gives integers, whose scales calibrated batch norms take up.
    weights = {name: value.to(own[name].dtype) for name, value in fitting(model.state_dict(), own).items()}
    made.load_state_dict(weights, strict=False)
    tensor = next(model.parameters())
    return made.to(tensor.device, tensor.dtype).train(model.training)


def relu_baseline(model: nn.Module) -> nn.Module:
    """Return the same topology with ReLU in place of each layer of spiking neurons, and without windows.

    Args:
        model: A network of timm's registry whose name begins with ``msnn``.

    Raises:
        ConfigurationError: If the network does not say how it was built, or has lost a part of it.
    """
    return _build(model, windows="single", spiking=False)


class LIFNeurons(Spike):
    """Plain LIF neurons over ``T`` time steps: ``u_t = I_t + tau u_(t-1) (1 - s_(t-1))``, ``s_t = H(u_t - V)``.

    Args:
        spike: The neurons of one time step, whose threshold these have.
        tau: Decay of the membrane from one time step to the next.
        time_steps: Number of time steps ``T``.
    """

    def __init__(self, spike: Spike, tau: float, time_steps: int) -> None:
        super().__init__()
        self.__dict__.update(spike.__dict__)
        self.tau, self.time_steps = tau, time_steps

    def forward(self, membrane: Tensor, kernel: Callable[[], Tensor] | None = None) -> Tensor:
        """Map the currents of all time steps ``(T B, C, H, W)`` to their spikes, of that shape."""
        u, *currents = torch.unflatten(membrane, 0, (self.time_steps, -1)).unbind(0)
        fired_at = [self.fire(u)]
        for current in currents:
            u = current + self.tau * u * (1.0 - fired_at[-1])
            fired_at.append(self.fire(u))
        return torch.cat(fired_at)


class LIFNetwork(nn.Module):
    """A network with plain LIF neurons over several time steps; its output is the mean over the steps.

    All steps are one batch for synapses and batch norms. An image passes the stem once.

    Args:
        network: The network, with a single window.
        time_steps: Number of time steps ``T``.
    """

    def __init__(self, network: nn.Module, time_steps: int) -> None:
        super().__init__()
        self.network, self.time_steps = network, time_steps
        tau: float = network.arguments["tau"]  # type: ignore[index, assignment]
        for module in list(network.modules()):
            for name, child in module.named_children():
                if type(child) is Spike:  # not those within a recurrent cell, which fire at its output
                    setattr(module, name, LIFNeurons(child, tau, time_steps))
        for stage in network.stages:  # type: ignore[union-attr]
            stage.steps_in_batch = time_steps  # for what counts operations of a sample

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        network: Any = self.network
        steps = network.stem(x).repeat(self.time_steps, 1, 1, 1)
        stream = network._pass(steps, len(network.stages) - 1)[-1]
        mean = torch.unflatten(stream, 0, (self.time_steps, -1)).sum(0) / self.time_steps
        logits: Tensor = network.forward_head(normalise(mean, network.norm))
        return logits


def lif_network(model: nn.Module, time_steps: int = 4) -> LIFNetwork:
    """Return the same topology with plain LIF neurons over several time steps, and without windows.

    Args:
        model: A network of timm's registry whose name begins with ``msnn``.
        time_steps: Number of time steps ``T``.

    Raises:
        ConfigurationError: As :func:`relu_baseline`, or if ``time_steps`` is below 1.
    """
    check_integer("time_steps", time_steps, 1)
    return LIFNetwork(_build(model, windows="single", spiking=True, levels=1), time_steps)


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor) -> nn.Module:
    """Set the running statistics of a network's batch norms to those of some images, and put it in eval mode.

    A baseline needs it: the statistics that it took over are of another network's activations.

    Args:
        network: The network, changed in place.
        images: Images as the network takes them, at least two.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls of a norm
        norm.train()
    for part in images.tensor_split(max(1, len(images) // 64)):  # as counting does, lest memory run out
        network(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def baselines(model: nn.Module, images: Tensor, lif: bool = True) -> dict[str, nn.Module]:
    """Return the networks that a report compares a network with: with ReLU, and with LIF neurons at T = 4.

    Args:
        model: The network.
        images: Images ``(B, in_chans, H, W)`` that set the statistics of their batch norms.
        lif: Whether the one with LIF neurons is among them.

    Returns:
        Baselines in eval mode by name; none for a network that has none.
    """
    if _obstacle(model) or not model.arguments.get("spiking", True):  # type: ignore[union-attr, operator]
        return {}
    made = {"ANN twin": relu_baseline(model)} | ({"SNN twin, T = 4": lif_network(model)} if lif else {})
    return {name: calibrate(network, images) for name, network in made.items()}
