"""A layer of neurons as one function of tensors, which ``torch.compile`` turns into a CUDA kernel.

``LIGHTNING_MSNN_COMPILE=0`` in the environment leaves layers to torch's own operations, one by one; ``1`` compiles them
on CPUs too. If it fails in the forward pass, a warning says so once, and the same function runs without the compiler.
"""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional.membrane import connected, coupled_scan, recurrent_scan, scan
from lightning_msnn.functional.spike import anneal, heaviside
from lightning_msnn.functional.windows import count, merge, split
from lightning_msnn.kernels.geometry import OMEGAS, SURROGATE, Layer, Made, Tensors

__all__ = ["devices", "equations", "run"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Data types of maps."""


@lru_cache(maxsize=1)
def devices() -> tuple[str, ...]:
    """Return the types of the devices on which layers are compiled."""
    value = os.environ.get("LIGHTNING_MSNN_COMPILE")
    if value not in (None, "0", "1"):
        raise ConfigurationError(f"LIGHTNING_MSNN_COMPILE must be 0 or 1, not {value!r}")
    return {None: ("cuda",), "0": (), "1": ("cuda", "cpu")}[value]


def equations(layer: Layer, size: tuple[int, int], current: Tensor, tensors: Any) -> Made:
    """Compute a layer by its equations, in float32 at least; see :func:`lightning_msnn.kernels.layer.neurons`."""
    dtype, norm = torch.promote_types(current.dtype, torch.float32), None
    given: Any = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    x, residual = current.to(dtype), given.get("residual")
    mean, var = given.get("running_mean"), given.get("running_var")
    if layer.training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if mean is not None and var is not None:
        weight, bias = given.get("weight"), given.get("bias")
        scale = torch.rsqrt(var + layer.eps) * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - mean * scale
        x = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        norm = torch.stack([mean, var, scale, shift]).detach()
    n = count(layer.kind, *size)
    currents = list(torch.unflatten(x, 0, [n, -1]).unbind(0)) if layer.windows_in else split(x, layer.kind)
    membranes = _carried(layer, currents, given)
    merged = torch.cat(membranes) if layer.windows_out else merge(membranes, layer.kind, *size)
    handed = torch.cat(membranes[:-1])[:, -layer.handed :].to(current.dtype) if layer.handed and n > 1 else None
    if layer.fires:
        level = given.get("level")
        threshold = layer.threshold if level is None else level.view(-1, 1, 1)
        out, share = heaviside(merged, SURROGATE, threshold, layer.levels), given.get("anneal")
        out = out if share is None else anneal(merged, out, share)
    else:
        out = merged if residual is None else merged + residual
    return out.to(current.dtype), handed, merged.to(current.dtype) if layer.keeps else None, norm


def _carried(layer: Layer, currents: list[Tensor], given: Tensors) -> list[Tensor]:
    """Membranes of the windows."""
    tau, theta, other = given.get("tau"), given.get("theta"), given.get("other")
    if layer.form == "still" or tau is None:
        return currents
    if len(currents) == 1:
        return [connected(currents[0], [x for x in (tau, theta, other) if x is not None])]
    if layer.form == "first":
        return scan(currents, tau)
    assert other is not None
    assert theta is not None
    omega = lambda a, b: OMEGAS[layer.omega](a, b, theta)  # noqa: E731
    if layer.form == "recurrent":
        return recurrent_scan(currents, split(other, layer.kind), tau, omega)
    return coupled_scan(currents, list(torch.unflatten(other, 0, [len(currents) - 1, -1]).unbind(0)), tau, omega)


@lru_cache(maxsize=1024)
def _compiled(layer: Layer, size: tuple[int, int], channels: int) -> Callable[..., Made]:
    """The compiled equations of a layer, which depend on the batch and its data type alone."""

    def region(current: Tensor, given: Any) -> Made:
        return equations(layer, size, current, given)

    # A code of its own for each layer: the compiler limits how often one is compiled.
    code = region.__code__.replace(co_name=f"region_of_{layer.form}_{_compiled.cache_info().misses}")
    own = FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)
    compiled: Callable[..., Made] = torch.compile(own, dynamic=False)
    return compiled


_FAILED: list[Exception] = []
"""Why the compiler is not used, if it is not."""


def run(layer: Layer, size: tuple[int, int], current: Tensor, given: Tensors) -> Made:
    """Compute a layer by what the compiler made of its equations; with running statistics, by the equations themselves.

    Evaluation has batches of many sizes, and compiling them takes longer than it saves there.
    """
    if not _FAILED and given.get("running_mean") is None and torch.is_grad_enabled():
        try:
            return _compiled(layer, size, current.shape[1])(current, dict(given))
        except (torch.OutOfMemoryError, _StopRecomputationError):  # the second ends a block that is computed again
            raise
        except Exception as error:  # each part of the compiler raises its own kind
            made = equations(layer, size, current, given)  # raises what is no fault of the compiler's
            _FAILED.append(error)
            warnings.warn(f"torch.compile failed, so layers of neurons run without it: {error}", stacklevel=2)
            return made
    return equations(layer, size, current, given)
