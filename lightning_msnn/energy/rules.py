"""What an operation counts as: a rule for each, from its call to amounts by field.

A rule takes a :class:`Call` and returns amounts by the names of :data:`lightning_msnn.energy.profiles.FIELDS`, as
numbers or as scalar tensors that stay on their device, or a string that names what it cannot count. One more entry of
:data:`RULES` counts one more operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_msnn.energy.profiles import TRANSCENDENTAL

__all__ = ["FREE", "NOTHING", "RULES", "Amounts", "Call", "Mark", "mark", "recurrent"]

Amounts = dict[str, int | Tensor]


class Mark(NamedTuple):
    """What is known of a tensor from the operation that made it.

    Args:
        current: Whether synapses have summed it, also scaled or with a bias.
        spikes: Whether it is the result of a comparison, also scaled, clamped or selected by one.
        border: Sizes of a border of zeros, as :func:`torch.nn.functional.pad` takes them.
    """

    current: bool = False
    spikes: bool = False
    border: tuple[int, ...] = ()


NOTHING = Mark()


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Args:
        name: Name of the operation, without the underscore of one that works in place.
        args: Its arguments by position.
        options: Its arguments by keyword.
        inputs: The tensors among them.
        out: The tensor that it returned, the first of several.
        batch: Samples that go through the network.
        items: Items that the running module was called with, such as windows of samples: the first axis of its input.
        kind: What the module is: ``"plain"``, ``"neuron"`` (fires or carries a membrane) or ``"omega"`` (a projection).
        constant: Whether a tensor comes from parameters alone.
        marks: Mark of a tensor.
        view: Whether the output is in the memory of an input.
    """

    name: str
    args: Any
    options: dict[str, Any]
    inputs: Sequence[Tensor]
    out: Tensor
    batch: int
    items: int
    kind: str
    constant: Callable[[Tensor], bool]
    marks: Callable[[Tensor], Mark] = field(default=lambda x: NOTHING)
    view: bool = False

    @cached_property
    def varying(self) -> list[Tensor]:
        """Tensors of more than a number that do not come from parameters alone."""
        return [x for x in self.inputs if x.dim() and not self.constant(x)]


Rule = Callable[[Call], Amounts | str]


def _names(text: str) -> frozenset[str]:
    """Names separated by spaces."""
    return frozenset(text.split())


def _sum(*parts: Amounts) -> Amounts:
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total


def _binary(x: Tensor) -> Tensor:
    """Whether each item (axis 0) is all in {0, 1}, ``(items,)``."""
    return ((x == 0) | (x == 1)).flatten(1).all(1)


# Synapses


def _synapse(
    x: Tensor, size: int, values: Tensor, active: Tensor, dense: int, outputs: int, weights: int, kernels: int = 0
) -> Amounts:
    """Amounts of a layer of synapses; numbers are for one item but for ``weights``.

    Args:
        x: Inputs ``(items, ...)``.
        size: Inputs, without padding.
        values: Inputs that are not zero, ``(items,)``.
        active: Times that such an input meets a weight, ``(items,)``.
        dense: Times that any input meets a weight.
        outputs: Outputs.
        weights: Weights read, those of all samples together.
        kernels: Places of the kernels of a convolution, one kernel for each output channel; 0 if it is linear.
    """
    binary, items = _binary(x), len(x)
    spiking, analogue, spikes = binary.sum(), (~binary).sum(), (values * binary).sum()
    return {
        "dense": dense * items,
        "accumulates": (active * binary).sum(),
        "multiply_accumulates": dense * analogue,
        "effective_multiply_accumulates": (active * ~binary).sum(),
        "weights_read": weights,
        "values_read": size * analogue,
        "values_written": outputs * items,
        "spikes_read": size * spiking,
        "input_spikes": spikes,
        "convolved_spikes": spikes if kernels else 0,
        "potentials": outputs * spiking,
        "input_reads": (dense if kernels else size) * analogue,
        "addresses": (size + outputs + kernels) * analogue,
        "calls": items,
    }


@lru_cache(maxsize=4096)
def _reach(
    inside: range, size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int, transposed: bool
) -> tuple[tuple[int, ...], int]:
    """How many outputs each of ``size`` positions of an axis reaches, and how many taps of the kernel meet a position.

    Args:
        inside: Positions that are not a border of zeros, which reaches nothing.
        size: Positions.
        kernel: Taps.
        stride: Step of the kernel.
        padding: Zeros that the convolution puts before the first position.
        dilation: Distance between taps.
        outputs: Outputs.
        transposed: Whether positions and outputs have changed places.
    """
    reached, met = Counter[int](), 0
    for tap in (k * dilation - padding for k in range(kernel)):
        if transposed:
            met_here = [i for i in inside if 0 <= i * stride + tap < outputs]
        else:
            met_here = [i for out in range(outputs) if (i := out * stride + tap) in inside]
        reached.update(met_here)
        met += bool(met_here)
    return tuple(reached[i] for i in range(size)), met


def _convolution(call: Call) -> Amounts:
    x, weight, _, stride, padding, dilation, transposed, _, groups = call.args[:9]
    axes, fan_out, sizes = x.dim() - 2, call.out.shape[1] // groups, x.shape[2:]
    stride, padding, dilation = (list(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation))
    zeros = (*call.marks(x).border, *[0] * (2 * axes))[: 2 * axes]  # from the last axis to the first
    inside = [range(b, size - a) for size, b, a in zip(sizes, zeros[-2::-2], zeros[::-2], strict=True)]
    sides = zip(inside, sizes, weight.shape[2:], stride, padding, dilation, call.out.shape[2:], strict=True)
    reached, taps = zip(*(_reach(*side, transposed) for side in sides), strict=True)
    places = torch.ones((), dtype=torch.int64, device=x.device)
    for axis in reached:
        places = places.unsqueeze(-1) * torch.tensor(axis, dtype=torch.int64, device=x.device)
    values = (x != 0).sum(1)
    return _synapse(
        x,
        x.shape[1] * math.prod(map(len, inside)),
        values.flatten(1).sum(1),
        (values * places).flatten(1).sum(1) * fan_out,
        dense=x.shape[1] * fan_out * math.prod(map(sum, reached)),
        outputs=call.out[0].numel(),
        weights=weight.shape[0] * weight.shape[1] * math.prod(taps) * call.batch,
        kernels=call.out.shape[1] * math.prod(weight.shape[2:]),
    )


def _rows(x: Tensor, weights: int, fan_out: int) -> Amounts:
    """Amounts of a product with weights of items ``(items, ..., K)``, each value of which meets ``fan_out`` weights."""
    values, size = (x != 0).flatten(1).sum(1), x[0].numel()
    return _synapse(x, size, values, values * fan_out, size * fan_out, size // x.shape[-1] * fan_out, weights)


def _matmul(call: Call) -> Amounts | str:
    """Amounts of ``a @ b`` of matrices or batches of matrices; a factor made of parameters alone is weights."""
    a, b = call.args[1:3] if "add" in call.name else call.args[:2]
    a, b = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(-1) if b.dim() == 1 else b)
    added = _added(call)
    if call.constant(a):
        a, b = b.transpose(-1, -2), a.transpose(-1, -2)
    if b.dim() == 3 and b.stride(0) == 0:  # one matrix for all
        a, b = a.flatten(0, 1), b[0]
    if a.dim() == 2:
        if len(a) % call.items or call.items % call.batch:
            return f"{call.name} of {len(a)} rows, which are not those of {call.batch} samples"
        a = a.reshape(call.items, -1, a.shape[1])
    elif call.constant(b):  # a matrix of weights for each group, which comes first
        a = a.transpose(0, 1)
        a = a.reshape(call.batch, -1, *a.shape[1:]) if len(a) % call.batch == 0 else a
    if call.constant(b):
        return _sum(_rows(a, b.numel() * call.batch, b.shape[-1]), added)
    return _sum(_product(a, b.expand(len(a), *b.shape[-2:]), call.batch), added)


def _added(call: Call) -> Amounts:
    """Amounts of what is added to a product in one operation; a bias costs nothing."""
    if "add" not in call.name or call.constant(call.args[0]) or call.options.get("beta", 1) == 0:
        return {}
    factors = sum(call.options.get(name, 1) != 1 for name in ("alpha", "beta"))
    return {"additions": call.out.numel(), "multiplications": call.out.numel() * factors}


def _product(a: Tensor, b: Tensor, batch: int) -> Amounts:
    """Amounts of a product of activations ``(..., n, k)`` and ``(..., k, m)``."""
    n, k, m = a.shape[-2], a.shape[-1], b.shape[-1]
    a, b = a.reshape(-1, n, k), b.reshape(-1, k, m)
    a_binary, b_binary, items = _binary(a), _binary(b), len(a)
    columns, rows = (a != 0).sum(1), (b != 0).sum(2)  # values of a at each k, of b at each k
    a_spikes, b_spikes, meetings = columns.sum(1), rows.sum(1), (columns * rows).sum(1)
    both, either = a_binary & b_binary, a_binary | b_binary
    accumulates = torch.where(both, meetings, torch.where(a_binary, a_spikes * m, b_spikes * n)) * either
    analogue = (~either).sum()
    binary_places = a_binary.sum() * (n * k) + b_binary.sum() * (k * m)
    return {
        "dense": items * n * k * m,
        "accumulates": accumulates.sum(),
        "multiply_accumulates": analogue * (n * k * m),
        "effective_multiply_accumulates": (meetings * ~either).sum(),
        "values_read": items * (n * k + k * m) - binary_places,
        "values_written": items * n * m,
        "spikes_read": binary_places,
        "input_spikes": (a_spikes * a_binary).sum() + (b_spikes * b_binary).sum(),
        "potentials": either.sum() * (n * m),
        "input_reads": analogue * (n * k * m),
        "addresses": analogue * (n * k + k * m + n * m),
        "calls": batch,  # the matrices of a sample, one for each head, are there together
    }


def _attention(call: Call) -> Amounts:
    """Amounts of softmax attention that is computed in one operation."""
    q, k, v = call.args[:3]
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))  # heads that share keys and values
    scores = torch.full((*q.shape[:-1], k.shape[-2]), 0.5, dtype=q.dtype, device=q.device)  # analogue, never zero
    additions, multiplications = _ELEMENTWISE["_softmax"]
    return _sum(
        _product(q, k.transpose(-1, -2), call.batch),
        _product(scores, v, call.batch),
        {"additions": scores.numel() * additions, "multiplications": scores.numel() * (multiplications + 1)},
    )


# Recurrent layers: gates, and for each unit and step the additions and multiplications that are not matrix products.
_CELLS: dict[str, tuple[int, int, int]] = {
    "lstm": (4, 4 + 1, 5 * TRANSCENDENTAL + 3),
    "gru": (3, 3 + 3, 3 * TRANSCENDENTAL + 3),
    "rnn": (1, 1, TRANSCENDENTAL),
    "rnn_tanh": (1, 1, TRANSCENDENTAL),
    "rnn_relu": (1, 1 + 1, 0),
}


def recurrent(module: nn.Module, x: Any, state: Any, out: Tensor, batch: int) -> Amounts | str:
    """Amounts of a recurrent layer with torch's names of parameters.

    Its input may be spikes. The recurrent product takes the analogue output, and what lies between layers is not seen:
    it is taken for analogue and never zero.

    Args:
        module: The layer.
        x: Its input.
        state: State before the first token, None for zeros.
        out: Its output.
        batch: Samples that go through the network.
    """
    name = str(getattr(module, "mode", getattr(module, "cell", ""))).lower()
    if name not in _CELLS or not isinstance(x, Tensor) or x.dim() != 3 or getattr(module, "proj_size", False):
        return f"{name or type(module).__name__} of a {type(x).__name__} not (samples, tokens, channels), or projected"
    gates, additions, multiplications = _CELLS[name]
    weights = dict(module.named_parameters())
    directions = 1 + ("weight_ih_l0_reverse" in weights)
    layers = sum("weight_ih" in key for key in weights) // directions
    if not getattr(module, "batch_first", True):
        x, out = x.transpose(0, 1), out.transpose(0, 1)
    places, steps = x.shape[0] * x.shape[1], x.shape[1]
    hidden = weights["weight_hh_l0"].shape[1]
    fan_out = directions * gates * hidden
    values, outputs, products = places * directions * hidden, places * fan_out, places * hidden * fan_out
    forward, backward = out[:, :-1, :hidden], out[:, 1:, hidden:]
    seen = ((forward != 0).sum() + (backward != 0).sum()) * (gates * hidden)  # of the last layer

    def analogue(effective: int | Tensor, inputs: int = 1) -> Amounts:
        return {
            "dense": inputs * products,
            "multiply_accumulates": inputs * products,
            "effective_multiply_accumulates": effective,
            "weights_read": inputs * hidden * fan_out * batch,
            "input_reads": values,
            "addresses": values + outputs,
        }

    begin = state[0] if isinstance(state, list | tuple) else state
    parts = [_rows(x, x.shape[-1] * fan_out * batch, fan_out)]
    for layer in range(layers):
        if layer:
            parts.append(analogue(directions * products, directions))
        effective = seen if layer == layers - 1 else products // steps * (steps - 1)
        if begin is not None:
            own = begin[layer * directions : (layer + 1) * directions]
            effective = effective + (own != 0).sum() * (gates * hidden)
        parts.append(analogue(effective))
        parts.append({"additions": values * additions, "multiplications": values * multiplications})
    return _sum(*parts)


# Everything else

# Element-wise operations: additions (comparisons included) and multiplications for each element of the output.
_COMPARISONS = _names("ge gt le lt eq ne heaviside")
_ADDITIONS = _COMPARISONS | _names(
    "add sub rsub neg abs relu clamp clamp_min clamp_max hardtanh maximum minimum sign threshold floor ceil round "
    "leaky_relu"
)
_MULTIPLICATIONS = _names("mul div pow sqrt rsqrt reciprocal square leaky_relu")
_TRANSCENDENTALS = _names("exp expm1 exp2 log log1p log2 sin cos tan tanh sigmoid erf gelu silu softplus elu mish atan")
_ELEMENTWISE: dict[str, tuple[int, int]] = {
    **{name: (int(name in _ADDITIONS), int(name in _MULTIPLICATIONS)) for name in _ADDITIONS | _MULTIPLICATIONS},
    **dict.fromkeys(_TRANSCENDENTALS, (0, TRANSCENDENTAL)),
    "gelu": (1, TRANSCENDENTAL + 1),
    "silu": (0, TRANSCENDENTAL + 1),
    "hardsigmoid": (3, 1),
    "hardswish": (3, 2),
    "addcmul": (1, 2),
    "lerp": (2, 1),
    "_softmax": (2, TRANSCENDENTAL + 1),
    "_safe_softmax": (2, TRANSCENDENTAL + 1),
    "_log_softmax": (3, TRANSCENDENTAL),
    "native_layer_norm": (3, 3),
    "native_group_norm": (3, 3),
    "upsample_linear1d": (1, 2),
    "upsample_bilinear2d": (3, 4),
    "upsample_trilinear3d": (7, 8),
    "upsample_bicubic2d": (15, 16),
}


def _elementwise(call: Call) -> Amounts:
    additions, multiplications = _ELEMENTWISE[call.name]
    size, varying = call.out.numel(), call.varying
    multiplications += call.name in ("add", "sub") and call.options.get("alpha", 1) != 1
    if call.kind == "omega":
        return {"omega_operations": size * (additions + multiplications)}
    if call.kind == "neuron":
        # tau u is the update; adding the current to it is the other half, and what is left is firing and reset.
        if call.name not in ("mul", "div") or len(varying) != 1 or call.marks(varying[0]).spikes:
            return {}
        return {"membrane_updates": size, "values_read": size, "values_written": size}
    if call.name in ("add", "sub") and len(varying) == 1 and _is_bias(call):
        return {}
    traffic: Amounts = {"values_read": size * len(varying), "values_written": size} if len(varying) > 1 else {}
    return {"additions": size * additions, "multiplications": size * multiplications, **traffic}


def _is_bias(call: Call) -> bool:
    """Whether a number, or a constant with one axis, is added to what synapses have summed."""
    constants = (x for x in call.inputs if call.constant(x))
    return call.marks(call.varying[0]).current and all(sum(n > 1 for n in c.shape) <= 1 for c in constants)


def _batch_norm(call: Call) -> Amounts:
    """Amounts of a batch norm: folded into its neighbour, unless it has no running statistics."""
    if isinstance(call.args[3], Tensor):
        return {}
    additions, multiplications = _ELEMENTWISE["native_group_norm"]
    return {"additions": call.out.numel() * additions, "multiplications": call.out.numel() * multiplications}


def _reduction(call: Call) -> Amounts:
    x, size = call.args[0], call.out.numel()
    additions = max(0, x.numel() - size)
    if call.name.startswith(("avg_pool", "max_pool")):
        window = call.args[1] if isinstance(call.args[1], list | tuple) else [call.args[1]]
        area = math.prod(window) if len(window) == x.dim() - 2 else window[0] ** (x.dim() - 2)
        additions = size * (area - 1)
    means = size if "mean" in call.name or "avg" in call.name else 0
    return {"additions": additions, "multiplications": means, "values_read": x.numel(), "values_written": size}


def mark(call: Call) -> Mark:
    """What the output of an operation is known to be."""
    rule, varying = RULES.get(call.name), [call.marks(x) for x in call.varying]
    if rule is _convolution or (rule is _matmul and len(varying) == 1):
        return Mark(current=True)
    if call.name == "constant_pad_nd" and min(call.args[1]) >= 0 and not any(call.args[2:]):
        return Mark(border=tuple(call.args[1]))
    if not varying:
        return NOTHING
    copied = call.view or call.name in _COPIES
    return Mark(
        current=len(varying) == 1 and varying[0].current and (copied or call.name in ("mul", "div", "add", "sub")),
        spikes=call.name in _COMPARISONS or ((copied or call.name in _SELECTIONS) and all(x.spikes for x in varying)),
        border=varying[0].border if call.name in _COPIES else (),
    )


_COPIES = _names("_to_copy clone")
_SELECTIONS = _names("mul rsub where masked_fill clamp clamp_min clamp_max")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "convolution": _convolution,
    **dict.fromkeys(
        _names(
            "batch_norm native_batch_norm cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update "
            "_native_batch_norm_legit _native_batch_norm_legit_no_training"
        ),
        _batch_norm,
    ),
    **dict.fromkeys(_names("mm bmm mv dot addmm baddbmm addmv"), _matmul),
    **dict.fromkeys(
        _names(
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
        ),
        _attention,
    ),
    **dict.fromkeys(
        _names(
            "mean sum amax amin max min _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
            "adaptive_max_pool3d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices"
        ),
        _reduction,
    ),
}
"""Rules by the name of the operation in torch's dispatcher."""

FREE = _names(
    """
    _local_scalar_dense _reshape_copy _to_copy _unsafe_index _unsafe_view arange as_strided_ bernoulli bernoulli_
    bitwise_and bitwise_not bitwise_or cat channel_shuffle clone constant_pad_nd copy copy_ detach_ embedding empty
    empty_like empty_strided exponential_ fill fill_ flip full full_like gather im2col index index_select isfinite
    lift_fresh linspace logical_and logical_not logical_or masked_fill multinomial native_dropout new_empty
    new_empty_strided new_full new_ones new_zeros normal normal_ ones ones_like pixel_shuffle pixel_unshuffle rand
    rand_like randint randint_like randn randn_like randperm random_ reflection_pad2d repeat replication_pad2d resize_
    roll scalar_tensor split_with_sizes_copy squeeze_ stack swapaxes_ t_ transpose_ tril triu unbind_copy uniform_
    unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze_ upsample_nearest1d upsample_nearest2d
    upsample_nearest3d where zero_ zeros zeros_like
    """
)
"""What moves or makes values, or exists in training alone."""
