"""What an operation counts as: a rule for each, from its call to amounts by field.

A rule takes a :class:`Call` and returns amounts by the names of :data:`lightning_msnn.energy.profiles.FIELDS`, as
numbers or as scalar tensors that stay on their device, or a string that names an operation that it cannot count. One
more entry of :data:`RULES` counts one more operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.energy.profiles import TRANSCENDENTAL

__all__ = ["FREE", "NOTHING", "RULES", "Amounts", "Call", "Mark", "mark", "recurrent"]

Amounts = dict[str, int | Tensor]


class Mark(NamedTuple):
    """What is known of a tensor from the operation that made it."""

    current: bool = False  # synapses have summed it, also scaled or with a bias
    spikes: bool = False  # the result of a comparison, also scaled, clamped or selected by one
    border: tuple[int, ...] = ()  # sizes of a border of zeros, as torch.nn.functional.pad takes them


NOTHING = Mark()


@dataclass(frozen=True)
class Call:
    """One call of an operation."""

    name: str  # of the operation, without the underscore of one that works in place
    args: Any  # by position
    options: dict[str, Any]  # arguments by keyword
    inputs: Sequence[Tensor]  # the tensors among the arguments
    out: Tensor  # the tensor that it returned, the first of several
    batch: int  # samples that go through the network
    items: int  # first axis of the input of the module that runs, such as windows of samples
    kind: str  # of that module: "plain", "neuron" (fires or carries a membrane) or "omega" (a projection)
    constant: Callable[[Tensor], bool]  # whether a tensor comes from parameters alone
    marks: Callable[[Tensor], Mark]  # the mark of a tensor
    view: bool  # whether the output is in the memory of an input
    levels: int = 1  # the most that a spike of the network can be

    @cached_property
    def varying(self) -> list[Tensor]:
        """Tensors of more than a number that do not come from parameters alone."""
        return [x for x in self.inputs if x.dim() and not self.constant(x)]


Rule = Callable[[Call], Amounts | str]


def _sum(*parts: Amounts) -> Amounts:
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total


def _sent(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Whether each item (axis 0) is all spikes, in {0, ..., levels}, and how many binary spikes each value of it is.

    A value of an item that is no spikes counts as one if it is not zero.
    """
    spiking = reduce(torch.logical_or, (x == level for level in range(levels + 1))).flatten(1).all(1)
    sent = x != 0
    return spiking, sent if levels == 1 else torch.where(spiking.view(-1, *[1] * (x.dim() - 1)), x, sent).long()


# Synapses


def _synapse(
    x: Tensor,
    size: int,
    meet: Callable[[Tensor], Tensor],
    dense: int,
    outputs: int,
    weights: int,
    levels: int,
    kernels: int = 0,
) -> Amounts:
    """Amounts of a layer of synapses with inputs ``x (items, ...)``.

    Of an item, ``size`` inputs are no padding. Given numbers of spikes ``meet`` weights so often, ``(items,)``, and all
    inputs would ``dense`` times. An item has ``outputs``; the items together read ``weights``. A convolution has
    ``kernels`` places in its kernels, one kernel for each output channel.
    """
    (binary, sent), items = _sent(x, levels), len(x)
    active, spiking, analogue = meet(sent), binary.sum(), (~binary).sum()
    spikes = (sent.flatten(1).sum(1) * binary).sum()
    return {
        "dense": dense * items,
        "accumulates": (active * binary).sum(),
        "graded_products": (meet(x != 0) * binary).sum() if levels > 1 else 0,
        "multiply_accumulates": dense * analogue,
        "effective_multiply_accumulates": (active * ~binary).sum(),
        "weights_read": weights,
        "values_read": size * analogue,
        "values_written": outputs * items,
        "spikes_read": size * spiking * levels,
        "input_spikes": spikes,
        "convolved_spikes": spikes if kernels else 0,
        "potentials": outputs * spiking,
        "input_reads": (dense if kernels else size) * analogue,
        "addresses": (size + outputs + kernels) * analogue,
        "calls": items,
    }


@lru_cache(maxsize=4096)
def _meetings(
    size: torch.Size, out: torch.Size, kernel: torch.Size, border: tuple[int, ...], options: tuple[Any, ...]
) -> tuple[Tensor, int, int]:
    """Outputs that each place of a map reaches, places inside its border, and taps of the kernel that meet one of them.

    They are the gradients of a convolution of ones with ones.
    """
    shapes = ([n - sum(border[-2 * i - 2 : len(border) - 2 * i]) for i, n in enumerate(size)], kernel, out)
    inside, taps, outputs = (torch.ones(1, 1, *shape, dtype=torch.float64) for shape in shapes)
    places = F.pad(inside, border)
    options = (*options, 1, [True, True, False])
    reached, met, _ = torch.ops.aten.convolution_backward(outputs, places, taps, None, *options)
    return (reached * places)[0, 0].round().long(), inside.numel(), int((met > 0.5).sum())


def _convolution(call: Call) -> Amounts:
    x, weight, _, *options, groups = call.args[:9]
    fan_out, fixed = call.out.shape[1] // groups, tuple(tuple(v) if isinstance(v, list) else v for v in options)
    border = (*call.marks(x).border, *[0] * (2 * x.dim()))[: 2 * x.dim() - 4]
    places, inside, taps = _meetings(x.shape[2:], call.out.shape[2:], weight.shape[2:], border, fixed)
    return _synapse(
        x,
        x.shape[1] * inside,
        lambda spikes: (spikes.sum(1) * places.to(x.device)).flatten(1).sum(1) * fan_out,
        dense=x.shape[1] * fan_out * int(places.sum()),
        outputs=call.out[0].numel(),
        weights=weight.shape[0] * weight.shape[1] * taps * call.batch,
        levels=call.levels,
        kernels=call.out.shape[1] * math.prod(weight.shape[2:]),
    )


def _rows(x: Tensor, weights: int, fan_out: int, levels: int) -> Amounts:
    """Amounts of a product with weights of items ``(items, ..., K)``, each value of which meets ``fan_out`` weights."""
    size, outputs = x[0].numel(), x[0].numel() // x.shape[-1] * fan_out
    return _synapse(x, size, lambda n: n.flatten(1).sum(1) * fan_out, size * fan_out, outputs, weights, levels)


def _matmul(call: Call) -> Amounts | str:
    """Amounts of ``a @ b`` of matrices or batches of matrices; a factor made of parameters alone is weights."""
    a, b = call.args[1:3] if "add" in call.name else call.args[:2]
    biased = "add" not in call.name or call.constant(call.args[0])
    added: Amounts = {} if biased else {"additions": call.out.numel()}
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
        return _sum(_rows(a, b.numel() * call.batch, b.shape[-1], call.levels), added)
    return _sum(_product(a, b.expand(len(a), *b.shape[-2:]), call.batch, call.levels), added)


def _product(a: Tensor, b: Tensor, batch: int, levels: int) -> Amounts:
    """Amounts of a product of activations ``(..., n, k)`` and ``(..., k, m)``."""
    n, k, m = a.shape[-2], a.shape[-1], b.shape[-1]
    a, b = a.reshape(-1, n, k), b.reshape(-1, k, m)
    (a_binary, a_sent), (b_binary, b_sent), items = _sent(a, levels), _sent(b, levels), len(a)
    both, either = a_binary & b_binary, a_binary | b_binary

    def meet(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulates of items with numbers of spikes, and times that two of their values meet."""
        columns, rows = a.sum(1), b.sum(2)  # at each k
        met = (columns * rows).sum(1)
        one = torch.where(a_binary, columns.sum(1) * m, rows.sum(1) * n)
        return torch.where(both, met, one) * either, met

    accumulates, meetings = meet(a_sent, b_sent)
    a_spikes, b_spikes = a_sent.flatten(1).sum(1), b_sent.flatten(1).sum(1)
    analogue = (~either).sum()
    binary_places = (a_binary.sum() * (n * k) + b_binary.sum() * (k * m)) * levels
    return {
        "dense": items * n * k * m,
        "accumulates": accumulates.sum(),
        "graded_products": meet(a != 0, b != 0)[0].sum() if levels > 1 else 0,
        "multiply_accumulates": analogue * (n * k * m),
        "effective_multiply_accumulates": (meetings * ~either).sum(),
        "values_read": (~a_binary).sum() * (n * k) + (~b_binary).sum() * (k * m),
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
        _product(q, k.transpose(-1, -2), call.batch, call.levels),
        _product(scores, v, call.batch, call.levels),
        {"additions": scores.numel() * additions, "multiplications": scores.numel() * (multiplications + 1)},
    )


# Recurrent layers: gates, and for each unit and step the additions and multiplications that are not matrix products.
_CELLS = {"lstm": (4, 4 + 1, 5 * TRANSCENDENTAL + 3), "gru": (3, 3 + 3, 3 * TRANSCENDENTAL + 3)}


def recurrent(module: nn.Module, x: Any, state: Any, out: Tensor, batch: int, levels: int) -> Amounts | str:
    """Amounts of a recurrent layer with torch's names of parameters, from its input, given state and output.

    Its input may be spikes. The recurrent product takes the analogue output.
    """
    name, weights = str(getattr(module, "mode", getattr(module, "cell", ""))).lower(), dict(module.named_parameters())
    simple = getattr(module, "batch_first", True) and not weights.keys() & {"weight_ih_l1", "weight_hr_l0"}
    if name not in _CELLS or not simple or state is not None or not isinstance(x, Tensor) or x.dim() != 3:
        return f"{name or type(module).__name__} that is not one layer over (samples, tokens, channels) from zeros"
    gates, additions, multiplications = _CELLS[name]
    directions = 1 + ("weight_ih_l0_reverse" in weights)
    (samples, steps), hidden = x.shape[:2], weights["weight_hh_l0"].shape[1]
    fan_out, values = directions * gates * hidden, samples * steps * directions * hidden
    forward, backward = out[:, :-1, :hidden], out[:, 1:, hidden:]
    products = values * gates * hidden
    fed_back: Amounts = {
        "dense": products,
        "multiply_accumulates": products,
        "effective_multiply_accumulates": ((forward != 0).sum() + (backward != 0).sum()) * (gates * hidden),
        "weights_read": hidden * fan_out * batch,
        "input_reads": values,
        "addresses": values + samples * steps * fan_out,
        "additions": values * additions,
        "multiplications": values * multiplications,
    }
    return _sum(_rows(x, x.shape[-1] * fan_out * batch, fan_out, levels), fed_back)


# Everything else


def _table(definition: dict[Any, str]) -> dict[str, Any]:
    """The values of a table by the names, separated by spaces, that have them."""
    return {name: value for value, names in definition.items() for name in names.split()}


_COMPARISONS = "ge gt le lt eq ne heaviside"
_ELEMENTWISE: dict[str, tuple[int, int]] = _table({
    (1, 0): _COMPARISONS + " add sub rsub neg abs relu clamp clamp_min clamp_max hardtanh maximum minimum sign"
    " threshold floor ceil round",
    (0, 1): "mul div pow sqrt rsqrt reciprocal square",
    (1, 1): "leaky_relu",
    (0, TRANSCENDENTAL): "exp expm1 exp2 log log1p log2 sin cos tan tanh sigmoid erf softplus elu mish atan",
    (0, TRANSCENDENTAL + 1): "silu",
    (1, TRANSCENDENTAL + 1): "gelu",
    (1, 2): "addcmul",
    (2, 1): "lerp",
    (3, 1): "hardsigmoid",
    (3, 2): "hardswish",
    (2, TRANSCENDENTAL + 1): "_softmax _safe_softmax",
    (3, TRANSCENDENTAL): "_log_softmax",
    (3, 3): "native_layer_norm native_group_norm",
    (3, 4): "upsample_bilinear2d",
})  # fmt: skip
"""Additions (comparisons included) and multiplications for each element of the output of an element-wise operation."""


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
    if call.kind == "neuron":
        return {}  # part of firing
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
    kept = call.view or call.name in ("_to_copy", "clone")
    return Mark(
        current=len(varying) == 1 and varying[0].current and (kept or call.name in ("mul", "div", "add", "sub")),
        spikes=call.name in _COMPARISONS.split()
        or ((kept or call.name in _SELECTIONS.split()) and all(x.spikes for x in varying)),
        border=varying[0].border if kept and not call.view else (),
    )


_SELECTIONS = "mul rsub where masked_fill clamp clamp_min clamp_max"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **_table({
        _convolution: "convolution",
        _batch_norm: "batch_norm native_batch_norm cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update "
        "_native_batch_norm_legit _native_batch_norm_legit_no_training",
        _matmul: "mm bmm addmm baddbmm",
        _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
        _reduction: "mean sum amax amin max min _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
        "adaptive_max_pool3d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices",
    }),
}  # fmt: skip
"""Rules by the name of the operation in torch's dispatcher."""

FREE = _table({
    "free": """
    _local_scalar_dense _reshape_copy _to_copy _unsafe_index _unsafe_view arange as_strided_ bernoulli bernoulli_
    bitwise_and bitwise_not bitwise_or cat channel_shuffle clone constant_pad_nd copy copy_ detach_ embedding empty
    empty_like empty_strided exponential_ fill fill_ flip full full_like gather im2col index index_select isfinite
    lift_fresh linspace logical_and logical_not logical_or masked_fill multinomial native_dropout new_empty
    new_empty_strided new_full new_ones new_zeros normal normal_ ones ones_like pixel_shuffle pixel_unshuffle rand
    rand_like randint randint_like randn randn_like randperm random_ reflection_pad2d repeat replication_pad2d resize_
    roll scalar_tensor split_with_sizes_copy squeeze_ stack swapaxes_ t_ transpose_ tril triu unbind_copy uniform_
    unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze_ upsample_nearest1d upsample_nearest2d
    upsample_nearest3d where zero_ zeros zeros_like
    """,
})  # fmt: skip
"""Operations that move or make values, or exist in training alone."""
