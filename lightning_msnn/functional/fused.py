"""The scans over windows as one operation each, with hand-written backward passes.

They compute what :func:`~lightning_msnn.functional.split`, :func:`~lightning_msnn.functional.scan` or
:func:`~lightning_msnn.functional.coupled_scan`, and :func:`~lightning_msnn.functional.merge` compute one after another,
but keep nothing for the backward pass except membranes. Three sets of kernels do the work:
:mod:`~lightning_msnn.functional.triton_scan` on a CUDA device, where Triton is installed,
:mod:`~lightning_msnn.functional.native_scan` on a CPU, where there is a C compiler, and
:mod:`~lightning_msnn.functional.eager_scan` everywhere else. Under ``torch.compile`` each scan is an operator of its
own, so that the compiler need not take the windows apart. They have no second derivative.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_msnn.functional import eager_scan, native_scan
from lightning_msnn.functional.eager_scan import BATCH, map_buffer, shares_of, views, window_buffer
from lightning_msnn.functional.windows import count, merge, side, split

__all__ = [
    "BATCH",
    "batched_recurrent_scan",
    "can_fuse",
    "cut_windows",
    "join_windows",
    "merged_coupled_scan",
    "merged_scan",
    "partitions",
    "scan_and_hand_on",
]

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


def partitions(kind: str, height: int, width: int) -> bool:
    """Whether each pixel of a map that can be fused is in one window only.

    Args:
        kind: Kind of windows.
        height: Height of the map in pixels.
        width: Width of the map in pixels.
    """
    return kind in (BATCH, "grid") or (2 * side(kind, height) == height and 2 * side(kind, width) == width)


@lru_cache(maxsize=1)
def _triton_scan() -> ModuleType | None:
    """The kernels for CUDA, None where Triton is not installed."""
    try:
        from lightning_msnn.functional import triton_scan
    except ImportError:
        return None
    return triton_scan


def _kernels(current: Tensor, omega: str = "sine") -> Any:
    """Choose the kernels for a map and a projection."""
    if current.is_cuda:
        kernels = _triton_scan()
        usable = kernels is not None and current.dtype in kernels.DTYPES
    else:
        kernels, usable = native_scan, native_scan.takes(current)
    return kernels if kernels is not None and usable and omega in kernels.OMEGAS else eager_scan


def _recurrent_kernels(current: Tensor, omega: str) -> Any:
    return eager_scan if current.is_cuda else _kernels(current, omega)


def _partitions(current: Tensor, kind: str) -> bool:
    return partitions(kind, current.shape[2], current.shape[3])


class _Scan(torch.autograd.Function):
    """Layer 1. Where windows are a partition the second output is the first, and is not returned."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, tau: Tensor, kind: str) -> Tensor | tuple[Tensor, Tensor]:
        ctx.kind, ctx.partition = kind, _partitions(current, kind)
        merged, windows = _kernels(current).scan_forward(current, tau, kind, ctx.partition)
        ctx.save_for_backward(windows, tau)
        return merged if ctx.partition else (merged, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        windows, tau = ctx.saved_tensors
        by_windows = None if ctx.partition else grads[1]
        by_current, by_tau = _kernels(grads[0]).scan_backward(
            grads[0], by_windows, windows, tau, ctx.kind, ctx.partition, ctx.needs_input_grad[1]
        )
        return by_current, by_tau, None


class _HandingScan(torch.autograd.Function):
    """Layer 1, which hands the windows' membranes of its last channels on as a batch."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, tau: Tensor, kind: str, channels: int) -> tuple[Tensor, Tensor]:
        ctx.kind, ctx.partition, ctx.channels = kind, _partitions(current, kind), channels
        merged, windows = _kernels(current).scan_forward(current, tau, kind, ctx.partition)
        ctx.save_for_backward(windows, tau)
        parts = views(merged, kind)[:3] if ctx.partition else list(windows.unbind(0))
        batch, _, h, w = parts[0].shape
        handed = map_buffer(current, 4 * batch, channels, h, w)
        for slot, part in zip(views(handed, BATCH), parts, strict=False):
            slot.copy_(part[:, -channels:])
        views(handed, BATCH)[3].zero_()  # no window comes after the last
        return merged, handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        windows, tau = ctx.saved_tensors
        grad, by_windows = grads[0], None
        if ctx.partition:
            grad = grad.clone()
            owed = views(grad, ctx.kind)
        else:
            by_windows = window_buffer(grad, ctx.kind).zero_()
            owed = list(by_windows.unbind(0))
        for k, part in enumerate(views(grads[1], BATCH)[:3]):
            owed[k][:, -ctx.channels :].add_(part)
        by_current, by_tau = _kernels(grad).scan_backward(
            grad, by_windows, windows, tau, ctx.kind, ctx.partition, ctx.needs_input_grad[1]
        )
        return by_current, by_tau, None, None


class _Cut(torch.autograd.Function):
    """A map to its windows as a batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.kind, ctx.shape = kind, x.shape
        return torch.cat(split(x, kind))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        by_map = map_buffer(grads[0], *ctx.shape)
        pairs = zip(views(by_map, ctx.kind), views(grads[0], BATCH), strict=True)
        if _partitions(by_map, ctx.kind):
            for place, part in pairs:
                place.copy_(part)
        else:
            by_map.zero_()
            for place, part in pairs:
                place.add_(part)
        return by_map, None


class _Join(torch.autograd.Function):
    """A batch of windows to their map, the mean where they overlap."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, kind: str, height: int, width: int) -> Tensor:
        ctx.kind, ctx.shape = kind, windows.shape
        joined = map_buffer(windows, windows.shape[0] // 4, windows.shape[1], height, width)
        places, parts = views(joined, kind), views(windows, BATCH)
        if _partitions(joined, kind):
            for place, part in zip(places, parts, strict=True):
                place.copy_(part)
        else:
            joined.zero_()
            for place, part, share in zip(places, parts, shares_of(joined, kind), strict=True):
                place.addcmul_(part, share)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        by_windows = map_buffer(grad, *ctx.shape)
        places, parts = views(grad, ctx.kind), views(by_windows, BATCH)
        if _partitions(grad, ctx.kind):
            for part, place in zip(parts, places, strict=True):
                part.copy_(place)
        else:
            for part, place, share in zip(parts, places, shares_of(grad, ctx.kind), strict=True):
                torch.mul(place, share, out=part)
        return by_windows, None, None, None


class _CoupledScan(torch.autograd.Function):
    """Layer 2."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str) -> Tensor:
        ctx.omega, ctx.kind, ctx.partition = omega, kind, _partitions(current, kind)
        merged, windows = _kernels(current, omega).coupled_forward(
            current, first, tau, theta, omega, kind, ctx.partition
        )
        ctx.save_for_backward(windows, first, tau, theta)
        result: Tensor = merged
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients = _kernels(grad, ctx.omega).coupled_backward(
            grad, *ctx.saved_tensors, ctx.omega, ctx.kind, ctx.partition, *ctx.needs_input_grad[2:4]
        )
        return *gradients, None, None


class _RecurrentScan(torch.autograd.Function):
    """The membrane map of recurrent networks; without a kernel for CUDA, since the cell takes most of the time."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, before: Tensor, tau: Tensor, theta: Tensor, omega: str) -> Tensor:
        ctx.omega = omega
        membranes: Tensor = _recurrent_kernels(current, omega).recurrent_forward(current, before, tau, theta, omega)
        ctx.save_for_backward(membranes, before, tau, theta)
        return membranes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        membranes, before, tau, theta = ctx.saved_tensors
        wants_tau, wants_theta = ctx.needs_input_grad[2:4]
        gradients = _recurrent_kernels(grad, ctx.omega).recurrent_backward(
            grad, membranes, before, tau, theta, ctx.omega, wants_tau, wants_theta
        )
        return *gradients, None


# Operators for torch.compile. What they return must not share memory, hence the empty tensors.


@torch.library.custom_op("lightning_msnn::scan", mutates_args=())
def _scan_op(current: Tensor, tau: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    partition = _partitions(current, kind)
    merged, windows = _kernels(current).scan_forward(current, tau, kind, partition)
    return merged, merged.new_empty(0) if partition else windows


@torch.library.custom_op("lightning_msnn::scan_backward", mutates_args=())
def _scan_backward_op(
    grad: Tensor, by_windows: Tensor, windows: Tensor, tau: Tensor, kind: str, wants_tau: bool
) -> tuple[Tensor, Tensor]:
    partition = _partitions(grad, kind)
    by_current, by_tau = _kernels(grad).scan_backward(
        grad, None if partition else by_windows, windows, tau, kind, partition, wants_tau
    )
    return by_current, torch.zeros_like(tau) if by_tau is None else by_tau


@_scan_backward_op.register_fake
def _(grad: Tensor, by_windows: Tensor, windows: Tensor, tau: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(tau)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    current, tau, ctx.kind = inputs
    merged, windows = output
    ctx.save_for_backward(merged if _partitions(current, ctx.kind) else windows, tau)


def _scan_autograd(ctx: Any, grad: Tensor, by_windows: Tensor) -> tuple[Tensor, Tensor, None]:
    windows, tau = ctx.saved_tensors
    return *_scan_backward_op(grad, by_windows, windows, tau, ctx.kind, ctx.needs_input_grad[1]), None


_scan_op.register_autograd(_scan_autograd, setup_context=_scan_setup)


@torch.library.custom_op("lightning_msnn::coupled_scan", mutates_args=())
def _coupled_op(
    current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str
) -> tuple[Tensor, Tensor]:
    partition = _partitions(current, kind)
    merged, windows = _kernels(current, omega).coupled_forward(current, first, tau, theta, omega, kind, partition)
    return merged, merged.new_empty(0) if partition else windows


@torch.library.custom_op("lightning_msnn::coupled_scan_backward", mutates_args=())
def _coupled_backward_op(
    grad: Tensor,
    windows: Tensor,
    first: Tensor,
    tau: Tensor,
    theta: Tensor,
    omega: str,
    kind: str,
    wants_tau: bool,
    wants_theta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_current, by_first, by_tau, by_theta = _kernels(grad, omega).coupled_backward(
        grad, windows, first, tau, theta, omega, kind, _partitions(grad, kind), wants_tau, wants_theta
    )
    by_tau = torch.zeros_like(tau) if by_tau is None else by_tau
    return by_current, by_first, by_tau, torch.zeros_like(theta) if by_theta is None else by_theta


@_coupled_backward_op.register_fake
def _(grad: Tensor, windows: Tensor, first: Tensor, tau: Tensor, theta: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(grad), torch.empty_like(first), torch.empty_like(tau), torch.empty_like(theta)


@_scan_op.register_fake
@_coupled_op.register_fake
def _(current: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    kind = others[-1]
    windows = current.new_empty(0) if _partitions(current, kind) else window_buffer(current, kind)
    return torch.empty_like(current), windows


def _coupled_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    current, first, tau, theta, ctx.omega, ctx.kind = inputs
    merged, windows = output
    ctx.save_for_backward(merged if _partitions(current, ctx.kind) else windows, first, tau, theta)


def _coupled_autograd(ctx: Any, grad: Tensor, by_windows: Tensor) -> tuple[Any, ...]:
    gradients = _coupled_backward_op(grad, *ctx.saved_tensors, ctx.omega, ctx.kind, *ctx.needs_input_grad[2:4])
    return *gradients, None, None


_coupled_op.register_autograd(_coupled_autograd, setup_context=_coupled_setup)


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
    partition = _partitions(current, kind)
    if torch.compiler.is_compiling():
        merged, windows = _scan_op(current, tau, kind)
        return merged, merged if partition else windows
    scanned = _Scan.apply(current, tau, kind)  # type: ignore[no-untyped-call]
    return (scanned, scanned) if partition else scanned


def merged_coupled_scan(current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str) -> Tensor:
    """Layer 2 on a map: cut into windows, scan, merge.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        first: Membranes of layer 1 as :func:`merged_scan` returned them.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        theta: Radian factor of the projection in units of pi, a scalar tensor.
        omega: Name of the projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.
        kind: Kind of windows, which :func:`can_fuse`.

    Returns:
        The merged membrane, shape of ``current``.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = _coupled_op(current, first, tau, theta, omega, kind)[0]
        return compiled
    merged: Tensor = _CoupledScan.apply(current, first, tau, theta, omega, kind)  # type: ignore[no-untyped-call]
    return merged


def scan_and_hand_on(current: Tensor, tau: Tensor, kind: str, channels: int) -> tuple[Tensor, Tensor]:
    """Layer 1 on a map, where only some channels' membranes are asked for by window, and as a batch. Does not compile.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        kind: Kind of windows, which :func:`can_fuse`.
        channels: How many of the last channels are handed on.

    Returns:
        The merged membrane, shape of ``current``, and the windows' own membranes of the last channels,
        ``(4 B, channels, h, w)``, as :func:`merged_coupled_scan` takes them for :data:`BATCH`; the last are zeros,
        since no one asks for them.
    """
    scanned: tuple[Tensor, Tensor] = _HandingScan.apply(current, tau, kind, channels)  # type: ignore[no-untyped-call]
    return scanned


def batched_recurrent_scan(current: Tensor, before: Tensor, tau: Tensor, theta: Tensor, omega: str) -> Tensor:
    """The scan of :func:`lightning_msnn.functional.recurrent_scan` on a batch of windows. Does not compile.

    Args:
        current: Synaptic currents of the windows, ``(4 B, C, h, w)``.
        before: Windows of the membrane map that the block received, shape of ``current``.
        tau: Decay of the membrane from one window to the next, a scalar or ``(C, 1, 1)``.
        theta: Radian factor of the projection in units of pi, a scalar tensor.
        omega: Name of the projection, one of :data:`lightning_msnn.functional.PROJECTIONS`.

    Returns:
        New membranes of the windows, shape of ``current``.
    """
    membranes: Tensor = _RecurrentScan.apply(current, before, tau, theta, omega)  # type: ignore[no-untyped-call]
    return membranes


def cut_windows(x: Tensor, kind: str) -> Tensor:
    """Cut a map into its windows, as a batch.

    Args:
        x: Map ``(B, C, H, W)``.
        kind: Kind of windows, which :func:`can_fuse`.

    Returns:
        Windows ``(4 B, C, h, w)``, one after another on the batch axis.
    """
    if torch.compiler.is_compiling():
        return torch.cat(split(x, kind))
    windows: Tensor = _Cut.apply(x, kind)  # type: ignore[no-untyped-call]
    return windows


def join_windows(windows: Tensor, kind: str, height: int, width: int) -> Tensor:
    """Put a batch of windows back on the map; where they overlap, their mean.

    Args:
        windows: Windows ``(4 B, C, h, w)``, one after another on the batch axis.
        kind: Kind of windows, which :func:`can_fuse`.
        height: Height ``H`` of the map in pixels.
        width: Width ``W`` of the map in pixels.

    Returns:
        Map ``(B, C, H, W)``.
    """
    if torch.compiler.is_compiling():
        return merge(list(windows.unflatten(0, (4, -1)).unbind(0)), kind, height, width)  # type: ignore[no-untyped-call]
    joined: Tensor = _Join.apply(windows, kind, height, width)  # type: ignore[no-untyped-call]
    return joined
