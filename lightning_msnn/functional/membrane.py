"""Membranes: how they travel from window to window (arXiv 2401.10843).

Synaptic currents do not depend on the other windows of their own layer, so they are computed for all windows at once,
before the scan; what is left to do in order is element-wise. Kernels are tested against these functions, and a layer
that no kernel covers runs on them.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["connected", "coupled_scan", "recurrent_scan", "scan"]

Omega = Callable[[Tensor, Tensor], Tensor]


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
    """
    membranes = [currents[0] + tau * omega(before[0], before[1])]
    membranes.append(currents[1] + tau * omega(membranes[0], before[1]))
    for current, received in zip(currents[2:], before[2:], strict=True):
        membranes.append(current + tau * omega(received, membranes[-1]))
    return membranes


def connected(current: Tensor, unused: Sequence[Tensor]) -> Tensor:
    """Return a current as it is, with a gradient of 0 to tensors that play no part where a map is one window.

    Data-parallel training stops at a parameter without a gradient.
    """
    return sum((x.flatten()[:0].sum() for x in unused), current)
