"""What the benchmarks compare: a network as shipped, its ReLU baseline, LIF neurons, and the method as published.

This file also makes the networks of an earlier commit, so it imports only what both packages have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_msnn  # noqa: F401  registers the networks
from lightning_msnn.models.baselines import calibrate, relu_baseline
from lightning_msnn.nn import Spike
from lightning_msnn.nn.folding import fold_batch_norm

CLASSES = 100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TWIN, SHIPPED, LOOP = "ReLU baseline", "as shipped", "published loop"


class _Lif(nn.Module):
    """SpikingJelly's LIF neurons in the place of a layer of ours; the time steps lie on the batch axis."""

    def __init__(self, time_steps: int) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        self.time_steps = time_steps
        self.node = neuron.LIFNode(
            tau=2.0,
            decay_input=False,
            v_threshold=0.5,
            v_reset=0.0,
            surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),  # the triangle
            detach_reset=True,
            step_mode="m",
        )

    def forward(self, membrane: Tensor) -> Tensor:
        """Return spikes."""
        return self.node(membrane.unflatten(0, (self.time_steps, -1))).flatten(0, 1)


class SpikingJellyTwin(nn.Module):
    """The same topology with SpikingJelly's LIF neurons and no windows, an image being shown ``time_steps`` times.

    Args:
        network: Network with a single window.
        time_steps: Number of time steps.
    """

    def __init__(self, network: nn.Module, time_steps: int) -> None:
        super().__init__()
        self.network, self.time_steps = network, time_steps
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, Spike):
                    setattr(module, name, _Lif(time_steps))
        self.nodes = [module.node for module in network.modules() if isinstance(module, _Lif)]

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits, the mean over the steps; the stem sees an image once."""
        for node in self.nodes:  # not by its reset_net, which also calls the reset of timm's read-out
            node.reset()
        net = self.network
        stream = net.stem(images).repeat(self.time_steps, 1, 1, 1)
        logits = net.forward_head(net.norm(net._pass(stream, len(net.stages) - 1)[-1]))
        return logits.unflatten(0, (self.time_steps, -1)).mean(0)


def images(batch: int, size: int = 32) -> Tensor:
    """Random images in channels-last order."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE).to(memory_format=torch.channels_last)


def make(contender: str, network: str = "msnn_resnet12", **arguments: Any) -> nn.Module:
    """Make a contender, its weights drawn anew, in channels-last order.

    Args:
        contender: One of :data:`CONTENDERS`.
        network: Name of the network.
        **arguments: Arguments of the network.
    """
    torch.manual_seed(0)
    model = CONTENDERS[contender](partial(timm.create_model, network, num_classes=CLASSES, **arguments))
    return model.to(DEVICE, memory_format=torch.channels_last)


def _published(build: Callable[..., nn.Module]) -> nn.Module:
    from benchmarks.published import publish  # which knows the present package alone

    return publish(build(context="isolated"))


CONTENDERS: dict[str, Callable[[Callable[..., nn.Module]], nn.Module]] = {
    TWIN: lambda build: relu_baseline(build()),
    SHIPPED: lambda build: build(),
    "grid windows": lambda build: build(windows="alternate_grid"),
    "one window": lambda build: build(windows="single"),
    "isolated windows": lambda build: build(context="isolated"),
    LOOP: _published,
    "SpikingJelly LIF, T = 1": lambda build: SpikingJellyTwin(build(windows="single"), 1),
    "SpikingJelly LIF, T = 4": lambda build: SpikingJellyTwin(build(windows="single"), 4),
}
"""Contenders by the name that tables use; each takes what builds the network."""


def prepared(contender: str, model: nn.Module) -> nn.Module:
    """Return a network for inference: its statistics those of some images, and folded where its authors fold."""
    calibrate(model, images(32))
    return fold_batch_norm(model) if contender != LOOP and not isinstance(model, SpikingJellyTwin) else model


def training_step(model: nn.Module, x: Tensor, precision: torch.dtype) -> Callable[[], None]:
    """Return a function that takes one training step: forward, backward, AdamW.

    Args:
        model: The network.
        x: Images ``(B, 3, H, W)``.
        precision: Data type of autocast; float32 is none.
    """
    model.train()
    targets = torch.arange(len(x), device=x.device) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor, precision: torch.dtype) -> Callable[[], None]:
    """Return a function that classifies a batch, with weights in the data type asked for.

    Args:
        model: The network in evaluation mode.
        x: Images ``(B, 3, H, W)``.
        precision: Data type of weights and images.
    """
    model = copy.deepcopy(model).to(precision)
    x = x.to(precision)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step
