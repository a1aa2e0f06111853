"""Spike rates from the weights of a network alone: see ``docs/rates.md``.

Batch norm gives the current of a channel the mean ``beta`` and the deviation ``|gamma|``. A current sums many spikes,
so it is nearly normal, and it reaches the threshold ``V`` with the probability ``Q((V - beta) / |gamma|)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.neuron import Spike

__all__ = ["predict_rates"]

_FEWEST = 8  # channels, for the signs of their means to say anything


def _tail_of_counts(norm: Any, above: Tensor) -> Tensor:
    """Probability that a gamma distribution with a norm's running statistics lies ``above`` times the norm's scale."""
    mean, var = norm.running_mean.double(), norm.running_var.double().clamp(min=1e-12)
    scale = norm.weight.double() / (var + norm.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-12, 1e-12, scale)
    # The density of many counts is infinite at 0.
    count = ((mean + above / scale) * mean / var).clamp(min=1e-6)
    tail = torch.special.gammaincc(mean.square() / var, count)
    return torch.where(scale > 0, tail, 1.0 - tail)


@torch.no_grad()
def predict_rates(network: nn.Module) -> dict[str, Tensor]:
    """Predict the spike rate of each channel from the weights of a network alone.

    Where all running means of a norm are positive, as for attention, which counts coincident spikes, the current has
    a gamma distribution in the place of the normal one.

    Args:
        network: A network whose layers of neurons have batch norm that is not folded.

    Returns:
        Rates in [0, 1], float64, ``(C,)``, by the name of the layer of neurons.

    Raises:
        ConfigurationError: If a layer of neurons has no batch norm; the message names it.

    Examples:
        >>> import timm
        >>> from lightning_msnn.energy import predict_rates
        >>> rates = predict_rates(timm.create_model("msnn_resnet12_tiny", num_classes=10))
        >>> round(rates["stages.0.blocks.0.encoder1.spike"][0].item(), 4)  # Q(0.5)
        0.3085
    """
    rates = {}
    for parent, module in network.named_modules():
        norm: Any = None  # of the current: the last one before the neurons
        for name, child in module.named_children():
            own = getattr(child, "norm", child)
            norm = own if isinstance(own, nn.modules.batchnorm._BatchNorm) else norm
            if not isinstance(child, Spike):
                continue
            layer = f"{parent}.{name}" if parent else name
            if norm is None or norm.weight is None:
                raise ConfigurationError(
                    f"{layer} has no batch norm with scale and shift before its threshold, so its rate cannot be "
                    "predicted: give a network with norm=True that is not folded or converted, or measure the rate"
                )
            level = child.threshold if child.level is None else child.level.double()
            above, mean = level - norm.bias.double(), norm.running_mean
            if mean is not None and norm.num_features >= _FEWEST and bool((mean > 0).all()):
                rates[layer] = _tail_of_counts(norm, above)
            else:
                rates[layer] = torch.special.ndtr(-above / norm.weight.double().abs().clamp(min=1e-12))
    if not rates:
        raise ConfigurationError(f"{type(network).__name__} has no layer of neurons, so it has no spike rates")
    return rates
