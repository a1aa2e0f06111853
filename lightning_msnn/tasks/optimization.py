"""Parameter groups, Muon, and learning rate schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from timm.optim.muon import _COEFFICIENTS, MUON_EPS, _is_suitable_for_muon, get_lr_scale, zeropower_via_newtonschulz
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

__all__ = ["SCHEDULES", "Muon", "make_schedule", "named_groups"]

SCHEDULES = ("cosine", "one_cycle", "triangle", "constant")
"""Learning rate schedules by the name that configurations use; all change the rate at each step."""

LONGEST_WARMUP = 0.3  # of the training


def named_groups(network: nn.Module, weight_decay: float, optimizer: str = "adamw") -> list[dict[str, Any]]:
    """Return timm's parameter groups of a network, with names in the place of the parameters.

    Vectors and scalars (norms, biases, tau, theta) and what the network's own ``no_weight_decay()`` names get no weight
    decay. Groups hold names, because FSDP makes vectors of all parameters: grouped after that, none would decay.

    Args:
        network: The network, before a strategy shards its parameters; those that do not learn are left out.
        weight_decay: Weight decay of the parameters that are not spared.
        optimizer: For ``"muon"`` groups say whether they are ``orthogonal``: filters and matrices are, but for the
            read-out's; vectors, depthwise filters and embeddings are not.

    Returns:
        Groups with ``params`` (names) and ``weight_decay``; those that decay come first.
    """
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared)
    parameters = dict(network.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    named = [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]
    if optimizer == "muon":
        head = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
        taken = {name for name, p in parameters.items() if _is_suitable_for_muon(p) and not name.startswith(head)}
        both = [(group, orthogonal) for group in named for orthogonal in (True, False)]
        named = [{**g, "params": [n for n in g["params"] if (n in taken) == o], "orthogonal": o} for g, o in both]
    return sorted((group for group in named if group["params"]), key=lambda group: -group["weight_decay"])


class Muon(AdamW):
    """Muon for the filters and matrices of groups that are ``orthogonal``, AdamW for the others, at one rate.

    Momentum, as a matrix ``(out, in h w)`` for each filter, is made orthogonal by five Newton-Schulz steps (K. Jordan,
    https://kellerjordan.github.io/posts/muon) and scaled to the size of AdamW's steps (arXiv 2502.16982). timm's
    ``muon`` does the same in bfloat16, which takes several times as long on a processor without units for it: that one
    uses float32 here.

    Args:
        groups: Groups of :func:`named_groups`, with parameters in the place of names.
        lr: Learning rate.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.02) -> None:
        super().__init__(groups, lr, betas=(0.9, 0.95), eps=MUON_EPS)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None  # first: it zeroes the gradients of all groups
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = everything
        units = torch.cpu.get_capabilities()
        of_cpu = torch.bfloat16 if any(map(units.get, ("amx_bf16", "avx512_bf16", "bf16"))) else torch.float32
        for group in (group for group in everything if group["orthogonal"]):
            for filters in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[filters]):
                    state["momentum_buffer"] = torch.zeros_like(filters)
                    state["step"] = torch.zeros(())  # AdamW looks for one when it loads a state
                momentum = state["momentum_buffer"].lerp_(filters.grad, 0.1).flatten(1)
                dtype = of_cpu if momentum.device.type == "cpu" else torch.bfloat16
                step = zeropower_via_newtonschulz(momentum, 5, _COEFFICIENTS["quintic"], dtype=dtype)
                filters.mul_(1 - group["lr"] * group["weight_decay"])
                filters.add_(step.view_as(filters), alpha=-group["lr"] * get_lr_scale(step.shape))
        return loss


def make_schedule(optimizer: Optimizer, name: str, total: int, epoch: float, warmup_epochs: float) -> LRScheduler:
    """Return a schedule over a whole training.

    Args:
        optimizer: The optimizer, with its peak rates.
        name: ``"cosine"``, after a linear warm-up, ``"one_cycle"``, or ``"triangle"``: from 0.2 of the peak, up over
            23 % of the training, down in a line to 0.07 (K. Jordan, arXiv 2404.00498).
        total: Steps of the training.
        epoch: Steps of an epoch, infinite for data without a length.
        warmup_epochs: Length of the warm-up, or of one-cycle's rise; at most 30 % of the training.
    """
    if name == "triangle":
        return LambdaLR(optimizer, lambda step: float(np.interp(step / total, (0.0, 0.23, 1.0), (0.2, 1.0, 0.07))))
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
