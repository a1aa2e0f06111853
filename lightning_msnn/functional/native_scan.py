"""The scans over windows in C, for CPUs with a compiler beside them: one pass over the map forward, one backward.

:mod:`~lightning_msnn.functional.fused` chooses them for float32 and bfloat16 maps in channels-last order; its functions
say what they compute, and ``native_scan.c`` how. Membranes are float32 while they travel from window to window.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_msnn.functional.eager_scan import BATCH, window_buffer
from lightning_msnn.functional.geometry import OMEGAS, Geometry
from lightning_msnn.native import build

__all__ = [
    "DTYPES",
    "OMEGAS",
    "available",
    "coupled_backward",
    "coupled_forward",
    "recurrent_backward",
    "recurrent_forward",
    "scan_backward",
    "scan_forward",
    "takes",
    "triangular_backward",
]

DTYPES = (torch.float32, torch.bfloat16)
"""Data types of maps that the kernels take."""

_FIRST_LAYER = len(OMEGAS)
_GRAIN = 32768  # elements that are worth a thread
_SUMS = 2**18  # numbers that a task sums on a map, at most, if it has more than _CHANNELS channels: 1 MiB
_CHANNELS = 32


class _Call(ctypes.Structure):
    """``Call`` of the C source."""

    _fields_ = [("geometry", ctypes.c_int64 * 20)] + [
        (name, ctypes.c_void_p)
        for name in (
            *("current", "first", "owed", "windows", "merged", "by_first"),
            *("tau", "theta", "by_tau", "by_theta"),
        )
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = build(Path(__file__).with_suffix(".c"))
    if library is not None:
        for name in ("msnn_forward", "msnn_backward", "msnn_recur", "msnn_recur_back"):
            getattr(library, name).argtypes = [ctypes.POINTER(_Call), ctypes.c_int, ctypes.c_int]
        pointers = [ctypes.c_void_p] * 3
        library.msnn_triangular.argtypes = [*pointers, ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_int]
        library.msnn_triangular.restype = None
    return library


def available() -> bool:
    """Whether there is a library; the first call on a machine compiles it."""
    return _library() is not None


def _plain(x: Tensor) -> bool:
    """Whether a tensor has memory on the CPU that a pointer may address, and a type that the kernels take."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in DTYPES and x.layout is torch.strided


def takes(x: Tensor) -> bool:
    """Whether the kernels take a map: of a type in :data:`DTYPES`, on the CPU, in channels-last order.

    Args:
        x: Map ``(B, C, H, W)``; a tensor of fewer axes is none.
    """
    last = x.dim() > 3 and x.movedim(-3, -1).is_contiguous()
    return last and x.numel() > 0 and _plain(x) and available()


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _GRAIN))


def _in_order(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a map or windows of one with channels last in memory."""
    return x.movedim(-3, -1).to(dtype).contiguous().movedim(-1, -3)


def _parameters(tau: Tensor, theta: Tensor | None, channels: int) -> dict[str, Tensor]:
    """The decay of each channel, and theta, of which there is none in layer 1."""
    given = {"tau": (tau, channels)} if theta is None else {"tau": (tau, channels), "theta": (theta, 1)}
    return {name: x.detach().to(torch.float32).reshape(-1).expand(n).contiguous() for name, (x, n) in given.items()}


def _check(x: Tensor, like: Tensor, what: str) -> None:
    """Refuse what would be read beyond its end.

    Raises:
        ValueError: If the shapes differ.
    """
    if x.shape != like.shape:
        raise ValueError(f"{what} must have the shape {tuple(like.shape)}, not {tuple(x.shape)}")


def _call(x: Tensor, kind: str, partition: bool) -> _Call:
    """Describe a map and its windows."""
    g = Geometry(x, kind)
    n, channels, height, width, h, w = g.sizes
    threads = _threads(x.numel())
    block = channels if n >= threads else min(channels, 64)
    if not partition and height * width * block > _SUMS:
        block = min(block, _CHANNELS)
    slot_batch = h * w * channels
    call = _Call()
    call.geometry[:] = [
        *g.sizes, g.batch, g.row, g.column, g.down, g.right, 0, *g.offsets, n * slot_batch, slot_batch,
        int(not partition), threads, block,
    ]  # fmt: skip
    return call


def _run(function: str, call: _Call, number: int, dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise RuntimeError(f"expected all tensors to be on the CPU, but {name} is on {tensor.device}")
        setattr(call, name, tensor.data_ptr())
    if getattr(_library(), function)(ctypes.byref(call), number, int(dtype == torch.bfloat16)):
        raise MemoryError("no memory for the sums of windows that overlap")


def _forward(
    current: Tensor, first: Tensor | None, tau: Tensor, theta: Tensor | None, number: int, kind: str, partition: bool
) -> tuple[Tensor, Tensor]:
    """Return the merged map and the windows' membranes, which are the same for a partition."""
    merged = torch.empty_like(current)
    windows = merged if partition else window_buffer(current, kind)
    seen = windows if first is None else _in_order(first, current.dtype)
    _check(seen, windows, "membranes of layer 1")
    _run(
        "msnn_forward", _call(current, kind, partition), number, current.dtype,
        current=current, first=seen, windows=windows, merged=merged, **_parameters(tau, theta, current.shape[1]),
    )  # fmt: skip
    return merged, windows


def _backward(
    function: str,
    grad: Tensor,
    owed: Tensor | None,
    first: Tensor | None,
    windows: Tensor,
    tau: Tensor,
    theta: Tensor | None,
    number: int,
    kind: str,
    partition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the current, of layer 1's membranes, and by channel those of tau and of theta."""
    channels = grad.shape[1]
    windows = _in_order(windows, grad.dtype)
    seen = windows if first is None else _in_order(first, grad.dtype)
    call = _call(grad, kind, partition)
    by_current, by_first = torch.empty_like(grad), torch.empty_like(seen)
    by_tau, by_theta = torch.zeros(2, call.geometry[0], channels, dtype=torch.float32, device="cpu")
    owed = windows if owed is None else _in_order(owed, grad.dtype)
    _run(
        function, call, number, grad.dtype,
        current=grad, first=seen, owed=owed, windows=windows, merged=by_current, by_first=by_first,
        by_tau=by_tau, by_theta=by_theta, **_parameters(tau, theta, channels),
    )  # fmt: skip
    if first is not None and by_first.stride() != first.stride():
        by_first = torch.empty_like(first).copy_(by_first)
    return by_current, by_first, by_tau, by_theta


def _sum_to(by_channel: Tensor, parameter: Tensor) -> Tensor:
    """Sum gradients by image and channel over all that shares a parameter."""
    total = by_channel.sum(0) if parameter.numel() > 1 else by_channel.sum()
    return total.reshape(parameter.shape).to(parameter.dtype)


def _gradients(
    found: tuple[Tensor, Tensor, Tensor, Tensor], tau: Tensor | None, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Sum the gradients of those parameters that are learnt."""
    by_current, by_first, by_tau, by_theta = found
    return (
        by_current,
        by_first,
        None if tau is None else _sum_to(by_tau, tau),
        None if theta is None else _sum_to(by_theta * torch.pi, theta),
    )


def scan_forward(current: Tensor, tau: Tensor, kind: str, partition: bool) -> tuple[Tensor, Tensor]:
    """Layer 1: see :func:`lightning_msnn.functional.eager_scan.scan_forward`."""
    return _forward(current, None, tau, None, _FIRST_LAYER, kind, partition)


def scan_backward(
    grad: Tensor, by_windows: Tensor | None, windows: Tensor, tau: Tensor, kind: str, partition: bool, wants_tau: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of layer 1: see :func:`lightning_msnn.functional.eager_scan.scan_backward`."""
    by_current, _, by_tau, _ = _backward(
        "msnn_backward", grad, by_windows, None, windows, tau, None, _FIRST_LAYER, kind, partition
    )
    return by_current, _sum_to(by_tau, tau) if wants_tau else None


def coupled_forward(
    current: Tensor, first: Tensor, tau: Tensor, theta: Tensor, omega: str, kind: str, partition: bool
) -> tuple[Tensor, Tensor]:
    """Layer 2: see :func:`lightning_msnn.functional.eager_scan.coupled_forward`."""
    return _forward(current, first, tau, theta, OMEGAS[omega], kind, partition)


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
    return _gradients(
        _backward("msnn_backward", grad, None, first, windows, tau, theta, OMEGAS[omega], kind, partition),
        tau if wants_tau else None,
        theta if wants_theta else None,
    )


def recurrent_forward(current: Tensor, before: Tensor, tau: Tensor, theta: Tensor, omega: str) -> Tensor:
    """A membrane map that travels: see :func:`lightning_msnn.functional.eager_scan.recurrent_forward`."""
    membranes = torch.empty_like(current)
    first = _in_order(before, current.dtype)
    _check(first, current, "the map that was received")
    _run(
        "msnn_recur", _call(current, BATCH, True), OMEGAS[omega], current.dtype,
        current=current, first=first, windows=membranes, **_parameters(tau, theta, current.shape[1]),
    )  # fmt: skip
    return membranes


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
    """Gradients of the travelling map: see :func:`lightning_msnn.functional.eager_scan.recurrent_backward`."""
    return _gradients(
        _backward("msnn_recur_back", grad, None, before, membranes, tau, theta, OMEGAS[omega], BATCH, True),
        tau if wants_tau else None,
        theta if wants_theta else None,
    )


def triangular_backward(grad: Tensor, membrane: Tensor, threshold: float) -> Tensor | None:
    """Gradient of spikes by the triangular surrogate, in one pass: ``grad (1 - min(|membrane - threshold|, 1))``.

    Args:
        grad: Gradient of the spikes, any shape.
        membrane: Membrane, shape of ``grad``.
        threshold: Threshold.

    Returns:
        Gradient of the membrane; None where the tensors are not such as the kernels take, or lie differently.
    """
    alike = grad.stride() == membrane.stride() and grad.dtype == membrane.dtype
    if not alike or not (_plain(grad) and _plain(membrane) and available()):
        return None
    out = torch.empty_like(membrane)
    if out.stride() != membrane.stride():  # neither tensor has gaps or overlaps
        return None
    n = membrane.numel()
    library = _library()
    assert library is not None
    library.msnn_triangular(
        grad.data_ptr(), membrane.data_ptr(), out.data_ptr(), n, threshold, _threads(n), membrane.dtype == DTYPES[1]
    )
    return out
