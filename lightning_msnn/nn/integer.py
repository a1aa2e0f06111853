"""Synapses in integers for inference: spikes are bytes, weights have 8 bits, and their sums are exact.

A spike loses nothing in 8 bits, so there is nothing to calibrate. The sum of each output channel is multiplied once, by
the scale of its weights.
"""

from typing import Any, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels.integer import MOST, Packed, Steps, convolve
from lightning_msnn.nn.blocks import MLP, AnalogueMLP, BernoulliEncoder, Block, Encoder
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm
from lightning_msnn.nn.neuron import Rectifier, Spike
from lightning_msnn.nn.synapse import Synapse

__all__ = ["IntegerConv2d", "IntegerMLP", "IntegerSynapse", "quantised", "to_integers"]

M = TypeVar("M", bound=nn.Module)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to integers from -127 to 127, so that the largest of each output channel is one of the two.

    Args:
        weight: Weights, output channels first.

    Returns:
        Integers, int8, of that shape, and the scale of each output channel, float32: the weight is their product.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)  # all weights are 0
    return (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).view(weight.shape), scale


class IntegerConv2d(nn.Module):
    """A convolution of spikes with integers of 8 bits, which keep their types, whatever type the network is moved to.

    Args:
        conv: The convolution, without batch norm; it pads with as many zeros at both ends.
        level: Threshold of the neurons that its current goes to, one or one for each output channel; they become part
            of it: sums are compared with the least sum that reaches the threshold. None is no neurons.

    Raises:
        ConfigurationError: If a weight is not finite.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, level: Tensor | float | None = None) -> None:
        super().__init__()
        weight, scale = quantised(conv.weight)
        bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.detach().float()
        if not (conv.weight.isfinite().all() and bias.isfinite().all()):
            raise ConfigurationError("weights must be finite to become integers, and some are not")
        self.fires = level is not None
        if level is not None:
            self.threshold = float(torch.as_tensor(level).flatten()[0])  # counters of spikes know neurons by it
            least = ((torch.as_tensor(level).double() - bias.double()) / scale.double()).ceil()
            bias, scale = (1.0 - least.clamp(-(2.0**23), 2.0**23)).float(), torch.ones_like(scale)
        assert not isinstance(conv.padding, str)
        stride, padding, dilation = ((size[0], size[1]) for size in (conv.stride, conv.padding, conv.dilation))
        self.steps = Steps(stride, padding, dilation, conv.groups)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed = Packed()

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerConv2d":
        exact = self.scale, self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.bias = (numbers.to(self.weight.device) for numbers in exact)
        self.packed = Packed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = Packed()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` of any type to currents, float32, or to spikes, bytes.

        The residual stream, in the shape of the currents, is added to them in its own type.
        """
        return convolve(spikes, self.weight, self.scale, self.bias, self.packed, self.steps, self.fires, residual)

    def extra_repr(self) -> str:
        """Show the sizes."""
        outputs, inputs, *kernel = self.weight.shape
        return f"{inputs * self.steps.groups}, {outputs}, kernel_size={tuple(kernel)}, fires={self.fires}"


def _folded(synapse: Synapse) -> nn.Conv2d:
    """The convolution of a synapse without batch norm."""
    if not isinstance(synapse.norm, nn.Identity):
        raise ConfigurationError(
            f"integer weights take in the batch norm behind them, which {type(synapse.norm).__name__} without running "
            "statistics does not allow"
        )
    return synapse.conv


class IntegerSynapse(nn.Module):
    """A synapse of integer weights; its currents are float32.

    Raises:
        ConfigurationError: If the batch norm of the synapse is not folded.
    """

    def __init__(self, synapse: Synapse) -> None:
        super().__init__()
        self.conv = IntegerConv2d(_folded(synapse))
        self.norm = nn.Identity()

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, C, H, W)`` to a current ``(B, O, H, W)``, and add a stream like it."""
        current: Tensor = self.conv(spikes, residual)
        return current


class IntegerMLP(nn.Module):
    """A channel mixer of integer weights, whose batch norms are folded; its neurons compare integers."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        level = mlp.spike.threshold if mlp.spike.level is None else mlp.spike.level.detach()
        self.fc1 = IntegerConv2d(_folded(mlp.fc1), level)
        self.fc2 = IntegerSynapse(mlp.fc2)

    def forward(self, spikes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map spikes ``(B, dim, H, W)`` to a current of that shape, to which the residual stream is added."""
        current: Tensor = self.fc2(self.fc1(spikes), residual)
        return current


def _store_bytes(module: nn.Module) -> None:
    """Let a layer of neurons store its spikes as bytes."""
    neurons = module.spike if type(module) is Encoder else module
    if type(neurons) in (Spike, ThresholdEncoder):
        neurons.bytes = True  # type: ignore[assignment]


def _read_by_synapses(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers of neurons in a module whose spikes only synapses of integer weights read."""
    if isinstance(module, Block):
        entering = ("encoder1",) if "byte_spikes" in vars(type(module.mixer)) else ()
        return entering + (("encoder2",) if isinstance(module.mlp, MLP | IntegerMLP) else ())
    # Not inherited: a derived class may use its spikes elsewhere.
    names: tuple[str, ...] = vars(type(module)).get("byte_spikes", ())
    return names


def to_integers(model: M) -> M:
    """Return a copy of a network for inference on CPUs whose synapses add up integers of 8 bits.

    Batch norm is folded first. Then every convolution and linear layer that receives spikes has integer weights, with a
    scale for each output channel; neurons between two of them compare integers, and spikes are bytes where only
    synapses read them. Stem, patch merging, attention's products, recurrent cells and read-out stay as they are. In a
    converted network, so do layers other than 2D convolutions and linear layers, and those with uneven padding.

    Sums are exact. Weights are rounded to 8 bits, which changes logits, and the class of a few images.

    Args:
        model: Network in evaluation mode, on a CPU.

    Raises:
        ConfigurationError: If the network is in training mode or on another device, has rectifiers in the place of
            spikes, draws its spikes (``coding: bernoulli``), or no such layer receives spikes.
    """
    if model.training:
        raise ConfigurationError("integer weights are for inference: call eval() first")
    if device := next((str(p.device) for p in model.parameters() if p.device.type != "cpu"), ""):
        raise ConfigurationError(f"integer weights are for CPUs, and the network is on {device}")
    modules = list(model.modules())
    converted = any(callable(getattr(module, "for_inference", None)) for module in modules)
    if not converted and any(isinstance(module, Rectifier) for module in modules):
        raise ConfigurationError("integer weights are for spikes, and this network is a ReLU baseline")
    if any(isinstance(module, BernoulliEncoder) for module in modules):
        raise ConfigurationError("integer weights are for thresholds, and this network draws its spikes: bernoulli")
    folded = fold_batch_norm(model)
    for parent in list(folded.modules()):
        for name in () if converted else _read_by_synapses(parent):
            _store_bytes(getattr(parent, name))
        for name, child in parent.named_children():
            if isinstance(child, DropPath):  # does nothing here, but keeps a synapse from adding the stream
                setattr(parent, name, nn.Identity())
            elif callable(getattr(child, "to_integers", None)):
                setattr(parent, name, child.to_integers())  # type: ignore[operator]
            elif type(child) is MLP and not converted and child.spike.levels == 1:
                setattr(parent, name, IntegerMLP(child))
            elif type(child) is Synapse and not (converted or isinstance(parent, AnalogueMLP)):
                setattr(parent, name, IntegerSynapse(child))
    most = MOST // max((module.levels for module in modules if isinstance(module, Spike)), default=1)
    if any(isinstance(module, IntegerConv2d) and module.weight[0].numel() > most for module in folded.modules()):
        raise ConfigurationError(f"no more than {most} integers are added up in an output channel")
    if not any(isinstance(module, IntegerConv2d) for module in folded.modules()):
        raise ConfigurationError(
            f"integer weights are for synapses that receive spikes, and {type(model).__name__} has none"
        )
    return folded.requires_grad_(False)
