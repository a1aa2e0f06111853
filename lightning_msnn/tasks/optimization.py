"""Parameter groups and learning rate schedules."""

from __future__ import annotations

from typing import Any, Literal

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

__all__ = ["SCHEDULES", "make_schedule", "named_groups"]

SCHEDULES = ("cosine", "one_cycle", "constant")
"""Learning rate schedules by the name that configurations use; all change the rate at each step."""

LONGEST_WARMUP = 0.3  # of the training


def named_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return timm's parameter groups of a network, with names in the place of the parameters.

    Vectors and scalars (norms, biases, tau, theta) have no weight decay, nor has what the network's own
    ``no_weight_decay()`` names. Names survive FSDP, which makes vectors of all parameters: groups made after that would
    spare all of them.

    Args:
        network: The network, before a strategy shards its parameters; those that do not learn are left out.
        weight_decay: Weight decay of the parameters that are not spared.

    Returns:
        Groups with ``params`` (names) and ``weight_decay``; the group that decays comes first.
    """
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    named = [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]
    return sorted((group for group in named if group["params"]), key=lambda group: -group["weight_decay"])


def make_schedule(
    optimizer: Optimizer, name: Literal["cosine", "one_cycle"], total: int, epoch: float, warmup_epochs: float
) -> LRScheduler:
    """Return a schedule over a whole training.

    Args:
        optimizer: The optimizer, with its peak rates.
        name: ``"cosine"``, after a linear warm-up, or ``"one_cycle"``.
        total: Steps of the training.
        epoch: Steps of an epoch, infinite for data without a length.
        warmup_epochs: Length of the warm-up, or of one-cycle's rise; at most 30 % of the training.
    """
    share = min(LONGEST_WARMUP, warmup_epochs * max(1.0, epoch) / max(1, total)) if warmup_epochs else 0.0
    if name == "one_cycle":
        rise = min(max(share, 1.5 / total), 0.99)  # OneCycleLR divides by the length of the rise
        rates = [group["lr"] for group in optimizer.param_groups]
        cycled = bool({"momentum", "betas"} & optimizer.defaults.keys())
        return OneCycleLR(optimizer, rates, total + 1, pct_start=rise, cycle_momentum=cycled)
    steps = round(share * total)
    cosine = CosineAnnealingLR(optimizer, max(1, total - steps))
    if not steps:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (steps + 1), total_iters=steps), cosine], [steps])
