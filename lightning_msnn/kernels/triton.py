"""The kernels in Triton, for CUDA: the functions of :mod:`~lightning_msnn.kernels.native`, for the same operators.

Each program takes a tile of places in a window and of channels and visits the windows in its registers, where all is
float32. Where windows overlap, membranes go to a buffer first, and in a second pass each pixel collects what those
hold that cover it; gradients likewise. Sums by channel are sums of one partial sum for each tile. So nothing depends
on the order in which tiles finish.

With ``TRITON_INTERPRET=1`` in the environment before the first import, the kernels run on the CPU, for tests.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_msnn.kernels.geometry import (
    FORMS,
    OMEGAS,
    SOFT,
    SUMS,
    SURROGATES,
    Layer,
    Parameters,
    Tables,
    tables,
    vectors,
)

__all__ = ["DTYPES", "TIMED", "backward", "forward", "settle", "statistics"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Data types of maps that the kernels take."""
TIMED: tuple[str, ...] = ()
"""Projections of layers that are one time step of several: none."""

_FIRST, _COUPLED, _RECURRENT = (tl.constexpr(FORMS.index(form)) for form in ("first", "coupled", "recurrent"))
_SUMS = 5  # of those by channel: all but that of the decay over time
_TILES = 512  # of rows, that the statistics are taken from


@triton.jit
def _sine_and_cosine(x):  # pragma: no cover
    """Quarter turns, then the power series on [-pi/4, pi/4]; a fraction of the registers that the library's take."""
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - turns * 1.5703125  # pi / 2 in three parts: products with the first two are exact
    r = r - turns * 4.837512969970703e-4
    r = r - turns * 7.549789954891882e-8
    r = tl.where(r > 0.8, 0.8, tl.where(r < -0.8, -0.8, r))  # beyond the precision of a huge x; NaN stays
    z = r * r
    s = r + r * z * (-1.0 / 6.0 + z * (1.0 / 120.0 + z * (-1.0 / 5040.0 + z * (1.0 / 362880.0))))
    c = 1.0 + z * (-0.5 + z * (1.0 / 24.0 + z * (-1.0 / 720.0 + z * (1.0 / 40320.0 - z * (1.0 / 3628800.0)))))
    half = tl.floor(turns * 0.5)
    swap = turns - 2.0 * half != 0.0
    sign = 1.0 - 2.0 * (half - 2.0 * tl.floor(half * 0.5))
    return sign * tl.where(swap, c, s), sign * tl.where(swap, -s, c)


@triton.jit
def _omega(a, b, c, KIND: tl.constexpr):  # pragma: no cover
    """A projection's value and its derivatives by ``a``, by ``b`` and by ``c = pi theta``."""
    if KIND == 0:  # sine
        sine, cosine = _sine_and_cosine(b * c)
        inner, outer = _sine_and_cosine(a * c * cosine)
        value = 2.0 * inner
        by_a = 2.0 * outer * c * cosine
        by_b = -2.0 * outer * a * c * c * sine
        by_c = 2.0 * outer * a * (cosine - b * c * sine)
    elif KIND == 1:  # mean
        value = 0.5 * (a + b)
        by_a = tl.full(a.shape, 0.5, tl.float32)
        by_b = by_a
        by_c = tl.zeros(a.shape, tl.float32)
    elif KIND == 2:  # tanh
        t = 2.0 * tl.sigmoid(c * (a + b)) - 1.0
        value = 2.0 * t
        by_a = c * (1.0 - t * t)
        by_b = by_a
        by_c = (a + b) * (1.0 - t * t)
    elif KIND == 3:  # exponential
        x = 0.5 * (a + b)
        fade = tl.exp(-c * tl.abs(x))
        value = tl.where(x < 0.0, -2.0, 2.0) * (1.0 - fade)
        by_a = c * fade
        by_b = by_a
        by_c = 2.0 * x * fade
    elif KIND == 4:  # polynomial
        y = 0.5 * c * (a + b)
        y = tl.where(y > 1.0, 1.0, tl.where(y < -1.0, -1.0, y))  # NaN stays
        value = y * (3.0 - y * y)
        by_a = 1.5 * c * (1.0 - y * y)
        by_b = by_a
        by_c = 1.5 * (a + b) * (1.0 - y * y)
    elif KIND == 5:  # piecewise linear
        z = c * (a + b)
        value = tl.where(z > 2.0, 2.0, tl.where(z < -2.0, -2.0, z))
        by_a = tl.where(tl.abs(z) > 2.0, 0.0, c)
        by_b = by_a
        by_c = tl.where(tl.abs(z) > 2.0, 0.0, a + b)
    else:  # none
        value = b
        by_a = tl.zeros(a.shape, tl.float32)
        by_b = tl.full(a.shape, 1.0, tl.float32)
        by_c = by_a
    return value, by_a, by_b, by_c


@triton.jit
def _tile(B, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # pragma: no cover
    """Image, place and channel of this tile's elements, of ``B`` images of ``P`` places, and which of them exist."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < B * P)[:, None] & (c < C)[None, :]
    b = (p // P).to(tl.int64)  # a large map has more elements than 32 bits count
    return b[:, None], (p % P)[:, None], c[None, :], inside


@triton.jit
def _offset(index, k, b, i, c, inside, B, P, C, slab, pixels):  # pragma: no cover
    """Where place ``i`` of window ``k`` lies on a map, and whether it does, as one that is padded does not.

    An image has ``pixels`` on the map, in pieces of ``slab`` rows; the pieces of all images lie side by side.
    """
    if index is None:
        return (b * P + i) * C + c, inside
    else:
        q = tl.load(index + k * P + i)
        return ((q // slab * B + b) * slab + q % slab) * C + c, inside & (q < pixels)


@triton.jit
def _collected(buffer, covers, b, q, c, inside, B, P, C, Q, MOST: tl.constexpr):  # pragma: no cover
    """Sum of what the windows that cover pixel ``q`` hold in a buffer of windows by images by places."""
    total = tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(MOST):
        slot = tl.load(covers + j * Q + q)
        at = ((slot // P * B + b) * P + slot % P) * C + c
        total += tl.load(buffer + at, mask=inside & (slot >= 0), other=0.0)
    return total


@triton.jit
def _norm(norm, c, C):  # pragma: no cover
    """Mean, scale and shift of a norm; of none, what changes nothing."""
    if norm is None:
        return 0.0, 1.0, 0.0
    else:
        mean = tl.load(norm + c, mask=c < C, other=0.0)
        scale = tl.load(norm + 2 * C + c, mask=c < C, other=0.0)
        return mean, scale, tl.load(norm + 3 * C + c, mask=c < C, other=0.0)


@triton.jit
def _parameter(x, otherwise, c, C, stride):  # pragma: no cover
    """A parameter by channel; a number where there is no parameter."""
    if x is None:
        return otherwise
    else:
        return tl.load(x + c * stride, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _scalar(x, otherwise):  # pragma: no cover
    """A parameter that is one number."""
    if x is None:
        return otherwise
    else:
        return tl.load(x).to(tl.float32)


@triton.jit
def _operands(  # pragma: no cover
    k: tl.constexpr, u, other, index, b, i, c, inside, B, P, C, pixels, FORM: tl.constexpr
):  # fmt: skip
    """The two membranes that window ``k`` merges, ``u`` that of the window before."""
    if FORM == _COUPLED:
        at = (((k - 1) * B + b) * P + i) * C + c
        return tl.load(other + at, mask=inside, other=0.0).to(tl.float32), u
    else:
        at, there = _offset(index, 1 if k < 2 else k, b, i, c, inside, B, P, C, pixels, pixels)
        received = tl.load(other + at, mask=there, other=0.0).to(tl.float32)
        if k == 0:
            at, there = _offset(index, 0, b, i, c, inside, B, P, C, pixels, pixels)
            return tl.load(other + at, mask=there, other=0.0).to(tl.float32), received
        elif k == 1:
            return u, received
        else:
            return received, u


@triton.jit
def _visit(  # pragma: no cover
    k: tl.constexpr, u, x, other, index, decay, angle, b, i, c, inside, B, P, C, pixels,
    FORM: tl.constexpr, OMEGA: tl.constexpr,
):  # fmt: skip
    """The membrane of window ``k``, from that of the window before and the current."""
    if FORM == _FIRST and k > 0:
        x += decay * u
    elif FORM == _RECURRENT or (FORM == _COUPLED and k > 0):
        first, second = _operands(k, u, other, index, b, i, c, inside, B, P, C, pixels, FORM)
        value, _, _, _ = _omega(first, second, angle, OMEGA)
        x += decay * value
    return x


@triton.jit
def _fire(m, v, a, SOFT: tl.constexpr):  # pragma: no cover
    """What neurons return for membranes ``m``: the step, or with ``SOFT`` the share ``a`` of it. NaN does not fire."""
    spikes = tl.where(m >= v, 1.0, 0.0)
    if SOFT < 0:
        return spikes
    else:
        if SOFT == 0:  # rectifier
            y = tl.where(m < 0.0, 0.0, m)
        elif SOFT == 1:  # ramp
            y = m - v + 0.5
            y = tl.where(y < 0.0, 0.0, tl.where(y > 1.0, 1.0, y))
        else:  # graded
            y = tl.where(m < v, 0.0, m)
        return a * spikes + (1.0 - a) * y


@triton.jit
def _slopes(m, v, a, SURROGATE: tl.constexpr, SOFT: tl.constexpr):  # pragma: no cover
    """Derivatives of what neurons return by their membranes and by their thresholds."""
    x = tl.abs(m - v)
    if SURROGATE == 0:  # triangular
        h = tl.where(x > 1.0, 0.0, 1.0 - x)
    elif SURROGATE == 1:  # rectangular
        h = tl.where(x < 0.5, 1.0, 0.0)
    elif SURROGATE == 2:  # arctan
        h = 1.0 / (1.0 + (3.141592653589793 * x) * (3.141592653589793 * x))
    else:  # sigmoid
        fade = tl.exp(-4.0 * x)
        h = 4.0 * fade / ((1.0 + fade) * (1.0 + fade))
    if SOFT < 0:
        return h, -h
    else:
        if SOFT == 0:
            slope = tl.where(m > 0.0, 1.0, 0.0)
            by_v = tl.zeros(m.shape, tl.float32)
        elif SOFT == 1:
            slope = tl.where(tl.abs(m - v) < 0.5, 1.0, 0.0)
            by_v = slope
        else:
            slope = tl.where(m >= v, 1.0, 0.0) + v * h
            by_v = v * h
        return a * h + (1.0 - a) * slope, -a * h - (1.0 - a) * by_v


@triton.jit
def _write(  # pragma: no cover
    m, v, a, at, there, residual, out, merged, FIRES: tl.constexpr, SOFT: tl.constexpr
):  # fmt: skip
    """Write what neurons return for merged membranes ``m``, and these, if they are kept."""
    if merged is not None:
        tl.store(merged + at, m, mask=there)
    if FIRES:
        m = _fire(m, v, a, SOFT)
    elif residual is not None:
        m += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, m, mask=there)


@triton.jit
def _forward(  # pragma: no cover
    current, residual, norm, tau, other, theta, level, anneal, out, handed, merged, membranes,
    in_index, out_index, map_index, threshold,
    B, P, C, in_slab, in_pixels, out_slab, out_pixels, map_pixels, H, tau_stride, level_stride,
    WINDOWS: tl.constexpr, FORM: tl.constexpr, OMEGA: tl.constexpr, FIRES: tl.constexpr, SOFT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Visit the windows: membranes to a buffer, if there is one, else what neurons return; the last ``H`` channels."""
    b, i, c, inside = _tile(B, P, C, BLOCK_P, BLOCK_C)
    _, scale, shift = _norm(norm, c, C)
    decay, v = _parameter(tau, 0.0, c, C, tau_stride), _parameter(level, threshold, c, C, level_stride)
    angle, a = _scalar(theta, 0.0) * 3.141592653589793, _scalar(anneal, 1.0)
    u = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for k in tl.static_range(WINDOWS):
        at, there = _offset(in_index, k, b, i, c, inside, B, P, C, in_slab, in_pixels)
        x = tl.load(current + at, mask=there, other=0.0).to(tl.float32)
        x = tl.where(there, x * scale + shift, 0.0)
        u = _visit(k, u, x, other, map_index, decay, angle, b, i, c, inside, B, P, C, map_pixels, FORM, OMEGA)
        slot = (k * B + b) * P + i
        if handed is not None and k + 1 < WINDOWS:
            tl.store(handed + slot * H + c - (C - H), u, mask=inside & (c >= C - H))
        if membranes is not None:
            tl.store(membranes + slot * C + c, u, mask=inside)
        elif out is not None:
            at, there = _offset(out_index, k, b, i, c, inside, B, P, C, out_slab, out_pixels)
            _write(u, v, a, at, there, residual, out, merged, FIRES, SOFT)


@triton.jit
def _merge(  # pragma: no cover
    membranes, covers, share, residual, level, anneal, out, merged, threshold, B, P, C, Q, level_stride,
    MOST: tl.constexpr, FIRES: tl.constexpr, SOFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The mean of windows that overlap, for each of ``Q`` pixels, and what neurons return for it."""
    b, q, c, inside = _tile(B, Q, C, BLOCK_P, BLOCK_C)
    v, a = _parameter(level, threshold, c, C, level_stride), _scalar(anneal, 1.0)
    m = _collected(membranes, covers, b, q, c, inside, B, P, C, Q, MOST) * tl.load(share + q)
    _write(m, v, a, (b * Q + q) * C + c, inside, residual, out, merged, FIRES, SOFT)


@triton.jit
def _owe(  # pragma: no cover
    membranes, covers, share, grad, grad_merged, level, anneal, owed, sums, threshold, B, P, C, Q, level_stride,
    MOST: tl.constexpr, SURROGATE: tl.constexpr, SOFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradient of what neurons return, for each of ``Q`` pixels, to that of each window's membranes there."""
    b, q, c, inside = _tile(B, Q, C, BLOCK_P, BLOCK_C)
    v, a = _parameter(level, threshold, c, C, level_stride), _scalar(anneal, 1.0)
    part = tl.load(share + q)
    at = (b * Q + q) * C + c
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = _collected(membranes, covers, b, q, c, inside, B, P, C, Q, MOST) * part
    by_m, by_v = _slopes(m, v, a, SURROGATE, SOFT)
    if level is not None:
        channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.sum(tl.where(inside, d * by_v, 0.0), 0)
        tl.store(sums + tl.program_id(0) * C + channels, total, mask=channels < C)
    d *= by_m
    if grad_merged is not None:
        d += tl.load(grad_merged + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(owed + at, d * part, mask=inside)


@triton.jit
def _backward(  # pragma: no cover
    grad, grad_handed, grad_merged, owed, share, current, norm, tau, other, theta, level, anneal,
    by_current, by_windows, by_other, by_received, sums, in_index, out_index, map_index, threshold,
    B, P, C, in_slab, in_pixels, out_slab, out_pixels, map_pixels, H, tau_stride, level_stride,
    WINDOWS: tl.constexpr, FORM: tl.constexpr, OMEGA: tl.constexpr, SURROGATE: tl.constexpr, SOFT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Back from the last window to the first.

    The gradient of merged membranes is in ``owed`` already, if there is one. Gradients go to the buffers ``by_windows``
    and ``by_received`` where several windows lie on a pixel, else to ``by_current`` and ``by_other``.
    """
    b, i, c, inside = _tile(B, P, C, BLOCK_P, BLOCK_C)
    mean, scale, shift = _norm(norm, c, C)
    decay, v = _parameter(tau, 0.0, c, C, tau_stride), _parameter(level, threshold, c, C, level_stride)
    angle, a = _scalar(theta, 0.0) * 3.141592653589793, _scalar(anneal, 1.0)
    none = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    u = none
    membranes = ()
    for k in tl.static_range(WINDOWS):
        at, there = _offset(in_index, k, b, i, c, inside, B, P, C, in_slab, in_pixels)
        x = tl.load(current + at, mask=there, other=0.0).to(tl.float32)
        x = tl.where(there, x * scale + shift, 0.0)
        u = _visit(k, u, x, other, map_index, decay, angle, b, i, c, inside, B, P, C, map_pixels, FORM, OMEGA)
        membranes = membranes + (u,)  # type: ignore[assignment]  # noqa: RUF005
    shift_sum, scale_sum, tau_sum, theta_sum, level_sum = none, none, none, none, none
    carry, to_second = none, none
    for k in tl.static_range(WINDOWS - 1, -1, -1):
        at, there = _offset(out_index, k, b, i, c, inside, B, P, C, out_slab, out_pixels)
        if owed is not None:
            d = tl.load(owed + at, mask=there, other=0.0)
        else:
            d = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
            if SURROGATE >= 0:
                by_m, by_v = _slopes(membranes[k], v, a, SURROGATE, SOFT)
                if level is not None:
                    level_sum += tl.where(there, d * by_v, 0.0)
                d *= by_m
            if grad_merged is not None:
                d += tl.load(grad_merged + at, mask=there, other=0.0).to(tl.float32)
            if share is not None:
                q = tl.load(out_index + k * P + i)
                d *= tl.load(share + q, mask=q < out_pixels, other=0.0)
            d = tl.where(there, d, 0.0)  # nothing is owed for what was padded
        slot = (k * B + b) * P + i
        if k + 1 < WINDOWS:
            d += carry
            if grad_handed is not None:
                last = inside & (c >= C - H)
                d += tl.load(grad_handed + slot * H + c - (C - H), mask=last, other=0.0).to(tl.float32)
        if FORM == _FIRST and k > 0:
            tau_sum += d * membranes[k - 1]
            carry = decay * d
        elif FORM == _RECURRENT or (FORM == _COUPLED and k > 0):
            before = membranes[k - 1] if k > 0 else none
            first, second = _operands(k, before, other, map_index, b, i, c, inside, B, P, C, map_pixels, FORM)
            value, by_a, by_b, by_c = _omega(first, second, angle, OMEGA)
            owes = decay * d
            tau_sum += d * value
            theta_sum += owes * by_c
            if FORM == _COUPLED:
                tl.store(by_other + (slot - B * P) * C + c, owes * by_a, mask=inside)
                carry = owes * by_b
            elif k > 1:
                carry = owes * by_b
                _to_map(owes * by_a, k, by_other, by_received, map_index, b, i, c, inside, B, P, C, map_pixels)
            elif k == 1:
                carry = owes * by_a
                to_second = owes * by_b
            else:
                _to_map(owes * by_a, 0, by_other, by_received, map_index, b, i, c, inside, B, P, C, map_pixels)
                to_second += owes * by_b
                _to_map(to_second, 1, by_other, by_received, map_index, b, i, c, inside, B, P, C, map_pixels)
        at, there = _offset(in_index, k, b, i, c, inside, B, P, C, in_slab, in_pixels)
        if norm is not None:
            x = tl.load(current + at, mask=there, other=0.0).to(tl.float32)
            shift_sum += tl.where(there, d, 0.0)
            scale_sum += tl.where(there, d * (x - mean), 0.0)
        if by_windows is not None:
            tl.store(by_windows + slot * C + c, d, mask=inside)
        else:
            tl.store(by_current + at, d * scale if SCALED else d, mask=there)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    to = sums + tl.program_id(0) * 5 * C + channels
    tl.store(to, tl.sum(shift_sum, 0), mask=channels < C)
    tl.store(to + C, tl.sum(scale_sum, 0), mask=channels < C)
    tl.store(to + 2 * C, tl.sum(tau_sum, 0), mask=channels < C)
    tl.store(to + 3 * C, tl.sum(theta_sum, 0), mask=channels < C)
    tl.store(to + 4 * C, tl.sum(level_sum, 0), mask=channels < C)


@triton.jit
def _to_map(d, k, on_map, buffer, index, b, i, c, inside, B, P, C, pixels):  # pragma: no cover
    """Store the gradient of window ``k`` of a map: in a buffer of windows, if there is one, else on the map."""
    if buffer is not None:
        tl.store(buffer + ((k * B + b) * P + i) * C + c, d, mask=inside)
    else:
        at, there = _offset(index, k, b, i, c, inside, B, P, C, pixels, pixels)
        tl.store(on_map + at, d, mask=there)


@triton.jit
def _collect(  # pragma: no cover
    buffer, covers, norm, out, B, P, C, Q,
    MOST: tl.constexpr, SCALED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of each of ``Q`` pixels of a map from those of the windows that cover it."""
    b, q, c, inside = _tile(B, Q, C, BLOCK_P, BLOCK_C)
    d = _collected(buffer, covers, b, q, c, inside, B, P, C, Q, MOST)
    if SCALED:
        _, scale, _ = _norm(norm, c, C)
        d *= scale
    tl.store(out + (b * Q + q) * C + c, d, mask=inside)


@triton.jit
def _statistics(current, sums, rows, C, REPEAT, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # pragma: no cover
    """Sums of what rows differ from the first row, and of its squares: no two large numbers are subtracted."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(current + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * REPEAT * BLOCK_P
    for r in range(REPEAT):
        row = begin + r * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        x = tl.load(current + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - first[None, :], 0.0)
        total += x
        square += x * x
    to = sums + tl.program_id(0) * 2 * C + c
    tl.store(to, tl.sum(total, 0), mask=c < C)
    tl.store(to + C, tl.sum(square, 0), mask=c < C)


@triton.jit
def _normalise(  # pragma: no cover
    current, sums, mean, var, weight, bias, norm, eps, tiles, rows, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean, variance, scale and shift, from the sums of tiles, if there are any, else from mean and variance."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if sums is not None:
        total = tl.zeros((BLOCK_C,), tl.float64)
        square = tl.zeros((BLOCK_C,), tl.float64)
        for t in range(0, tiles, BLOCK_P):
            tile = t + tl.arange(0, BLOCK_P)
            inside = (tile < tiles)[:, None] & (c < C)[None, :]
            at = sums + tile[:, None] * 2 * C + c[None, :]
            total += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), 0)
            square += tl.sum(tl.load(at + C, mask=inside, other=0.0).to(tl.float64), 0)
        total /= rows
        square = square / rows - total * total
        square = tl.where(square < 0.0, 0.0, square)  # NaN stays
        total += tl.load(current + c, mask=c < C, other=0.0).to(tl.float64)
    else:
        total = tl.load(mean + c, mask=c < C, other=0.0).to(tl.float64)
        square = tl.load(var + c, mask=c < C, other=1.0).to(tl.float64)
    scale = 1.0 / tl.sqrt(square + eps)
    if weight is not None:
        scale *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float64)
    shift = -total * scale
    if bias is not None:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float64)
    tl.store(norm + c, total.to(tl.float32), mask=c < C)
    tl.store(norm + C + c, square.to(tl.float32), mask=c < C)
    tl.store(norm + 2 * C + c, scale.to(tl.float32), mask=c < C)
    tl.store(norm + 3 * C + c, shift.to(tl.float32), mask=c < C)


@triton.jit
def _settle(  # pragma: no cover
    by_current, current, norm, totals, all_rows, eps, rows, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Take off what a norm's statistics owe, in place; they are of ``all_rows``, if given, else of these rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    every = rows if all_rows is None else tl.load(all_rows)
    var = tl.load(norm + C + c, mask=c < C, other=1.0).to(tl.float64)
    by_mean = tl.load(totals + c, mask=c < C, other=0.0).to(tl.float64) / every
    by_spread = tl.load(totals + C + c, mask=c < C, other=0.0).to(tl.float64) / every / (var + eps)
    mean, scale, _ = _norm(norm, c, C)
    x = tl.load(current + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    d = tl.load(by_current + at, mask=inside, other=0.0).to(tl.float32)
    d = scale[None, :] * (d - by_mean.to(tl.float32)[None, :] - x * by_spread.to(tl.float32)[None, :])
    tl.store(by_current + at, d, mask=inside)


class _Tiles:
    """Tiles over rows of channels.

    Args:
        rows: Number of rows, places of all images.
        channels: Number of channels.
        windows: How many tiles of rows a program keeps in its registers.
    """

    def __init__(self, rows: int, channels: int, windows: int = 1) -> None:
        self.block_c = min((64, 32, 16), key=lambda block: triton.cdiv(channels, block) * block)  # the fewest idle
        self.block_p = (1024 if windows > 1 else 2048) // self.block_c
        self.grid = triton.cdiv(rows, self.block_p), triton.cdiv(channels, self.block_c)

    def run(self, kernel: Any, x: Tensor, *args: Any, **constants: Any) -> None:
        """Run a kernel on the device of a map ``x``, its first argument."""
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            kernel[self.grid](x, *args, **constants, BLOCK_P=self.block_p, BLOCK_C=self.block_c)


@lru_cache(maxsize=1024)
def _covers(index: Tensor, pixels: int) -> Tensor | None:
    """Which windows cover a pixel.

    Args:
        index: For each window and place, its pixel; ``pixels`` where it has none.
        pixels: Number of pixels.

    Returns:
        ``(most, pixels)``: numbers of windows and places, ``k * places + i``, in their order, then -1. None where each
        pixel has one.
    """
    flat = index.flatten().long()
    slots = torch.nonzero(flat < pixels).flatten()
    slots = slots[torch.argsort(flat[slots], stable=True)]
    pixel = flat[slots]
    counts = torch.bincount(pixel, minlength=pixels)
    if bool((counts == 1).all()):
        return None
    rank = torch.arange(len(slots), device=index.device) - (counts.cumsum(0) - counts)[pixel]
    covers = torch.full((int(counts.max()), pixels), -1, dtype=torch.int32, device=index.device)
    covers[rank, pixel] = slots.int()
    return covers


class _Call:
    """A layer and its maps, as both passes see them."""

    def __init__(
        self,
        layer: Layer,
        at: Tables,
        current: Tensor,
        other: Tensor | None,
        norm: Tensor | None,
        given: Parameters,
    ) -> None:
        channels, n = current.shape[1], at.windows
        self.images = current.shape[0] // (n if n and layer.windows_in else 1)
        if layer.form == "still" and not (layer.windows_in or layer.windows_out or layer.handed):
            n = 0  # the mean of equal membranes is what they are
        self.cut = n > 0
        self.places = at.places if n else at.pixels
        self.tiles = _Tiles(self.images * self.places, channels, n)
        self.norm = norm
        found = vectors(given, channels)
        tau, self.theta, self.level, self.anneal = map(found.get, ("tau", "theta", "level", "anneal"))
        self.form = layer.form if n else "still"
        self.other = other if self.form in ("coupled", "recurrent") else None
        self.parameters = tau, self.other, self.theta, self.level, self.anneal
        self.indices = (at.index_in, at.index_out, at.index_map) if n else (None, None, None)
        self.share = at.share if n else None
        in_slab, out_slab = at.current[0] * at.current[1], at.out[0] * at.out[1]
        self.in_pixels = in_slab * (n if n and layer.windows_in else 1)
        self.out_pixels = out_slab * (n if n and layer.windows_out else 1)
        self.level_stride = int(self.level is not None and self.level.numel() > 1)
        self.sizes = (
            layer.threshold, self.images, self.places, channels, in_slab, self.in_pixels, out_slab, self.out_pixels,
            at.pixels, layer.handed, int(tau is not None and tau.numel() > 1), self.level_stride,
        )  # fmt: skip
        self.surrogate = SURROGATES.index(layer.surrogate) if layer.surrogate else -1
        self.soft = -1 if self.anneal is None else SOFT.index(layer.soft)
        self.visit = {"WINDOWS": max(n, 1), "FORM": FORMS.index(self.form), "OMEGA": OMEGAS.index(layer.omega)}

    def buffer(self, windows: int, current: Tensor) -> Tensor:
        """Room for the maps of windows, which overlap."""
        shape = (windows, self.images, self.places, current.shape[1])
        return torch.empty(shape, dtype=torch.float32, device=current.device)

    def forward(
        self,
        current: Tensor,
        residual: Tensor | None,
        out: Tensor | None,
        handed: Tensor | None,
        merged: Tensor | None,
        membranes: Tensor | None,
    ) -> None:
        """Visit the windows."""
        self.tiles.run(
            _forward, current, residual, self.norm, *self.parameters, out, handed, merged, membranes, *self.indices,
            *self.sizes, **self.visit, FIRES=self.surrogate >= 0, SOFT=self.soft,
        )  # fmt: skip

    def merging(self, at: Tables, current: Tensor) -> tuple[_Tiles, Tensor]:
        """Tiles over the pixels of the output, and which windows cover them."""
        covers = _covers(at.index_out, self.out_pixels)
        assert covers is not None
        return _Tiles(self.images * self.out_pixels, current.shape[1]), covers


def statistics(current: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm of its input's statistics: see :func:`lightning_msnn.kernels.native.statistics`."""
    channels = current.shape[1]
    rows = current.numel() // channels
    tiles = _Tiles(rows, channels)
    repeat = triton.cdiv(tiles.grid[0], _TILES)
    tiles.grid = triton.cdiv(tiles.grid[0], repeat), tiles.grid[1]
    sums = torch.empty(tiles.grid[0], 2, channels, dtype=torch.float32, device=current.device)
    tiles.run(_statistics, current, sums, rows, channels, repeat)
    return _norm_of(current, sums, Parameters(weight=weight, bias=bias), eps, rows)


def _norm_of(x: Tensor, sums: Tensor | None, given: Parameters, eps: float, rows: int) -> Tensor:
    """The norm, from the sums of tiles of a map ``x``, or from the running statistics, of which ``x`` is one."""
    channels = x.shape[0] if sums is None else x.shape[1]
    norm = torch.empty(4, channels, dtype=torch.float32, device=x.device)
    found = vectors(given, channels)
    weight, bias, mean, var = map(found.get, ("weight", "bias", "running_mean", "running_var"))
    tiles = 0 if sums is None else len(sums)
    _Tiles(1, channels).run(_normalise, x, sums, mean, var, weight, bias, norm, eps, tiles, rows, channels)
    return norm


def forward(
    layer: Layer,
    size: tuple[int, int],
    current: Tensor,
    residual: Tensor | None,
    other: Tensor | None,
    before: None,
    norm: Tensor | None,
    given: Parameters,
    out: Tensor,
    handed: Tensor | None,
    merged: Tensor | None,
    after: None,
) -> Tensor | None:
    """Write what a layer returns, hands on and keeps: see :func:`lightning_msnn.kernels.native.forward`."""
    at = tables(layer, *size, current.device)
    if norm is None and layer.training:
        norm = statistics(current, given.get("weight"), given.get("bias"), layer.eps)
    elif norm is None and (mean := given.get("running_mean")) is not None:
        norm = _norm_of(mean, None, given, layer.eps, 1)
    call = _Call(layer, at, current, other, norm, given)
    n, images, channels = at.windows, call.images, current.shape[1]
    residual = None if layer.surrogate else residual
    if call.share is None:
        call.forward(current, residual, out, handed, merged, None)
    else:
        membranes = call.buffer(n, current)
        call.forward(current, None, None, handed, None, membranes)
        tiles, covers = call.merging(at, current)
        tiles.run(
            _merge, membranes, covers, call.share, residual, call.level, call.anneal, out, merged, layer.threshold,
            images, call.places, channels, call.out_pixels, call.level_stride,
            MOST=len(covers), FIRES=call.surrogate >= 0, SOFT=call.soft,
        )  # fmt: skip
    return norm


def backward(
    layer: Layer,
    size: tuple[int, int],
    grad: Tensor,
    grad_handed: Tensor | None,
    grad_merged: Tensor | None,
    grad_after: None,
    current: Tensor,
    other: Tensor | None,
    before: None,
    norm: Tensor,
    given: Parameters,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, and sums by channel: see :func:`lightning_msnn.kernels.native.backward`."""
    at = tables(layer, *size, current.device)
    call = _Call(layer, at, current, other, norm if norm.numel() else None, given)
    images, places, channels, n = call.images, call.places, current.shape[1], call.visit["WINDOWS"]
    owed, levels = None, None
    if call.share is not None and layer.surrogate:
        membranes = call.buffer(n, current)
        call.forward(current, None, None, None, None, membranes)
        tiles, covers = call.merging(at, current)
        owed = torch.empty(images, call.out_pixels, channels, dtype=torch.float32, device=current.device)
        levels = torch.empty(tiles.grid[0] if call.level is not None else 0, channels, device=current.device)
        tiles.run(
            _owe, membranes, covers, call.share, grad, grad_merged, call.level, call.anneal, owed, levels,
            layer.threshold, images, places, channels, call.out_pixels, call.level_stride,
            MOST=len(covers), SURROGATE=call.surrogate, SOFT=call.soft,
        )  # fmt: skip
    on_current = _covers(at.index_in, call.in_pixels) if call.cut else None
    recurrent = call.form == "recurrent"
    on_map = _covers(at.index_map, at.pixels) if recurrent else None
    by_current = torch.empty_like(current)
    by_windows = None if on_current is None else call.buffer(n, current)
    by_received = None if on_map is None else call.buffer(n, current)
    if other is None:
        by_other = current.new_empty(0)
    else:
        by_other = torch.zeros_like(other) if call.other is None else torch.empty_like(other)
    sums = torch.empty(call.tiles.grid[0], _SUMS, channels, dtype=torch.float32, device=current.device)
    scaled = call.norm is not None and not layer.training
    call.tiles.run(
        _backward, grad, grad_handed if layer.handed and call.cut else None, grad_merged, owed, call.share, current,
        call.norm, *call.parameters, by_current, by_windows, by_other if call.other is not None else None, by_received,
        sums, *call.indices, *call.sizes, **call.visit, SURROGATE=call.surrogate, SOFT=call.soft, SCALED=scaled,
        num_warps=8,  # of which each holds few elements: what all windows need fits into its registers
    )  # fmt: skip
    collect = [(by_windows, on_current, by_current, scaled), (by_received, on_map, by_other, False)]
    for buffer, covers_, out, scaled_ in collect:
        if buffer is not None and covers_ is not None:
            pixels = covers_.shape[1]
            _Tiles(images * pixels, channels).run(
                _collect, buffer, covers_, call.norm, out, images, places, channels, pixels,
                MOST=len(covers_), SCALED=scaled_,
            )  # fmt: skip
    totals = torch.zeros(SUMS + 2, channels, dtype=torch.float32, device=current.device)
    totals[:_SUMS] = sums.sum(0, dtype=torch.float64)
    if levels is not None:
        totals[4] = levels.sum(0, dtype=torch.float64)
    if layer.training and whole:
        _take_off(by_current, current, norm, totals, None, layer.eps)
    return by_current, by_other, current.new_empty(0), totals


def settle(by_current: Tensor, current: Tensor, norm: Tensor, totals: Tensor, rows: Tensor, eps: float) -> None:
    """The gradient of the current, in place: see :func:`lightning_msnn.kernels.native.settle`."""
    _take_off(by_current, current, norm, totals, rows, eps)


def _take_off(
    by_current: Tensor, current: Tensor, norm: Tensor, totals: Tensor, rows: Tensor | None, eps: float
) -> None:
    channels = current.shape[1]
    here = current.numel() // channels
    _Tiles(here, channels).run(_settle, by_current, current, norm, totals, rows, eps, here, channels)
