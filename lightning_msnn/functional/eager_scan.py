"""The scans over windows by torch's own operations, forward and backward: what runs without a GPU.

:mod:`~lightning_msnn.functional.fused` says what they compute. Each membrane is written straight to its place on the
map, and the backward pass treats all windows at once wherever one does not wait for the next, since most maps are so
small that a call costs as much as its arithmetic.

Where windows overlap, the mean over them is folded into weights: with ``u_k = tau u_(k-1) + I_k`` and ``w_k`` one over
the number of windows that cover a pixel, ``merge(u) = I + sum_k w_k tau u_(k-1)``, since the ``w_k I_k`` of a pixel add
up to its ``I``.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_msnn.functional.projection import PROJECTIONS
from lightning_msnn.functional.windows import side, split

__all__ = [
    "BATCH",
    "coupled_backward",
    "coupled_forward",
    "map_buffer",
    "recurrent_backward",
    "recurrent_forward",
    "scan_backward",
    "scan_forward",
    "shares_of",
    "views",
    "window_buffer",
]

BATCH = "batch"
"""Windows that lie one after another on the batch axis, ``(4 B, C, h, w)``, and are merged by no one."""


Carry = Callable[[int, Tensor], tuple[Tensor, float]]


class _Slopes(NamedTuple):
    """What the backward pass of layer 2 needs of a projection, for the first three windows, ``(3, B, C, h, w)`` each.

    ``factor``, which the next membrane's gradient is multiplied by on its way back, holds what is the same for all
    places of a channel; the rest is in the slopes.
    """

    value: Tensor
    """The projection's value, divided by ``halved``."""
    halved: float
    factor: Tensor
    by_first: Tensor | None
    """Slope by layer 1's membrane; None is zero."""
    by_second: Tensor | None
    """Slope by layer 2's membrane, times ``sign``; None is zero."""
    sign: float
    by_theta: Tensor | None
    """Slope by theta times the decay, None where theta is not learnt."""


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def window_buffer(x: Tensor, kind: str) -> Tensor:
    """Uninitialised membranes of a map's first three windows, ``(3, B, C, h, w)``, each in the map's memory order.

    Args:
        x: Map ``(B, C, H, W)``.
        kind: Kind of windows.
    """
    batch, channels = x.shape[:2]
    h, w = side(kind, x.shape[2]), side(kind, x.shape[3])
    if _channels_last(x):
        return x.new_empty(3, batch, h, w, channels).permute(0, 1, 4, 2, 3)
    return x.new_empty(3, batch, channels, h, w)


def map_buffer(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor of four axes, in the memory order, data type and device of ``x``.

    Args:
        x: Tensor of four axes.
        *shape: Its shape.
    """
    order = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


def views(x: Tensor, kind: str) -> list[Tensor]:
    """The four windows of a map, as views.

    Args:
        x: Map ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        kind: Kind of windows.
    """
    return list(x.unflatten(0, (4, -1)).unbind(0)) if kind == BATCH else split(x, kind)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=64)
def _shares(
    kind: str, shape: tuple[int, int, int], channels_last: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """One over the number of windows that cover each pixel, cut into the windows, each ``(C, h, w)``.

    The same for each channel, but in the memory order of the map: to spread it as it is read would take torch off its
    vectorised path.
    """
    covered = torch.zeros(1, *shape)
    for window in split(covered, kind):
        window += 1.0
    order = torch.channels_last if channels_last else torch.contiguous_format
    shares = [s.to(device, dtype).contiguous(memory_format=order) for s in split(1.0 / covered, kind)]
    return tuple(s[0] for s in shares)


def shares_of(x: Tensor, kind: str) -> tuple[Tensor, ...]:
    """One over the number of windows that cover each pixel of a map, cut into the windows, each ``(C, h, w)``.

    Args:
        x: Map ``(B, C, H, W)``.
        kind: Kind of windows.
    """
    return _shares(kind, (x.shape[1], x.shape[2], x.shape[3]), _channels_last(x), x.dtype, x.device)


def _sum_to(x: Tensor, parameter: Tensor) -> Tensor:
    """Sum the gradient of a decay or a theta ``(..., B, C, H, W)`` over all that shares it."""
    axes = [axis for axis in range(x.dim()) if axis != x.dim() - 3]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A CPU sums bf16 in float32 as it is, but copies it first if the result is to be float32.
    by_channel = x.sum(axes, dtype=x.dtype if x.dtype == torch.bfloat16 and not x.is_cuda else wide)
    total = by_channel if parameter.numel() > 1 else by_channel.sum(dtype=wide)
    return total.reshape(parameter.shape).to(parameter.dtype)


def _sine_slopes(a: Tensor, b: Tensor, decay: Tensor, theta: Tensor, wants_theta: bool) -> _Slopes:
    c = (math.pi * theta).to(a.dtype)
    angle = b * c
    cosine = torch.cos(angle)
    by_second = torch.sin(angle) if wants_theta else angle.sin_()
    by_theta = torch.addcmul(cosine, angle, by_second, value=-1.0) if wants_theta else None
    scaled = a * c
    inner = scaled * cosine
    outer = torch.cos(inner)
    by_second.mul_(outer).mul_(scaled)
    if by_theta is not None:
        by_theta.mul_(a).mul_(outer).mul_(2.0 * math.pi * decay)
    return _Slopes(inner.sin_(), 2.0, 2.0 * c * decay, outer.mul_(cosine), by_second, -1.0, by_theta)


def _slopes(omega: str, a: Tensor, b: Tensor, decay: Tensor, theta: Tensor, wants_theta: bool) -> _Slopes:
    """Differentiate ``decay omega(a, b, theta)``, element by element.

    Args:
        omega: Name of the projection.
        a: Membranes of layer 1, ``(3, B, C, h, w)``.
        b: Membranes of layer 2, shape of ``a``.
        decay: Decay, a scalar or ``(C, 1, 1)``.
        theta: Radian factor, a scalar tensor.
        wants_theta: Whether theta is learnt.
    """
    if omega == "sine":
        return _sine_slopes(a, b, decay, theta, wants_theta)
    with torch.enable_grad():
        # A theta for each place, whose gradient is then that of each place.
        radian = theta.detach().to(a.dtype).expand_as(a) if wants_theta else theta.detach()
        inputs = [x.detach().requires_grad_() for x in ((a, b, radian) if wants_theta else (a, b))]
        value = PROJECTIONS[omega](inputs[0], inputs[1], inputs[2] if wants_theta else radian)
        slopes = torch.autograd.grad(value, inputs, torch.ones_like(value), allow_unused=True)
    by_theta = None if not wants_theta or slopes[2] is None else slopes[2] * decay
    value = value.detach()
    if value.data_ptr() == b.data_ptr():  # a projection that returns what it was given; the value is written to later
        value = value.clone()
    return _Slopes(value, 1.0, decay, slopes[0], slopes[1], 1.0, by_theta)


def _first_three(x: Tensor, kind: str) -> Tensor:
    """The first three windows of a map as one tensor ``(3, B, C, h, w)``."""
    if kind == BATCH:
        return x.unflatten(0, (4, -1))[:3]  # type: ignore[no-untyped-call, no-any-return]
    windows = window_buffer(x, kind)
    for window, part in zip(windows.unbind(0), split(x, kind), strict=False):
        window.copy_(part)
    return windows


def _project(omega: str, a: Tensor, b: Tensor, theta: Tensor) -> tuple[Tensor, float]:
    """A projection's value divided by a number, and that number."""
    if omega == "sine":  # in place, for it runs in order
        angle = math.pi * theta
        return torch.mul(b, angle).cos_().mul_(a).mul_(angle).sin_(), 2.0
    return PROJECTIONS[omega](a, b, theta), 1.0


def _forward(current: Tensor, tau: Tensor, kind: str, partition: bool, carry: Carry) -> tuple[Tensor, Tensor]:
    """Visit the windows; the arguments and what is returned are those of :func:`scan_forward`.

    Args:
        current: Synaptic current.
        tau: Decay.
        kind: Kind of windows.
        partition: Whether no windows overlap.
        carry: What a window hands to the next, before the decay, of its number and its membrane: a tensor, and a number
            to multiply it by.
    """
    decay = tau.to(current.dtype)
    merged = torch.empty_like(current) if partition else current.clone()
    i, m = views(current, kind), views(merged, kind)
    windows = merged if partition else window_buffer(current, kind)
    u = m if partition else list(windows.unbind(0))
    shares = None if partition else shares_of(current, kind)
    u[0].copy_(i[0])
    for k in range(1, 4):
        value, scale = carry(k - 1, u[k - 1])
        if shares is not None:
            m[k].addcmul_(value, decay * shares[k], value=scale)
        if k < len(u):
            torch.addcmul(i[k], value, decay, value=scale, out=u[k])
    return merged, windows


def scan_forward(current: Tensor, tau: Tensor, kind: str, partition: bool) -> tuple[Tensor, Tensor]:
    """Layer 1.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        tau: Decay, a scalar or ``(C, 1, 1)``.
        kind: Kind of windows.
        partition: Whether no windows overlap.

    Returns:
        The merged membrane, shape of ``current``, and the windows' own: the same tensor for a partition, else those of
        the first three windows, ``(3, B, C, h, w)``.
    """
    return _forward(current, tau, kind, partition, lambda k, u: (u, 1.0))


def scan_backward(
    grad: Tensor, by_windows: Tensor | None, windows: Tensor, tau: Tensor, kind: str, partition: bool, wants_tau: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of layer 1.

    Args:
        grad: Gradient of the merged membrane; for a partition also that of the windows'.
        by_windows: Gradient of the windows' own membranes where they overlap, else None.
        windows: Membranes that the forward pass returned.
        tau: Decay.
        kind: Kind of windows.
        partition: Whether no windows overlap.
        wants_tau: Whether tau is learnt.

    Returns:
        Gradients of the current and of tau.
    """
    decay = tau.to(grad.dtype)
    if partition:
        by_current = torch.empty_like(grad)
        g, d, u = (views(x, kind) for x in (grad, by_current, windows))
        d[3].copy_(g[3])
        for k in range(2, -1, -1):
            torch.addcmul(g[k], d[k + 1], decay, out=d[k])
        if not wants_tau:
            return by_current, None
        product = torch.empty_like(grad)
        p = views(product, kind)
        p[0].zero_()
        for k in range(1, 4):
            torch.mul(d[k], u[k - 1], out=p[k])
        return by_current, _sum_to(product, tau)
    assert by_windows is not None
    shares = shares_of(grad, kind)
    by_current = grad.clone()
    g, c = split(grad, kind), split(by_current, kind)
    after = torch.empty_like(windows)  # the gradient of window k + 1's membrane
    torch.mul(g[3], shares[3], out=after[2])
    for k in range(2, -1, -1):
        # What window k is owed beyond its share of the merged map's gradient, which is in the map already.
        owed = torch.addcmul(by_windows[k], after[k], decay)
        c[k].add_(owed)
        if k:
            torch.addcmul(owed, g[k], shares[k], out=after[k - 1])
    return by_current, _sum_to(after.mul_(windows), tau) if wants_tau else None


def coupled_forward(
    current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str, partition: bool
) -> tuple[Tensor, Tensor]:
    """Layer 2.

    Args:
        current: Synaptic current ``(B, C, H, W)``, or ``(4 B, C, h, w)`` for :data:`BATCH`.
        first: The windows' membranes of layer 1.
        tau: Decay, a scalar or ``(C, 1, 1)``.
        theta: Radian factor, a scalar tensor.
        omega: Name of the projection.
        kind: Kind of windows.
        partition: Whether no windows overlap.

    Returns:
        The merged membrane, and the windows' own as :func:`scan_forward` returns them.
    """
    a = views(first, kind) if partition else list(first.unbind(0))
    return _forward(current, tau, kind, partition, lambda k, u: _project(omega, a[k], u, theta))


def coupled_backward(
    grad: Tensor,
    windows: Tensor,
    first: Tensor,
    tau: Tensor,
    theta: Tensor,
    omega: str,
    kind: str,
    partition: bool,
    wants_tau: bool,
    wants_theta: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of layer 2.

    Args:
        grad: Gradient of the merged membrane.
        windows: Membranes of layer 2 that the forward pass returned.
        first: The windows' membranes of layer 1.
        tau: Decay.
        theta: Radian factor.
        omega: Name of the projection.
        kind: Kind of windows.
        partition: Whether no windows overlap.
        wants_tau: Whether tau is learnt.
        wants_theta: Whether theta is learnt.

    Returns:
        Gradients of the current, of layer 1's membranes, of tau and of theta.
    """
    decay = tau.to(grad.dtype)
    if partition:
        first, windows = _first_three(first, kind), _first_three(windows, kind)
    slopes = _slopes(omega, first, windows, decay, theta, wants_theta)
    sums = [x for x, wanted in ((slopes.value, wants_tau), (slopes.by_theta, wants_theta)) if wanted and x is not None]
    by_current = grad.clone()
    d = views(by_current, kind)
    after = torch.empty_like(windows)
    upstream: Tensor | None = None
    if not partition:
        shares, g = shares_of(grad, kind), split(grad, kind)
        upstream = g[3] * shares[3]
    for k in range(2, -1, -1):
        # The gradient of window k + 1's membrane: for a partition what is on the map, else its share of that and more.
        of_next = d[k + 1] if upstream is None else upstream
        torch.mul(of_next, slopes.factor, out=after[k])
        for x in sums:
            x[k].mul_(of_next)
        if upstream is None:
            if slopes.by_second is not None:
                d[k].addcmul_(after[k], slopes.by_second[k], value=slopes.sign)
            continue
        owed = None if slopes.by_second is None else after[k] * slopes.by_second[k]
        if owed is not None:
            d[k].add_(owed, alpha=slopes.sign)
        if k:
            upstream = g[k] * shares[k]
            if owed is not None:
                upstream.add_(owed, alpha=slopes.sign)
    by_tau = _sum_to(slopes.value, tau).mul_(slopes.halved) if wants_tau else None
    by_theta = None
    if wants_theta:
        by_theta = torch.zeros_like(theta) if slopes.by_theta is None else _sum_to(slopes.by_theta, theta)
    by_first: Tensor
    if slopes.by_first is None:
        by_first = torch.zeros_like(grad if partition else after)
    elif partition:
        by_first = torch.empty_like(grad)
        f = views(by_first, kind)
        f[3].zero_()
        for k in range(3):
            torch.mul(after[k], slopes.by_first[k], out=f[k])
    else:
        by_first = after.mul_(slopes.by_first)
    return by_current, by_first, by_tau, by_theta


def recurrent_forward(current: Tensor, before: Tensor, tau: Tensor, theta: Tensor, omega: str) -> Tensor:
    """A membrane map that travels from block to block: see :func:`lightning_msnn.functional.recurrent_scan`.

    Args:
        current: Synaptic currents of the windows, ``(4 B, C, h, w)``.
        before: Windows of the membrane map that the block received, shape of ``current``.
        tau: Decay, a scalar or ``(C, 1, 1)``.
        theta: Radian factor, a scalar tensor.
        omega: Name of the projection.

    Returns:
        New membranes of the windows, shape of ``current``.
    """
    decay = tau.to(current.dtype)
    membranes = torch.empty_like(current)
    i, m, u = (views(x, BATCH) for x in (current, before, membranes))
    for k, (a, b) in enumerate(_recurrent_arguments(m, u)):
        value, scale = _project(omega, a, b, theta)
        torch.addcmul(i[k], value, decay, value=scale, out=u[k])
    return membranes


def _recurrent_arguments(before: list[Tensor], membranes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What the projection is applied to for each window."""
    return [
        (before[0], before[1]),
        (membranes[0], before[1]),
        (before[2], membranes[1]),
        (before[3], membranes[2]),
    ]


def recurrent_backward(
    grad: Tensor,
    membranes: Tensor,
    before: Tensor,
    tau: Tensor,
    theta: Tensor,
    omega: str,
    wants_tau: bool,
    wants_theta: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the membrane map's scan.

    Args:
        grad: Gradient of the new membranes, ``(4 B, C, h, w)``.
        membranes: What the forward pass returned.
        before: Windows of the membrane map that the block received.
        tau: Decay.
        theta: Radian factor.
        omega: Name of the projection.
        wants_tau: Whether tau is learnt.
        wants_theta: Whether theta is learnt.

    Returns:
        Gradients of the currents, of the windows received, of tau and of theta.
    """
    decay = tau.to(grad.dtype)
    pairs = _recurrent_arguments(views(before, BATCH), views(membranes, BATCH))
    a, b = (torch.cat([pair[n] for pair in pairs]).unflatten(0, (4, -1)) for n in (0, 1))  # type: ignore[no-untyped-call]
    slopes = _slopes(omega, a, b, decay, theta, wants_theta)
    by_current, after = grad.clone(), torch.empty_like(grad)
    d, s = views(by_current, BATCH), views(after, BATCH)
    by_before = torch.zeros_like(grad)
    m = views(by_before, BATCH)
    targets = _recurrent_arguments(m, d)
    for k in (3, 2, 1, 0):
        torch.mul(d[k], slopes.factor, out=s[k])
        first, second = targets[k]
        if slopes.by_first is not None:
            first.addcmul_(s[k], slopes.by_first[k])
        if slopes.by_second is not None:
            second.addcmul_(s[k], slopes.by_second[k], value=slopes.sign)
    by_tau = by_theta = None
    places = by_current.unflatten(0, (4, -1))  # type: ignore[no-untyped-call]
    if wants_tau:
        by_tau = _sum_to(slopes.value.mul_(places), tau).mul_(slopes.halved)
    if wants_theta:
        by_theta = torch.zeros_like(theta) if slopes.by_theta is None else _sum_to(slopes.by_theta.mul_(places), theta)
    return by_current, by_before, by_tau, by_theta
