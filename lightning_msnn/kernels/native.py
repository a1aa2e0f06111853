"""The kernels in C, for CPUs with a compiler beside them: see :mod:`~lightning_msnn.kernels.layer` and ``native.c``."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.kernels.compiler import build
from lightning_msnn.kernels.geometry import FORMS, OMEGAS, Layer, Tables, Tensors, tables

__all__ = ["backward", "forward", "library"]

DTYPES = (torch.float32, torch.bfloat16)
"""Data types of maps."""
SUMS = 5
"""Sums by channel that a backward pass makes."""
ONE, ONE_OR_EACH = ("theta", "anneal"), ("tau", "level")
"""Parameters that are one number, and those that are one or one for each channel; others are one for each."""

_GRAIN = 32768  # elements that are worth a thread
_GROUPS = 16  # of images, for one thread as for many
_CACHE = 2**17  # floats that the maps of a task may take
_RUN = 1024  # floats that are worth a loop, at most

_INTEGERS = (
    *("images", "channels", "in_pixels", "in_slabs", "out_pixels", "out_slabs", "windows", "places", "run"),
    *("other_pixels", "handed", "groups", "block", "threads", "rows", "row_groups", "row_block"),
    *("in_overlaps", "out_overlaps", "padded", "form", "omega", "fires"),
    *("batch_statistics", "tau_stride", "level_stride", "bf16", "bytes", "levels"),
)
_POINTERS = (
    *("in_index", "out_index", "other_index", "share", "current", "residual", "other", "weight", "bias"),
    *("running_mean", "running_var", "norm", "tau", "theta", "level", "anneal", "out", "handed_on", "merged"),
    *("grad", "grad_handed", "grad_merged", "grad_current", "grad_other", "moments", "sums", "totals"),
)


class _Call(ctypes.Structure):
    """``Call`` of the C source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("eps", ctypes.c_double),
        ("threshold", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if there is none; the first call on a machine compiles it."""
    made = build(Path(__file__).with_suffix(".c"))
    if made is not None:
        for name in ("msnn_forward", "msnn_backward"):
            getattr(made, name).argtypes = [ctypes.POINTER(_Call)]
    return made


def _run(function: str, call: _Call, given: Any, **maps: Tensor | None) -> None:
    """Run a function of the library on maps, and on parameters, which it reads contiguous and in float32.

    Raises:
        ValueError: If a parameter has another number of values than the function reads.
    """
    for name, x in given.items():
        if name in ("residual", "other"):
            maps[name] = x
        elif x is not None:
            values = x.numel()
            one = values == 1 and (name in ONE or name in ONE_OR_EACH)
            if not one and (values != call.channels or name in ONE):
                raise ValueError(f"{name} must have {1 if name in ONE else call.channels} numbers, not {values}")
            if name in ONE_OR_EACH:
                setattr(call, f"{name}_stride", values > 1)
            maps[name] = x.contiguous().float()
    for name, x in maps.items():
        if x is not None:
            if not x.is_cpu:
                raise RuntimeError(f"expected all tensors to be on the CPU, but {name} is on {x.device}")
            setattr(call, name, x.data_ptr())
    if getattr(library(), function)(ctypes.byref(call)):
        raise MemoryError("no memory for the maps of a layer of neurons")


@lru_cache(maxsize=2048)
def _plan(
    layer: Layer, height: int, width: int, shape: torch.Size, dtype: torch.dtype, threads: int, backward: bool
) -> tuple[_Call, Tables]:
    """A call without its tensors, and the tables that it points to."""
    at = tables(layer.kind, layer.windows_in, layer.windows_out, height, width)
    n, call = at.windows, _Call()
    call.channels, call.bf16 = shape[1], dtype == torch.bfloat16
    call.rows = shape.numel() // shape[1]
    call.row_groups = max(1, min(_GROUPS, shape.numel() // 4096, call.rows))
    call.row_block = shape[1] if shape[1] <= 1024 else 256
    call.threads = max(1, min(threads, shape.numel() // _GRAIN))
    if not n:
        call.images, call.groups, call.block = call.rows, call.row_groups, call.row_block
        call.in_pixels = call.out_pixels = call.in_slabs = call.out_slabs = call.run = 1
    else:
        call.images = shape[0] // (n if layer.windows_in else 1)
        call.windows, call.places, call.other_pixels = n, at.places, at.pixels
        call.in_slabs, call.out_slabs = (n if layer.windows_in else 1), (n if layer.windows_out else 1)
        call.in_pixels = at.current[0] * at.current[1] * call.in_slabs
        call.out_pixels = at.out[0] * at.out[1] * call.out_slabs
        call.form, call.omega = FORMS.index(layer.form), list(OMEGAS).index(layer.omega)
        call.handed = layer.handed
        call.in_overlaps, call.out_overlaps = at.overlaps and not layer.windows_in, at.share is not None
        call.padded = at.padded
        floats = call.out_pixels * call.out_overlaps + call.in_pixels * call.in_overlaps * backward
        floats += at.pixels * (layer.form == "recurrent") + 21 * at.run
        call.block = max(16, min(call.channels, _CACHE // floats // 16 * 16))
        whole = call.block >= call.channels and layer.handed in (0, call.channels)
        call.run = at.run if whole and at.run * call.channels <= _RUN else 1
        call.groups = min(_GROUPS, call.images)
        for name, table in (("in_index", at.index_in), ("out_index", at.index_out), ("other_index", at.index_map)):
            setattr(call, name, table.data_ptr())
        call.share = None if at.share is None else at.share.data_ptr()
    call.fires, call.bytes, call.threshold, call.levels = layer.fires, layer.bytes, layer.threshold, layer.levels
    call.batch_statistics, call.eps = layer.training, layer.eps
    return call, at


def _call(layer: Layer, size: tuple[int, int], current: Tensor, backward: bool) -> _Call:
    """A call of a layer, but for its tensors."""
    plan, _ = _plan(layer, *size, current.shape, current.dtype, torch.get_num_threads(), backward)
    return _Call.from_buffer_copy(plan)


def forward(
    layer: Layer,
    size: tuple[int, int],
    current: Tensor,
    given: Tensors,
    out: Tensor,
    handed: Tensor | None,
    merged: Tensor | None,
) -> Tensor | None:
    """Write what a layer returns, hands on and keeps: see :func:`lightning_msnn.kernels.layer.neurons`.

    Maps are in channels-last order; ``out``, ``handed`` and ``merged`` are written to. The norm is returned, None if
    there is none: mean, biased variance, and the scale and shift that normalise, float32 ``(4, C)``.
    """
    channels, call = current.shape[1], _call(layer, size, current, False)
    norm: Tensor | None = None
    moments: Tensor | None = None
    if layer.training or given.get("running_mean") is not None:
        norm = torch.empty(4, channels, dtype=torch.float32, device=current.device)
        if layer.training:
            moments = torch.zeros(call.row_groups, 2, channels, dtype=torch.float64, device=current.device)
    _run(
        "msnn_forward", call, given, current=current, norm=norm, out=out, handed_on=handed, merged=merged,
        moments=moments,
    )  # fmt: skip
    return norm


def backward(
    layer: Layer,
    size: tuple[int, int],
    grad: Tensor,
    grad_handed: Tensor | None,
    grad_merged: Tensor | None,
    other: Tensor | None,
    current: Tensor,
    norm: Tensor | None,
    given: Tensors,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of the current and of ``other``, and sums by channel, float32 ``(SUMS + 2, C)``.

    Rows of the sums: the gradient of the normalised current; that times the current's distance from its mean; the
    gradients of the decay, of pi theta and of the threshold; two of scratch memory.

    Args:
        layer: The layer.
        size: Height and width of the map.
        grad: Gradient of what it returned.
        grad_handed: Gradient of what it handed on, if there is one.
        grad_merged: Gradient of the merged membranes, if there is one.
        other: Membranes of layer 1, or the map received.
        current: Current in channels-last order, as all maps.
        norm: The norm, None if there is none.
        given: Its parameters.
    """
    channels, call = current.shape[1], _call(layer, size, current, True)
    grad_current = torch.empty_like(current)
    grad_other = None
    if other is not None:
        grad_other = torch.empty_like(other) if call.form > 1 and call.windows else torch.zeros_like(other)
    sums = torch.zeros(call.groups, SUMS, channels, dtype=torch.float64, device=current.device)
    totals = torch.empty(SUMS + 2, channels, dtype=torch.float32, device=current.device)
    _run(
        "msnn_backward", call, given, current=current, other=other, norm=norm, grad=grad, grad_handed=grad_handed,
        grad_merged=grad_merged, grad_current=grad_current, grad_other=grad_other, sums=sums, totals=totals,
    )  # fmt: skip
    return grad_current, grad_other, totals
