"""Membranes: how they travel over windows and time, and the two forms of a layer (arXiv 2401.10843).

Synaptic currents do not depend on the other windows of their own layer, so they are computed for all windows at once,
before the scan; what is left to do in order is element-wise. This is the reference that the kernels are tested against,
and what a layer runs on that no kernel covers.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["coupled_scan", "hard_reset", "isolated", "over_time", "recurrent_scan", "scan", "shared", "soft_reset"]

Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")
Omega = Callable[[Tensor, Tensor], Tensor]
Carry = Callable[[list[Tensor]], list[Tensor]]
Fire = Callable[[Tensor], Tensor]


def scan(currents: list[Tensor], tau: Tensor) -> list[Tensor]:
    """Layer 1: ``u_k = tau u_(k-1) + I_k``, ``u_0 = 0``.

    Args:
        currents: Synaptic currents ``I_k`` of the windows in order, each ``(B, C, h, w)``.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.

    Returns:
        Membranes ``u_k`` of the windows, shapes of ``currents``.
    """
    membranes = [currents[0]]
    for current in currents[1:]:
        membranes.append(current + tau * membranes[-1])
    return membranes


def coupled_scan(currents: list[Tensor], first: list[Tensor], tau: Tensor, omega: Omega) -> list[Tensor]:
    """Layer 2: ``u2_k = tau Omega(u1_(k-1), u2_(k-1)) + I2_k``, ``u2_1 = I2_1``.

    Args:
        currents: Synaptic currents ``I2_k`` of the windows in order, each ``(B, C, h, w)``.
        first: Membranes ``u1_k`` of layer 1, shapes of ``currents``; the last is not read.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        omega: The projection, a function of the two membranes.

    Returns:
        Membranes ``u2_k`` of the windows, shapes of ``currents``.
    """
    membranes = [currents[0]]
    for current, before in zip(currents[1:], first, strict=False):
        membranes.append(current + tau * omega(before, membranes[-1]))
    return membranes


def recurrent_scan(currents: list[Tensor], before: list[Tensor], tau: Tensor, omega: Omega) -> list[Tensor]:
    """Recurrent networks: a membrane map that travels from block to block.

    ``m'_1 = tau Omega(m_1, m_2) + I_1``, ``m'_2 = tau Omega(m'_1, m_2) + I_2``, and from the third window on
    ``m'_k = tau Omega(m_k, m'_(k-1)) + I_k``.

    Args:
        currents: Synaptic currents ``I_k`` of the windows in order, two or more, each ``(B, C, h, w)``.
        before: Windows ``m_k`` of the membrane map that the block received, shapes of ``currents``.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        omega: The projection, a function of the two membranes.

    Returns:
        New membranes ``m'_k`` of the windows, shapes of ``currents``.
    """
    membranes = [currents[0] + tau * omega(before[0], before[1])]
    membranes.append(currents[1] + tau * omega(membranes[0], before[1]))
    for current, received in zip(currents[2:], before[2:], strict=True):
        membranes.append(current + tau * omega(received, membranes[-1]))
    return membranes


def shared(
    currents: list[Tensor], carry: Carry, merge: Callable[[list[Tensor]], Tensor], fire: Fire
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A layer with shared context: ``u = carry(I)``, ``s = H(merge(u) - V)``.

    Args:
        currents: Currents of the windows in order, ``I_k = cut_k(I)``, each ``(B, C, h, w)``.
        carry: One of the scans, a function of the currents.
        merge: Puts windows back on the map, see :func:`lightning_msnn.functional.merge`.
        fire: Spikes of a membrane.

    Returns:
        Spikes and the merged membrane, both ``(B, C, H, W)``, and the membranes ``u_k`` of the windows.
    """
    membranes = carry(currents)
    merged = merge(membranes)
    return fire(merged), merged, membranes


def isolated(currents: list[Tensor], carry: Carry, fire: Fire) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A layer with isolated context, as published: ``u = carry(I)``, ``s_k = H(u_k - V)``.

    Args:
        currents: Currents of the windows in order, each ``(B, C, h, w)``.
        carry: One of the scans, a function of the currents.
        fire: Spikes of a membrane.

    Returns:
        Spikes and membranes of the windows as a batch, both ``(n B, C, h, w)``, and the membranes ``u_k`` of each.
    """
    membranes = carry(currents)
    batch = torch.cat(membranes)
    return fire(batch), batch, membranes


def hard_reset(membrane: Tensor, spikes: Tensor, threshold: Tensor | float, tau: Tensor | float) -> Tensor:
    """What a membrane hands to the next time step: ``tau_t u (1 - s)``, the leak and reset of the standard LIF.

    Args:
        membrane: Membrane ``u``, any shape.
        spikes: Its spikes ``s``, shape of ``membrane``.
        threshold: Threshold ``V``, not used.
        tau: Decay ``tau_t`` over time, a number, a scalar, or ``(C, 1, 1)``.
    """
    return tau * membrane * (1.0 - spikes)


def soft_reset(membrane: Tensor, spikes: Tensor, threshold: Tensor | float, tau: Tensor | float) -> Tensor:
    """What a membrane hands to the next time step if a spike takes the threshold away: ``tau_t (u - V s)``.

    What exceeded the threshold is kept (Rueckauer et al., *Conversion of Continuous-Valued Deep Networks to Efficient
    Event-Driven Networks for Image Classification*, Frontiers in Neuroscience 2017).

    Args:
        membrane: Membrane ``u``, any shape.
        spikes: Its spikes ``s``, shape of ``membrane``.
        threshold: Threshold ``V``, a number or a tensor that fits the membrane.
        tau: Decay ``tau_t`` over time, a number, a scalar, or ``(C, 1, 1)``.
    """
    return tau * (membrane - threshold * spikes)


def over_time(
    step: Callable[[Inputs, Tensor | None], tuple[Outputs, Tensor]], inputs: Sequence[Inputs], before: Tensor | None
) -> tuple[list[Outputs], Tensor]:
    """Scan a layer over time: each step adds to its currents what its membranes kept of the step before.

    Args:
        step: One step, a function of its inputs and of what the step before handed on, which returns what the layer
            returns and what it hands on.
        inputs: Inputs of each step, at least one.
        before: What a step before these handed on, None for the first.

    Returns:
        What each step returned, and what the last handed on.
    """
    made = []
    for now in inputs:
        returned, before = step(now, before)
        made.append(returned)
    assert before is not None
    return made, before
