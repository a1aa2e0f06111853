"""The scans over windows: how a membrane carries what it saw from window to window.

Synaptic currents do not depend on the other windows of their own layer, so they are computed for all windows at once,
before the scan; what is left to do in order is element-wise.
"""

from collections.abc import Callable

from torch import Tensor

__all__ = ["coupled_scan", "scan"]


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
