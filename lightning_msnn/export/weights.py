"""Weights in safetensors with all that it takes to rebuild the network: in 32 or 16 bits, or synapses in 8.

A spike is 0 or 1, so a synapse adds up those weights that spikes meet. In 8 bits they are integers, and their sum is
exact; it is multiplied once by the scale of its output channel. There is nothing to calibrate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lightning_msnn.conversion import SpikingLayer
from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.source import Source
from lightning_msnn.models.msnn_rnn import Recurrence, SpikingRecurrence
from lightning_msnn.models.registry import check_arguments, create_with, is_ours, own_arguments
from lightning_msnn.models.weights import SCALE, dequantised
from lightning_msnn.nn import AnalogueMLP, BernoulliEncoder, Spike, Synapse
from lightning_msnn.nn.integer import quantised

__all__ = ["load_weights", "run", "synapses", "write"]


def synapses(network: nn.Module) -> set[str]:
    """Return the names of the weights that meet spikes, of every convolution, linear layer and recurrent cell.

    Args:
        network: A network of this package, converted ones included.
    """
    modules = dict(network.named_modules())
    if not any(isinstance(module, Spike | BernoulliEncoder) for module in modules.values()):
        return set()  # a twin with rectifiers
    mlps = [name for name, module in modules.items() if isinstance(module, AnalogueMLP)]
    analogue = {f"{name}.{part}" for name in mlps for part in ("fc1", "fc2")}
    found = set()
    for name, module in modules.items():
        if isinstance(module, Synapse) and name not in analogue:
            found.add(f"{name}.conv.weight")
        elif isinstance(module, Recurrence):
            kinds = ("ih", "hh") if isinstance(module, SpikingRecurrence) else ("ih",)
            found |= {f"{name}.weight_{kind}_l0{way}" for kind in kinds for way in ("", "_reverse")}
        elif isinstance(module, SpikingLayer):
            found.add(f"{name}.weight")
    return found


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}


def _in_8_bits(source: Source) -> dict[str, Tensor]:
    """Synapses as integers with their scales, other matrices in float16, vectors (norms, decays, thresholds) as is."""
    network, state, made = source.network, _state(source.network), {}
    names = synapses(network)
    if not names:
        raise ConfigurationError(f"int8 is for weights that meet spikes, and {source.name} has none: give float16")
    for name, module in network.named_modules():
        if isinstance(module, SpikingLayer):  # integers are added up, so that what a spike stands for goes into them
            state[f"{name}.weight"] = module.scaled_weight().detach()
            state[f"{name}.neuron.log_scale"] = torch.zeros_like(module.neuron.log_scale)
    for name, value in state.items():
        if name in names:
            made[name], made[name + SCALE] = quantised(value)
        else:
            made[name] = value.half() if value.is_floating_point() and value.dim() > 1 else value
    return made


def _digest(state: Mapping[str, Tensor]) -> str:
    """Hash of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write the weights of a network.

    Args:
        source: The network.
        file: The file.
        shape: Not used; every format takes the same arguments.
        dtype: ``"float32"``, ``"float16"`` for all, or ``"int8"`` for synapses and float16 for analogue matrices.

    Raises:
        ConfigurationError: If a weight is not finite or beyond float16, or nothing receives spikes in int8.
    """
    state = _state(source.network)
    for name, value in state.items():
        if not value.isfinite().all():
            raise ConfigurationError(f"{name} of {source.name} has values that are not finite")
    if dtype == "int8":
        state = _in_8_bits(source)
    elif dtype == "float16":
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise ConfigurationError(f"{name} of {source.name} has values beyond float16")
    facts = source.facts() | {"arguments": json.dumps(dict(source.arguments)), "dtype": dtype}
    file.write_bytes(safetensors.torch.save(state, {"format": "pt", "sha256": _digest(state), **facts}))


def load_weights(file: str | Path) -> nn.Module:
    """Rebuild the network of a file of weights, in evaluation mode and float32.

    Args:
        file: A file of the format ``weights``, whatever its type.

    Raises:
        ConfigurationError: If it is no such file, is damaged, has a scale that is not a finite number above 0, or its
            weights are not those of the network that it names.
    """
    path = Path(file)
    try:
        with safetensors.safe_open(path, "pt") as opened:
            facts = opened.metadata() or {}
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigurationError(f"{str(path)!r} is not a safetensors file: {error}") from error
    try:
        architecture, expected, arguments = facts["architecture"], facts["sha256"], json.loads(facts["arguments"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r} does not say what network it is of: give a file of lightning-msnn export --to weights"
        ) from error
    state = dequantised(stored, repr(str(path)))
    if _digest(stored) != expected:
        raise ConfigurationError(f"{str(path)!r} is damaged: its weights are not those that were written")
    if not timm.is_model(architecture) or not is_ours(architecture) or not isinstance(arguments, dict):
        raise ConfigurationError(
            f"{str(path)!r} is of network {architecture!r}, which is refused: allowed are "
            f"{', '.join(timm.list_models('msnn*'))} and networks of modules that you have imported"
        )
    check_arguments(arguments, own_arguments(architecture), repr(str(path)), state)
    try:
        network = create_with(architecture, arguments, state)
    except Exception as error:  # whatever the values in a file make torch raise
        reason = brief(error)
        raise ConfigurationError(f"{str(path)!r} does not fit network {architecture!r}: {reason}") from error
    return network.eval()


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a file of weights, a function from images to logits."""
    network: Callable[[Tensor], Tensor] = load_weights(file)
    return network
