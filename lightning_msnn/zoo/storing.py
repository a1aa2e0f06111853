"""Weights of a network as a file keeps them: in 32 or 16 bits, or synapses in 8.

A spike is 0 or 1, so a synapse adds up the weights that spikes meet. In 8 bits they are integers, whose sum is exact;
it is multiplied once by the scale of its output channel. There is nothing to calibrate.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_msnn.entries import SCALE
from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.nn.integer import quantised

__all__ = ["DTYPES", "stored", "synapses"]

DTYPES = ("float32", "float16", "int8")
"""Types of weights in files: ``"float16"`` is for all, ``"int8"`` for synapses beside float16 for other matrices."""


def synapses(network: nn.Module) -> set[str]:
    """Return the names of the weights that meet spikes, or what stands for spikes in a ReLU baseline.

    Each module names its own in ``spike_weights``.

    Args:
        network: A network of this package, converted ones included.
    """
    named = network.named_modules()
    return {f"{name}.{weight}" for name, module in named for weight in getattr(module, "spike_weights", ())}


def stored(network: nn.Module, dtype: str, source: str) -> dict[str, Tensor]:
    """Return the weights of a network as a file keeps them; :func:`lightning_msnn.entries.dequantised` reads them.

    In 8 bits, the value that a spike of a converted network stands for goes into the weights: its neurons can no longer
    anneal from rectifiers, nor be turned back into them.

    Args:
        network: The network, in float32.
        dtype: One of :data:`DTYPES`.
        source: Where the network is from, for messages.

    Raises:
        ConfigurationError: If there is no such type, a weight is not finite or beyond the type, or int8 is asked for
            and nothing receives spikes.
    """
    choose(dict.fromkeys(DTYPES), dtype, "type of weights")
    state = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    if dtype == "float16":
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    elif dtype == "int8":
        state = _in_8_bits(network, state, source)
    for name, value in state.items():
        if not value.isfinite().all():
            raise ConfigurationError(f"{name} of {source} has values that are not finite in {value.dtype}")
    return state


def _in_8_bits(network: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Synapses as integers with their scales, other matrices in float16, vectors (norms, decays, thresholds) as is."""
    names, made = synapses(network), {}
    if not names:
        raise ConfigurationError(f"int8 is for weights that meet spikes, and {source} has none: give float16")
    for name, module in network.named_modules():
        if hasattr(module, "scaled_weight"):  # of a converted network
            state[f"{name}.weight"] = module.scaled_weight().detach()
            state[f"{name}.neuron.log_scale"].zero_()
    for name, value in state.items():
        if name in names:
            made[name], made[name + SCALE] = quantised(value)
        else:
            made[name] = value.half() if value.is_floating_point() and value.dim() > 1 else value
    return made
