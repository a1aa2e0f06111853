"""The scans over windows as Triton kernels, for CUDA: one pass over the map forward, one backward.

:mod:`~lightning_msnn.functional.fused` chooses them for tensors on a CUDA device; its functions say what they compute.
Each program takes a tile of places in a window and of channels and visits the four windows in its registers, where
membranes are float32 whatever the data type of the map. Windows that overlap take a second pass, in which each pixel
collects what the windows that cover it hand over. Gradients of decays and thetas are sums of one partial sum for each
tile, so that they do not depend on the order in which tiles finish.

With ``TRITON_INTERPRET=1`` in the environment before the first import, the kernels run on the CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_msnn.functional.eager_scan import window_buffer
from lightning_msnn.functional.geometry import OMEGAS, Geometry

__all__ = ["DTYPES", "OMEGAS", "coupled_backward", "coupled_forward", "scan_backward", "scan_forward"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Data types of maps that the kernels take."""


@triton.jit
def _omega(a, b, c, KIND: tl.constexpr):  # pragma: no cover
    """A projection's value and its derivatives by ``a``, by ``b`` and by ``c = pi theta``."""
    if KIND == 0:  # sine
        cosine = tl.cos(b * c)
        inner = a * c * cosine
        outer = 2.0 * tl.cos(inner)
        value = 2.0 * tl.sin(inner)
        slope = tl.sin(b * c)
        by_a = outer * c * cosine
        by_b = -outer * a * c * c * slope
        by_c = outer * a * (cosine - b * c * slope)
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
        by_a = tl.where(x == 0.0, 0.0, c * fade)
        by_b = by_a
        by_c = 2.0 * x * fade
    elif KIND == 4:  # polynomial
        y = tl.minimum(tl.maximum(0.5 * c * (a + b), -1.0), 1.0)
        value = y * (3.0 - y * y)
        by_a = 1.5 * c * (1.0 - y * y)
        by_b = by_a
        by_c = 1.5 * (a + b) * (1.0 - y * y)
    elif KIND == 5:  # piecewise linear
        z = c * (a + b)
        value = tl.minimum(tl.maximum(z, -2.0), 2.0)
        by_a = tl.where(tl.abs(z) <= 2.0, c, 0.0)
        by_b = by_a
        by_c = tl.where(tl.abs(z) <= 2.0, a + b, 0.0)
    else:  # none
        value = b
        by_a = tl.zeros(a.shape, tl.float32)
        by_b = tl.full(a.shape, 1.0, tl.float32)
        by_c = by_a
    return value, by_a, by_b, by_c


@triton.jit
def _tile(B, C, h, w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # pragma: no cover
    """Image, row and column of this tile's places, its channels, and which of them exist."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < B * h * w)[:, None] & (c < C)[None, :]
    b = (p // (h * w)).to(tl.int64)  # a large map has more elements than 32 bits count
    i = (p // w) % h
    j = p % w
    return b[:, None], i[:, None], j[:, None], c[None, :], inside


@triton.jit
def _share(i, j, k: tl.constexpr, H, W, h, w):  # pragma: no cover
    """One over the number of windows that cover row ``i`` and column ``j`` of window ``k``."""
    y = i + (k // 2) * (H - h)
    x = j + (k % 2) * (W - w)
    rows = (y < h).to(tl.float32) + (y >= H - h).to(tl.float32)
    columns = (x < w).to(tl.float32) + (x >= W - w).to(tl.float32)
    return 1.0 / (rows * columns)


@triton.jit
def _forward(  # pragma: no cover
    current, first, membrane, tau, theta,
    B, C, H, W, h, w, mb, mc, mi, mj, o1, o2, o3, wk, wb, wc, wi, wj, tau_stride,
    COUPLED: tl.constexpr, OVERLAP: tl.constexpr, OMEGA: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Membranes of the windows: on the map where windows are a partition, else of the first three in a buffer."""
    b, i, j, c, inside = _tile(B, C, h, w, BLOCK_P, BLOCK_C)
    decay = tl.load(tau + c * tau_stride, mask=c < C, other=0.0).to(tl.float32)
    angle = tl.load(theta).to(tl.float32) * 3.141592653589793 if COUPLED else 0.0
    place = b * mb + c * mc + i * mi + j * mj
    slot = b * wb + c * wc + i * wi + j * wj
    u = tl.load(current + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(membrane + (slot if OVERLAP else place), u, mask=inside)
    for k in tl.static_range(1, 3 if OVERLAP else 4):
        before = 0 if k == 1 else (o1 if k == 2 else o2)
        here = o1 if k == 1 else (o2 if k == 2 else o3)
        carried = u
        if COUPLED:
            a = tl.load(first + (slot + (k - 1) * wk if OVERLAP else place + before), mask=inside, other=0.0)
            carried, _, _, _ = _omega(a.to(tl.float32), u, angle, OMEGA)
        u = tl.load(current + place + here, mask=inside, other=0.0).to(tl.float32) + decay * carried
        tl.store(membrane + (slot + k * wk if OVERLAP else place + here), u, mask=inside)


@triton.jit
def _merge(  # pragma: no cover
    current, first, windows, merged, tau, theta,
    B, C, H, W, h, w, mb, mc, mi, mj, wk, wb, wc, wi, wj, tau_stride,
    COUPLED: tl.constexpr, OMEGA: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The merged map of windows that overlap: the current, and the mean of what the windows carry to a pixel."""
    b, y, x, c, inside = _tile(B, C, H, W, BLOCK_P, BLOCK_C)
    decay = tl.load(tau + c * tau_stride, mask=c < C, other=0.0).to(tl.float32)
    angle = tl.load(theta).to(tl.float32) * 3.141592653589793 if COUPLED else 0.0
    place = b * mb + c * mc + y * mi + x * mj
    total = tl.load(current + place, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(1, 4):
        i = y - (k // 2) * (H - h)
        j = x - (k % 2) * (W - w)
        covered = inside & (i >= 0) & (i < h) & (j >= 0) & (j < w)
        slot = b * wb + c * wc + i * wi + j * wj + (k - 1) * wk
        carried = tl.load(windows + slot, mask=covered, other=0.0).to(tl.float32)
        if COUPLED:
            a = tl.load(first + slot, mask=covered, other=0.0).to(tl.float32)
            carried, _, _, _ = _omega(a, carried, angle, OMEGA)
        total += tl.where(covered, decay * carried * _share(i, j, k, H, W, h, w), 0.0)
    tl.store(merged + place, total, mask=inside)


@triton.jit
def _backward(  # pragma: no cover
    grad, by_windows, first, membrane, tau, theta, by_current, by_first, by_tau, by_theta,
    B, C, H, W, h, w, mb, mc, mi, mj, o1, o2, o3, wk, wb, wc, wi, wj, tau_stride,
    COUPLED: tl.constexpr, OVERLAP: tl.constexpr, OMEGA: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients from the last window to the first; where windows overlap, what each is owed beside the map's own."""
    b, i, j, c, inside = _tile(B, C, h, w, BLOCK_P, BLOCK_C)
    decay = tl.load(tau + c * tau_stride, mask=c < C, other=0.0).to(tl.float32)
    angle = tl.load(theta).to(tl.float32) * 3.141592653589793 if COUPLED else 0.0
    place = b * mb + c * mc + i * mi + j * mj
    slot = b * wb + c * wc + i * wi + j * wj
    tau_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    theta_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    d = tl.load(grad + place + o3, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        d = d * _share(i, j, 3, H, W, h, w)
    else:
        tl.store(by_current + place + o3, d, mask=inside)
        if COUPLED:
            tl.store(by_first + place + o3, tl.zeros(d.shape, tl.float32), mask=inside)
    for k in tl.static_range(2, -1, -1):
        here = 0 if k == 0 else (o1 if k == 1 else o2)
        where = slot + k * wk if OVERLAP else place + here
        u = tl.load(membrane + where, mask=inside, other=0.0).to(tl.float32)
        owed = decay * d
        carried = u
        if COUPLED:
            a = tl.load(first + where, mask=inside, other=0.0).to(tl.float32)
            carried, by_a, by_b, by_c = _omega(a, u, angle, OMEGA)
            tl.store(by_first + where, owed * by_a, mask=inside)
            theta_sum += tl.where(inside, owed * by_c, 0.0)
        tau_sum += tl.where(inside, d * carried, 0.0)
        if COUPLED:
            owed = owed * by_b
        elif OVERLAP:
            owed += tl.load(by_windows + where, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + place + here, mask=inside, other=0.0).to(tl.float32)
        if OVERLAP:
            tl.store(by_current + where, owed, mask=inside)
            d = owed + d * _share(i, j, k, H, W, h, w)
        else:
            d = owed + d
            tl.store(by_current + place + here, d, mask=inside)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(by_tau + tl.program_id(0) * C + channels, tl.sum(tau_sum, 0), mask=channels < C)
    if COUPLED:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(by_theta + tile, tl.sum(tl.sum(theta_sum, 0), 0) * 3.141592653589793)


@triton.jit
def _collect(  # pragma: no cover
    grad, owed, by_current,
    B, C, H, W, h, w, mb, mc, mi, mj, wk, wb, wc, wi, wj,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The current's gradient where windows overlap: that of the map, and what the first three windows are owed."""
    b, y, x, c, inside = _tile(B, C, H, W, BLOCK_P, BLOCK_C)
    place = b * mb + c * mc + y * mi + x * mj
    total = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(0, 3):
        i = y - (k // 2) * (H - h)
        j = x - (k % 2) * (W - w)
        covered = inside & (i >= 0) & (i < h) & (j >= 0) & (j < w)
        total += tl.load(owed + b * wb + c * wc + i * wi + j * wj + k * wk, mask=covered, other=0.0).to(tl.float32)
    tl.store(by_current + place, total, mask=inside)


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a map in one of the two memory orders, that of ``like`` if given."""
    if like is not None:
        return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Geometry(Geometry):
    """The same with the tiles that cover them."""

    def __init__(self, x: Tensor, kind: str) -> None:
        super().__init__(x, kind)
        self.window = (self.batch, self.channel, self.down, self.right)
        self.whole = (self.batch, self.channel, self.row, self.column)
        channels = x.shape[1]
        last = self.channel == 1 and channels > 1
        self.block_c = min(64, triton.next_power_of_2(channels)) if last else 1
        self.block_p = max(1, 1024 // self.block_c) if last else 512

    def slots(self, windows: Tensor | None) -> tuple[int, ...]:
        """Strides of such a buffer; zeros where there is none."""
        return (0,) * 5 if windows is None else windows.stride()

    def grid(self, whole: bool) -> tuple[int, int]:
        """Tiles over the places of a window, or of the whole map, and over channels."""
        n, channels, height, width, h, w = self.sizes
        places = n * (height * width if whole else h * w)
        return triton.cdiv(places, self.block_p), triton.cdiv(channels, self.block_c)

    @property
    def blocks(self) -> dict[str, int]:
        """Sizes of a tile."""
        return {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}


def _run_forward(
    current: Tensor, first: Tensor | None, tau: Tensor, theta: Tensor, number: int, kind: str, partition: bool
) -> tuple[Tensor, Tensor]:
    """Return the merged map and the windows' membranes, which are the same for a partition."""
    g = _Geometry(current, kind)
    membrane = torch.empty_like(current) if partition else window_buffer(current, kind)
    slots = g.slots(None if partition else membrane)
    coupled, tau_stride = first is not None, int(tau.numel() > 1)
    seen = current if first is None else _dense(first, membrane)
    _forward[g.grid(False)](
        current, seen, membrane, tau, theta, *g.sizes, *g.window, *g.offsets, *slots, tau_stride,
        COUPLED=coupled, OVERLAP=not partition, OMEGA=number, **g.blocks,
    )  # fmt: skip
    if partition:
        return membrane, membrane
    merged = torch.empty_like(current)
    _merge[g.grid(True)](
        current, seen, membrane, merged, tau, theta, *g.sizes, *g.whole, *slots, tau_stride,
        COUPLED=coupled, OMEGA=number, **g.blocks,
    )  # fmt: skip
    return merged, membrane


def _run_backward(
    grad: Tensor,
    by_windows: Tensor | None,
    first: Tensor | None,
    membrane: Tensor,
    tau: Tensor,
    theta: Tensor,
    number: int,
    kind: str,
    partition: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of the current, of layer 1's membranes, of tau and of theta."""
    g = _Geometry(grad, kind)
    coupled = first is not None
    first = membrane if first is None else _dense(first, membrane)
    channels, slots = g.sizes[1], g.slots(None if partition else membrane)
    by_current = torch.empty_like(grad if partition else membrane)
    by_first = torch.empty_like(first) if coupled else None
    tiles = g.grid(False)
    by_tau = torch.empty(tiles[0], channels, dtype=torch.float32, device=grad.device)
    by_theta = torch.zeros(tiles if coupled else (1,), dtype=torch.float32, device=grad.device)
    _backward[tiles](
        grad, grad if by_windows is None else by_windows, first, membrane, tau, theta,
        by_current, by_current if by_first is None else by_first, by_tau, by_theta,
        *g.sizes, *g.window, *g.offsets, *slots, int(tau.numel() > 1),
        COUPLED=coupled, OVERLAP=not partition, OMEGA=number, **g.blocks,
    )  # fmt: skip
    total = by_tau.sum(0) if tau.numel() > 1 else by_tau.sum()
    gradients = by_first, total.reshape(tau.shape).to(tau.dtype), by_theta.sum()
    if partition:
        return by_current, *gradients
    collected = torch.empty_like(grad)
    _collect[g.grid(True)](grad, by_current, collected, *g.sizes, *g.whole, *slots, **g.blocks)
    return collected, *gradients


def scan_forward(current: Tensor, tau: Tensor, kind: str, partition: bool) -> tuple[Tensor, Tensor]:
    """Layer 1: see :func:`lightning_msnn.functional.eager_scan.scan_forward`."""
    return _run_forward(_dense(current), None, tau, tau, 0, kind, partition)


def scan_backward(
    grad: Tensor, by_windows: Tensor | None, windows: Tensor, tau: Tensor, kind: str, partition: bool, wants_tau: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of layer 1: see :func:`lightning_msnn.functional.eager_scan.scan_backward`."""
    grad = _dense(grad, windows if partition else None)
    by_windows = None if by_windows is None else _dense(by_windows, windows)
    by_current, _, by_tau, _ = _run_backward(grad, by_windows, None, windows, tau, tau, 0, kind, partition)
    return by_current, by_tau if wants_tau else None


def coupled_forward(
    current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str, partition: bool
) -> tuple[Tensor, Tensor]:
    """Layer 2: see :func:`lightning_msnn.functional.eager_scan.coupled_forward`."""
    return _run_forward(_dense(current), first, tau, theta, OMEGAS[omega], kind, partition)


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
    """Gradients of layer 2: see :func:`lightning_msnn.functional.eager_scan.coupled_backward`."""
    grad = _dense(grad, windows if partition else None)
    by_current, by_first, by_tau, by_theta = _run_backward(
        grad, None, first, windows, tau, theta, OMEGAS[omega], kind, partition
    )
    assert by_first is not None
    by_theta = by_theta.reshape(theta.shape).to(theta.dtype)
    return by_current, by_first, by_tau if wants_tau else None, by_theta if wants_theta else None
