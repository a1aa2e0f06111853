"""The scans over windows: how a membrane carries what it saw from window to window.

Synaptic currents do not depend on the other windows of their own layer, so they are computed for all windows at once,
before the scan; what is left to do in order is element-wise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["coupled_scan", "leak", "recurrent_scan", "scan"]


def scan(currents: list[Tensor], tau: Tensor) -> list[Tensor]:
    """Layer 1: ``u_k = tau u_(k-1) + I_k``, ``u_0 = 0`` (arXiv 2401.10843).

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


def coupled_scan(
    currents: list[Tensor], first: list[Tensor], tau: Tensor, omega: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Layer 2: ``u2_k = tau Omega(u1_(k-1), u2_(k-1)) + I2_k``, ``u2_1 = I2_1`` (arXiv 2401.10843).

    Args:
        currents: Synaptic currents ``I2_k`` of the windows in order, each ``(B, C, h, w)``.
        first: Membranes ``u1_k`` of layer 1, shapes of ``currents``.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        omega: The projection, a function of the two membranes.

    Returns:
        Membranes ``u2_k`` of the windows, shapes of ``currents``.
    """
    membranes = [currents[0]]
    for current, before in zip(currents[1:], first, strict=False):
        membranes.append(current + tau * omega(before, membranes[-1]))
    return membranes


def recurrent_scan(
    currents: list[Tensor], before: list[Tensor], tau: Tensor, omega: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Recurrent networks: a membrane map that travels from block to block (arXiv 2401.10843).

    ``m'_1 = tau Omega(m_1, m_2) + I_1``, ``m'_2 = tau Omega(m'_1, m_2) + I_2``,
    ``m'_3 = tau Omega(m_3, m'_2) + I_3``, ``m'_4 = tau Omega(m_4, m'_3) + I_4``.

    Args:
        currents: Synaptic currents ``I_k`` of the four windows in order, each ``(B, C, h, w)``.
        before: Windows ``m_k`` of the membrane map that the block received, shapes of ``currents``.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        omega: The projection, a function of the two membranes.

    Returns:
        New membranes ``m'_k`` of the windows, shapes of ``currents``.
    """
    first = currents[0] + tau * omega(before[0], before[1])
    second = currents[1] + tau * omega(first, before[1])
    third = currents[2] + tau * omega(before[2], second)
    fourth = currents[3] + tau * omega(before[3], third)
    return [first, second, third, fourth]


def leak(membranes: list[Tensor], spikes: list[Tensor], tau: Tensor) -> Tensor:
    """What each membrane hands to the next time step: ``tau u (1 - s)``, the leak and reset of the standard LIF.

    Args:
        membranes: Membranes ``u_k`` of the windows in order, each ``(B, C, h, w)``.
        spikes: Spikes ``s_k`` of the same windows.
        tau: Decay, a scalar or ``(C, 1, 1)``.

    Returns:
        The membranes less what fired and leaked, ``(windows, B, C, h, w)``.
    """
    return torch.stack([tau * u * (1.0 - s) for u, s in zip(membranes, spikes, strict=True)])
