"""Which layers of a network take their input from a rectifier: where every tensor comes from, watched in one run.

The network is run on the meta device, where tensors have shapes and no values: it costs next to nothing, and control
flow that asks for values cannot be followed. Operations are seen below the module tree, so that it does not matter
whether a rectifier is a module, a shared one, in-place or a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_msnn.conversion.layers import SYNAPSES, copied
from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.nn import Spike

__all__ = ["APPROXIMATE", "Plan", "Row", "convertible", "trace"]

APPROXIMATE = ("gelu", "silu", "hardswish", "mish", "elu", "leaky_relu")
"""Activations that a spike stands for less well, as they are not 0 below a threshold."""

_EXACT = {"relu": "relu", "threshold": "relu", "clamp_min": "relu", "clamp": "relu6", "hardtanh": "relu6"}

# What hands on values as they are, or the largest of them; padding is with zeros.
_MOVES = frozenset(
    """
    _to_copy _unsafe_view adaptive_max_pool2d adaptive_max_pool3d amax cat channel_shuffle clone constant_pad_nd
    contiguous flip gather im2col index index_select lift_fresh max max_pool2d_with_indices
    max_pool3d_with_indices native_channel_shuffle native_dropout pixel_shuffle pixel_unshuffle repeat roll stack unfold
    """.split()  # noqa: SIM905
)
_POOLS = ("mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
_REASONS = {
    **dict.fromkeys(("add", "sub", "sum", "addcmul"), "a sum"),
    **dict.fromkeys(("mul", "div"), "a product"),
    **dict.fromkeys(_POOLS, "average pooling"),
    **dict.fromkeys(("convolution", "addmm", "mm", "bmm", "baddbmm"), "a layer without rectifier"),
}

_Origin = frozenset[str] | str
"""Where a tensor comes from: names of rectifiers or of other operations."""

_PARAMETER = "parameters"


@dataclass
class Row:
    """One layer of a plan.

    Args:
        layer: Qualified name of the module.
        kind: Name of its class.
        shape: Its input without the batch axis.
        operations: Multiply-accumulates of one sample, padding included.
        origins: Where its input comes from in each call: names of rectifiers or of other operations.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    operations: int = 0
    origins: list[_Origin] = field(default_factory=list, repr=False)

    @property
    def spiking(self) -> bool:
        """Whether it will receive spikes."""
        return all(isinstance(origin, frozenset) for origin in self.origins)

    @property
    def why(self) -> str:
        """Where its input comes from."""
        others = [origin for origin in self.origins if isinstance(origin, str)]
        return others[0] if others else " and ".join(sorted(frozenset[str]().union(*self.origins)))


@dataclass
class Plan:
    """Which layers of a network will receive spikes, and why; as a string, a table."""

    rows: list[Row]
    """Layers in the order in which they run."""

    @property
    def spiking(self) -> list[Row]:
        """The layers that will receive spikes."""
        return [row for row in self.rows if row.spiking]

    def __str__(self) -> str:
        total = max(1, sum(row.operations for row in self.rows))
        table = [("layer", "kind", "input", "receives", "operations", "from")]
        for row in self.rows:
            share, receives = f"{100 * row.operations / total:8.1f} %", "spikes" if row.spiking else "analogue values"
            table.append((row.layer, row.kind, "x".join(map(str, row.shape)), receives, share, row.why))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        head, *lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)
        share = f"{100 * sum(row.operations for row in self.spiking) / total:.1f} %"
        end = f"{len(self.spiking)} of {len(self.rows)} layers, with {share} of the operations, receive spikes"
        return "\n".join([head, "-" * (sum(widths) + 10), *lines, end, ""])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the origin of every tensor, and the products of every layer."""

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: Any = WeakTensorKeyDictionary()
        self.origins[sample] = "the image"
        self.batch = len(sample)
        self.rows, self.stack = dict[str, Row](), list[str]()
        self.modules = dict(model.named_modules())
        for name, module in self.modules.items():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(name)
        if convertible(module):
            x = next(iter((*args, *kwargs.values())))
            self._row(name, x).origins.append(self.origins.get(x, _PARAMETER))

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def _row(self, name: str, x: Tensor) -> Row:
        kind = type(self.modules[name]).__name__
        return self.rows.setdefault(name, Row(name or "(network)", kind, tuple(x.shape[1:])))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if not outputs:
            return out
        if flops := flop_registry.get(func.overloadpacket):
            self._count(flops(*args, **(kwargs or {}), out_val=out) // 2, inputs)
        origin = self._follow(func, name.rstrip("_") if func._schema.is_mutable else name, args, inputs)
        if func._schema.is_mutable:
            self._written(outputs[0], origin)
        for x in outputs:
            self.origins[x] = origin
        return out

    def _written(self, x: Tensor, origin: _Origin) -> None:
        """What is written into a tensor is in all that share its memory."""
        base = x if x._base is None else x._base
        for other in [base, *self.origins.keys()]:
            if other is base or other._base is base:
                self.origins[other] = origin if x.numel() == base.numel() else "a tensor written in part"

    def _follow(self, func: Any, name: str, args: Any, inputs: list[Tensor]) -> _Origin:
        """Return the origin of what an operation returns."""
        origins: list[_Origin] = [self.origins.get(x, _PARAMETER) for x in inputs]
        if all(origin == _PARAMETER for origin in origins):
            return _PARAMETER
        if name in APPROXIMATE or _cuts_at_zero(name, args):
            return frozenset({_EXACT.get(name, name)})
        if name == "copy":
            return origins[1]
        if (func.is_view or name in _MOVES) and (name != "constant_pad_nd" or args[2:] in ((), (0,))):
            others = [origin for origin in origins if isinstance(origin, str)]
            if not others:
                return frozenset[str]().union(*origins)
            return next((other for other in others if other != _PARAMETER), "parameters beside values")
        return "a normalisation" if "norm" in name else _REASONS.get(name, f"{name}()")

    def _count(self, products: int, inputs: list[Tensor]) -> None:
        """Add the multiply-accumulates of a product to the layer that it runs in."""
        place = self.stack[-1]
        row = self._row(place, inputs[0])
        row.operations += products // self.batch
        if not row.origins or not convertible(self.modules[place]):
            weighed = any(self.origins.get(v, _PARAMETER) == _PARAMETER for v in inputs[:3])
            row.origins = ["weights of its own" if weighed else "a product of activations"]


def _cuts_at_zero(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation cuts off what is below zero, and nothing else that is not above."""
    low, high = [*args[1:3], None, None][:2]
    if name == "threshold":
        return bool(low == 0 == high)
    cuts = name in _EXACT and not isinstance(low, Tensor) and low == 0 and (high is None or high > 0)
    return name == "relu" or bool(cuts)


def convertible(module: nn.Module) -> bool:
    """Whether a layer can be made to receive spikes: it computes what its class does, with weights of its own."""
    usual = type(module).forward in SYNAPSES and "forward" not in vars(module)
    return usual and isinstance(module._parameters.get("weight"), nn.Parameter)


def trace(model: nn.Module, sample: Tensor) -> Plan:
    """Find the layers of a network whose input comes from a rectifier.

    Args:
        model: The network; not changed.
        sample: Input of the shape that it will have, its first axis the batch.

    Raises:
        ConfigurationError: If the network cannot be traced or has no such layers.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"a network is converted, a torch.nn.Module, not {model!r:.80}")
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise ConfigurationError("a compiled network cannot be traced: give the network itself")
    if any(isinstance(module, Spike) for module in model.modules()):
        raise ConfigurationError(f"{name} has spiking neurons already: give a network with rectifiers")
    if not (isinstance(sample, Tensor) and sample.is_floating_point() and sample.dim() > 1 and len(sample) > 0):
        said = f"{getattr(sample, 'dtype', type(sample).__name__)} {tuple(getattr(sample, 'shape', ()))}"
        raise ConfigurationError(f"the sample must be a batch of images, float (B, C, H, W), not {said}")
    shadow = copied(model).to("meta").eval()
    seen = torch.empty_like(sample[:2], device="meta")
    watch = _Watch(shadow, seen)
    try:
        with torch.device("meta"), torch.no_grad(), watch:
            shadow(seen)
    except Exception as error:
        raise ConfigurationError(
            f"{name} cannot be traced with a sample of shape {tuple(sample.shape)}: it takes another, its control flow "
            f"depends on values, or it names a device ({brief(error)})"
        ) from error
    plan = Plan(list(watch.rows.values()))
    if not plan.spiking:
        raise ConfigurationError(
            f"{name} has no convolution or linear layer whose input comes from a rectifier (ReLU, ReLU6; "
            f"{', '.join(APPROXIMATE)}): there is nothing to convert"
        )
    return plan
