"""The scans over windows as one operation each, with hand-written backward passes.

They compute what :func:`~lightning_msnn.functional.split`, :func:`~lightning_msnn.functional.scan` or
:func:`~lightning_msnn.functional.coupled_scan`, and :func:`~lightning_msnn.functional.merge` compute one after another,
but write each membrane straight to its place on the map and keep nothing for the backward pass but membranes. Where
windows are a partition, a scan is a single pass over the map. They have no second derivative.

Where windows overlap, the mean over them is folded into weights: with ``u_k = tau u_(k-1) + I_k`` and ``w_k`` one over
the number of windows that cover a pixel, ``merge(u) = I + sum_k w_k tau u_(k-1)``, since the ``w_k I_k`` of a pixel add
up to its ``I``.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_msnn.functional.projection import sine
from lightning_msnn.functional.windows import count, side, split

__all__ = ["BATCH", "can_fuse", "merged_coupled_scan", "merged_scan"]

BATCH = "batch"
"""Windows that lie one after another on the batch axis, ``(4 B, C, h, w)``, and are merged by no one."""

Omega = Callable[[Tensor, Tensor, Tensor], Tensor]


def can_fuse(kind: str, height: int, width: int) -> bool:
    """Whether the fused scans cover windows of this kind on a map of this size.

    Args:
        kind: One of :data:`lightning_msnn.functional.WINDOWS`, or :data:`BATCH`.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
    """
    if kind == BATCH:
        return True
    # An odd map has to be padded for grid windows.
    return count(kind, height, width) == 4 and not (kind == "grid" and (height % 2 or width % 2))


def _partitions(kind: str, height: int, width: int) -> bool:
    return kind in (BATCH, "grid") or (2 * side(kind, height) == height and 2 * side(kind, width) == width)


def _views(x: Tensor, kind: str) -> list[Tensor]:
    """The four windows of a map, as views."""
    return list(x.unflatten(0, (4, -1)).unbind(0)) if kind == BATCH else split(x, kind)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=64)
def _shares(kind: str, height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """One over the number of windows that cover each pixel, cut into the windows, each ``(h, w)``."""
    covered = torch.zeros(1, 1, height, width)
    for window in split(covered, kind):
        window += 1.0
    return tuple(s[0, 0].to(device, dtype, copy=True) for s in split(1.0 / covered, kind))


def _sum_to(x: Tensor, parameter: Tensor) -> Tensor:
    """Sum the gradient of a decay or a theta over all that shares it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.sum(dtype=wide) if parameter.numel() == 1 else x.sum((0, 2, 3), dtype=wide)
    return total.reshape(parameter.shape).to(parameter.dtype)


def _vjp(
    omega: Omega, a: Tensor, b: Tensor, theta: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A projection's value and the gradients of its arguments, given that of its value; None stands for zero."""
    if omega is sine:
        c = (math.pi * theta).to(a.dtype)
        angle = b * c
        cosine, slope = torch.cos(angle), torch.sin(angle)
        inner = cosine * a * c
        outer = torch.cos(inner).mul_(grad).mul_(2.0)  # gradient of inner
        by_theta = None
        if theta.requires_grad:
            by_theta = _sum_to((cosine - angle * slope).mul_(a).mul_(outer).mul_(math.pi), theta)
        by_b = slope.mul_(a).mul_(outer).mul_(-c * c)
        by_a = outer.mul_(cosine).mul_(c)
        return torch.sin(inner).mul_(2.0), by_a, by_b, by_theta
    with torch.enable_grad():
        inputs = [a.detach().requires_grad_(), b.detach().requires_grad_()]
        moving = theta.requires_grad
        radian = theta.detach().requires_grad_(moving)
        value = omega(inputs[0], inputs[1], radian)
        wanted = [*inputs, radian] if moving else inputs
        grads = torch.autograd.grad(value, wanted, grad, allow_unused=True)
    return value.detach(), grads[0], grads[1], grads[2] if moving else None


class _Scan(torch.autograd.Function):
    """Layer 1 over a partition: the currents' map in, the membranes' map out."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, tau: Tensor, kind: str) -> Tensor:
        membrane = torch.empty_like(current)
        decay = tau.to(current.dtype)
        i, u = _views(current, kind), _views(membrane, kind)
        u[0].copy_(i[0])
        for k in range(1, 4):
            torch.addcmul(i[k], u[k - 1], decay, out=u[k])
        ctx.save_for_backward(membrane, tau)
        ctx.kind = kind
        return membrane

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        membrane, tau = ctx.saved_tensors
        decay = tau.to(grad.dtype)
        by_current = torch.empty_like(grad)
        g, d, u = (_views(x, ctx.kind) for x in (grad, by_current, membrane))
        d[3].copy_(g[3])
        for k in range(2, -1, -1):
            torch.addcmul(g[k], d[k + 1], decay, out=d[k])
        by_tau: Tensor | None = None
        if ctx.needs_input_grad[1]:
            by_tau = torch.stack([_sum_to(d[k] * u[k - 1], tau) for k in range(1, 4)]).sum(0)
        return by_current, by_tau, None


class _CoupledScan(torch.autograd.Function):
    """Layer 2 over a partition: the currents' map and the membranes' map of layer 1 in, the membranes' map out."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: Omega, kind: str
    ) -> Tensor:
        membrane = torch.empty_like(current)
        decay = tau.to(current.dtype)
        i, a, u = (_views(x, kind) for x in (current, first, membrane))
        u[0].copy_(i[0])
        for k in range(1, 4):
            torch.addcmul(i[k], omega(a[k - 1], u[k - 1], theta), decay, out=u[k])
        ctx.save_for_backward(membrane, first, tau, theta)
        ctx.omega, ctx.kind = omega, kind
        return membrane

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        membrane, first, tau, theta = ctx.saved_tensors
        decay = tau.to(grad.dtype)
        by_current, by_first = grad.clone(), torch.empty_like(first)
        d, f, a, u = (_views(x, ctx.kind) for x in (by_current, by_first, first, membrane))
        f[3].zero_()
        by_tau, by_theta = _backward_through_windows(d, f, a, u, tau, decay, theta, ctx)
        return by_current, by_first, by_tau, by_theta, None, None


def _backward_through_windows(
    d: list[Tensor],
    f: list[Tensor],
    a: list[Tensor],
    u: list[Tensor],
    tau: Tensor,
    decay: Tensor,
    theta: Tensor,
    ctx: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Take the gradients of layer 2's membranes from the last window to the first.

    Args:
        d: Gradients of layer 2's membranes by window, to which those that come through later windows are added.
        f: Where the gradients of layer 1's membranes in the first three windows are written.
        a: Membranes of layer 1.
        u: Membranes of layer 2.
        tau: The decay.
        decay: The decay in the data type of the membranes.
        theta: The radian factor.
        ctx: The operation's context.

    Returns:
        Gradients of tau and theta, None where they are not needed.
    """
    by_tau: Tensor | None = None
    by_theta: Tensor | None = None
    for k in range(3, 0, -1):
        value, by_a, by_b, moved = _vjp(ctx.omega, a[k - 1], u[k - 1], theta, d[k] * decay)
        if by_a is None:
            f[k - 1].zero_()
        else:
            f[k - 1].copy_(by_a)
        if by_b is not None:
            d[k - 1].add_(by_b)
        if ctx.needs_input_grad[2]:
            share = _sum_to(value.mul_(d[k]), tau)
            by_tau = share if by_tau is None else by_tau + share
        if moved is not None:
            by_theta = moved if by_theta is None else by_theta + moved
    return by_tau, by_theta


def _buffer(x: Tensor, windows: int, h: int, w: int) -> Tensor:
    """Uninitialised windows ``(windows, B, C, h, w)``, each in the memory order of ``x``."""
    batch, channels = x.shape[:2]
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.new_empty(windows, batch, h, w, channels).permute(0, 1, 4, 2, 3)
    return x.new_empty(windows, batch, channels, h, w)


class _OverlappingScan(torch.autograd.Function):
    """Layer 1 over windows that overlap: the merged map, and the first three windows' own membranes."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, tau: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        height, width = current.shape[2:]
        decay = tau.to(current.dtype)
        merged = current.clone()
        i, m = split(current, kind), split(merged, kind)
        shares = _shares(kind, height, width, current.dtype, current.device)
        u = _buffer(current, 3, *i[0].shape[2:])
        u[0].copy_(i[0])
        for k in range(1, 4):
            m[k].addcmul_(u[k - 1], decay * shares[k])
            if k < 3:
                torch.addcmul(i[k], u[k - 1], decay, out=u[k])
        ctx.save_for_backward(u, tau)
        ctx.kind = kind
        return merged, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, by_u: Tensor) -> tuple[Tensor, Tensor | None, None]:
        u, tau = ctx.saved_tensors
        height, width = grad.shape[2:]
        decay = tau.to(grad.dtype)
        shares = _shares(ctx.kind, height, width, grad.dtype, grad.device)
        g = split(grad, ctx.kind)
        by_current = grad.clone()
        c = split(by_current, ctx.kind)
        by_tau = None
        d = g[3] * shares[3]
        for k in range(3, 0, -1):
            if ctx.needs_input_grad[1]:
                share = _sum_to(d * u[k - 1], tau)
                by_tau = share if by_tau is None else by_tau + share
            # What window k-1 is owed beyond its share of the merged map's gradient, which is in the map already.
            owed = torch.addcmul(by_u[k - 1], d, decay)
            c[k - 1].add_(owed)
            if k > 1:
                d = owed.addcmul_(g[k - 1], shares[k - 1])
        return by_current, by_tau, None


class _OverlappingCoupledScan(torch.autograd.Function):
    """Layer 2 over windows that overlap: the merged map."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: Omega, kind: str
    ) -> Tensor:
        height, width = current.shape[2:]
        decay = tau.to(current.dtype)
        merged = current.clone()
        i, m = split(current, kind), split(merged, kind)
        shares = _shares(kind, height, width, current.dtype, current.device)
        u = _buffer(current, 3, *i[0].shape[2:])
        u[0].copy_(i[0])
        for k in range(1, 4):
            value = omega(first[k - 1], u[k - 1], theta)
            m[k].addcmul_(value, decay * shares[k])
            if k < 3:
                torch.addcmul(i[k], value, decay, out=u[k])
        ctx.save_for_backward(u, first, tau, theta)
        ctx.omega, ctx.kind = omega, kind
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        u, first, tau, theta = ctx.saved_tensors
        height, width = grad.shape[2:]
        decay = tau.to(grad.dtype)
        shares = _shares(ctx.kind, height, width, grad.dtype, grad.device)
        g = split(grad, ctx.kind)
        owed = _buffer(grad, 4, *g[0].shape[2:])
        for k in range(4):
            torch.mul(g[k], shares[k], out=owed[k])
        by_first = torch.empty_like(first)
        d = list(owed.unbind(0))
        by_tau, by_theta = _backward_through_windows(
            d, list(by_first.unbind(0)), list(first.unbind(0)), list(u.unbind(0)), tau, decay, theta, ctx
        )
        by_current = torch.zeros_like(grad)
        for c, gradient in zip(split(by_current, ctx.kind), d, strict=True):
            c.add_(gradient)
        return by_current, by_first, by_tau, by_theta, None, None


def merged_scan(current: Tensor, tau: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Layer 1 on a map: cut into windows, scan, merge.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        kind: Kind of windows, which :func:`can_fuse`.

    Returns:
        The merged membrane, shape of ``current``, and the windows' own membranes as :func:`merged_coupled_scan` takes
        them: the same map where windows are a partition, else ``(3, B, C, h, w)``, since no one asks for the last.
    """
    merged: Tensor
    windows: Tensor
    if _partitions(kind, current.shape[2], current.shape[3]):
        merged = _Scan.apply(current, tau, kind)  # type: ignore[no-untyped-call]
        return merged, merged
    merged, windows = _OverlappingScan.apply(current, tau, kind)  # type: ignore[no-untyped-call]
    return merged, windows


def merged_coupled_scan(current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: Omega, kind: str) -> Tensor:
    """Layer 2 on a map: cut into windows, scan, merge.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        first: Membranes of layer 1 as :func:`merged_scan` returned them.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        theta: Radian factor of the projection in units of pi, a scalar tensor.
        omega: The projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        kind: Kind of windows, which :func:`can_fuse`.

    Returns:
        The merged membrane, shape of ``current``.
    """
    partition = _partitions(kind, current.shape[2], current.shape[3])
    function = _CoupledScan if partition else _OverlappingCoupledScan
    merged: Tensor = function.apply(current, first, tau, theta, omega, kind)  # type: ignore[no-untyped-call]
    return merged
