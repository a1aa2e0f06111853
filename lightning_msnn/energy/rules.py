"""What an operation counts as: a rule for each, from its call to amounts by field.

A rule takes a :class:`Call` and returns amounts by the names of :data:`lightning_msnn.energy.profiles.FIELDS`, as
numbers or as scalar tensors that stay on their device, or a string that names what it cannot count. One more entry of
:data:`RULES` counts one more operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.energy.profiles import TRANSCENDENTAL

__all__ = ["FACTORIES", "FREE", "FUNCTIONS", "POSITIONS", "RANDOM", "RULES", "UNKNOWN", "Call", "Known", "known"]

Amounts = dict[str, int | Tensor]


@dataclass(frozen=True)
class Known:
    """What is known of a tensor from the operations that made it.

    Args:
        channels: Of what synapses have added up, also scaled or with a bias, how many; else 0.
        spikes: Whether it is the result of a comparison, also scaled, clamped or selected by one.
        border: Sizes of a border of zeros, as :func:`torch.nn.functional.pad` takes them, none below 0.
        distinct: Of a constant, how many values of parameters it is made of: those that it repeats, as for each
            sample, count once. None for all that it holds.
        steps: Where steps come before samples (time steps, tokens or groups): ``"axis"`` if steps are axis 0 and
            samples axis 1, ``"rows"`` if both are axis 0, the samples of a step one after another; else empty.
    """

    channels: int = 0
    spikes: bool = False
    border: tuple[int, ...] = ()
    distinct: int | None = None
    steps: str = ""


UNKNOWN = Known()


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
        kind: What the module is that runs: ``"plain"``, ``"neuron"`` (fires or carries a membrane), ``"carrier"``
            (holds neurons) or ``"omega"`` (a projection).
        constant: Whether a tensor comes from parameters alone.
        known: What is known of a tensor.
        view: Whether the output is in the memory of an input.
    """

    name: str
    args: Any
    options: dict[str, Any]
    inputs: Sequence[Tensor]
    out: Tensor
    batch: int
    kind: str
    constant: Callable[[Tensor], bool]
    known: Callable[[Tensor], Known]
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
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    outputs: int,
    before: int,
    after: int,
    transposed: bool,
) -> tuple[tuple[int, ...], int]:
    """How many outputs each position of an axis reaches, and how many taps are met; padding reaches none.

    Args:
        size: Positions.
        kernel: Taps.
        stride: Step of the kernel.
        padding: Zeros that the convolution puts before the first position.
        dilation: Distance between taps.
        outputs: Outputs.
        before: First positions that are padding.
        after: Last positions that are padding.
        transposed: Whether positions and outputs have changed places.
    """
    inside = range(before, size - after)
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
    axes, samples, fan_out = x.dim() - 2, call.batch, call.out.shape[1] // groups
    border = call.known(x).border
    if not call.constant(weight) and len(x) == 1 and groups % call.batch == 0:  # kernels of each sample, as groups
        x, samples = x.view(call.batch, -1, *x.shape[2:]), 1
    stride, padding, dilation = (list(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation))
    zeros = (*border, *[0] * (2 * axes))[: 2 * axes]  # from the last axis to the first
    before = [min(n, size) for n, size in zip(zeros[-2::-2], x.shape[2:], strict=True)]
    after = [min(n, size - b) for n, size, b in zip(zeros[::-2], x.shape[2:], before, strict=True)]
    sides = zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, call.out.shape[2:], before, after, strict=True
    )
    reached, taps = zip(*(_reach(*side, transposed) for side in sides), strict=True)
    places = torch.ones((), dtype=torch.int64, device=x.device)
    for axis in reached:
        places = places.unsqueeze(-1) * torch.tensor(axis, dtype=torch.int64, device=x.device)
    values = (x != 0).sum(1)
    outputs, met = call.out.numel() // len(x), weight.shape[0] * weight.shape[1] * math.prod(taps)
    inside = (size - b - a for size, b, a in zip(x.shape[2:], before, after, strict=True))
    return _synapse(
        x,
        x.shape[1] * math.prod(inside),
        values.flatten(1).sum(1),
        (values * places).flatten(1).sum(1) * fan_out,
        dense=x.shape[1] * fan_out * math.prod(map(sum, reached)),
        outputs=outputs,
        weights=min(met, _distinct(call, weight)) * samples,
        kernels=outputs // math.prod(call.out.shape[2:]) * math.prod(weight.shape[2:]),
    )


def _rows(x: Tensor, weights: int, fan_out: int) -> Amounts:
    """Amounts of a product with weights of items ``(items, ..., K)``, each value of which meets ``fan_out`` weights."""
    values, size = (x != 0).flatten(1).sum(1), x[0].numel()
    return _synapse(x, size, values, values * fan_out, size * fan_out, size // x.shape[-1] * fan_out, weights)


def _by_sample(x: Tensor, batch: int, steps: str = "") -> Tensor:
    """Lay the first axes out by sample, as far as they are of samples; see :class:`Known` for ``steps``."""
    x = x.transpose(0, 1) if steps == "axis" else x
    if len(x) % batch:
        return x
    if steps == "rows":
        return x.reshape(-1, batch, *x.shape[1:]).transpose(0, 1)
    return x.reshape(batch, -1, *x.shape[1:])


def _linear(call: Call) -> Amounts:
    return _layer(call, *call.inputs[:2])


def _layer(call: Call, x: Tensor, weight: Tensor) -> Amounts:
    """Amounts of ``x`` times the weights of a linear layer."""
    steps = call.known(x).steps
    if x.dim() < 3:
        x = _by_sample(x.view(-1, x.shape[-1]), call.batch, steps)
    elif steps == "axis" or (x.shape[0] % call.batch and x.shape[1] == call.batch):
        x = _by_sample(x, call.batch, "axis")
    return _rows(x, _distinct(call, weight) * call.batch, len(weight))


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    """The factors of a product of matrices."""
    a, b = call.args[1:3] if "add" in call.name else call.args[:2]
    return a, b


def _matmul(call: Call) -> Amounts:
    """Amounts of ``a @ b`` of matrices or batches of matrices; a factor made of parameters alone is weights."""
    a, b = _factors(call)
    x, weights = (b, a) if call.constant(a) else (a, b)
    steps, distinct = call.known(x).steps, _distinct(call, weights)
    a, b = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(-1) if b.dim() == 1 else b)
    if call.constant(a):
        a, b = b.transpose(-1, -2), a.transpose(-1, -2)
        steps = steps if a.dim() == 3 else ""
    if not call.constant(b):
        if a.dim() == b.dim() == 2 and len(a) % call.batch == 0:  # weights that the network makes, for rows of samples
            a, b = _by_sample(a, call.batch, steps), b.expand(call.batch, -1, -1)
        return _sum(_product(a, b, call.batch), _added(call, {"alpha"}))
    if a.dim() == 3 and len(a) % call.batch:  # groups, and then samples
        steps = "axis"
    added = {} if "add" in call.name and call.constant(call.args[0]) else _added(call, set())  # a bias costs nothing
    return _sum(_rows(_by_sample(a, call.batch, steps), distinct * call.batch, b.shape[-1]), added)


def _added(call: Call, scaled: set[str]) -> Amounts:
    """Amounts of what is added to a product in one operation, and of factors: its own where no weight takes them in."""
    if "add" not in call.name:
        return {}
    beta, size = call.options.get("beta", 1), call.out.numel()
    factors = sum(call.options.get(name, 1) != 1 for name in scaled)
    factors += beta not in (0, 1) and not call.constant(call.args[0])
    return {"additions": size * (beta != 0), "multiplications": size * factors}


def _product(a: Tensor, b: Tensor, batch: int) -> Amounts:
    """Amounts of a product of activations ``(items, n, k)`` and ``(items, k, m)``."""
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
    "rnn_tanh": (1, 1, TRANSCENDENTAL),
    "rnn_relu": (1, 1 + 1, 0),
}


def _analogue(products: int, effective: int | Tensor, weights: int, values: int, outputs: int) -> Amounts:
    """Amounts of products of analogue values that a recurrent layer keeps to itself."""
    return {
        "dense": products,
        "multiply_accumulates": products,
        "effective_multiply_accumulates": effective,
        "weights_read": weights,
        "input_reads": values,
        "addresses": values + outputs,
    }


def _cell(call: Call) -> Amounts:
    """Amounts of one step of a recurrent layer: ``x, h, input weights, recurrent weights, ...``."""
    x, state, weights, recurrent = call.args[:4]
    h = state if isinstance(state, Tensor) else state[0]
    _, additions, multiplications = _CELLS[call.name.removesuffix("_cell")]
    parts = [_layer(call, x, weights)]
    if call.constant(h):  # before the first step; an analogue value, as in a layer of several steps
        products, effective = h.numel() * len(recurrent), (h != 0).sum() * len(recurrent)
        read = _distinct(call, recurrent) * call.batch
        parts.append(_analogue(products, effective, read, h.numel(), len(h) * len(recurrent)))
    else:
        parts.append(_layer(call, h, recurrent))
    parts.append({"additions": h.numel() * additions, "multiplications": h.numel() * multiplications})
    return _sum(*parts)


def _recurrent(call: Call) -> Amounts | str:
    """Amounts of a recurrent layer called as torch's function: ``x, h, weights, has_biases, layers, ...``."""
    if isinstance(call.args[1], Tensor) and call.args[1].dim() == 1:  # lengths, where h is else
        return f"{call.name} of a packed sequence"
    x, state, weights, _, layers, _, _, bidirectional, batch_first = call.args
    begin = state if isinstance(state, Tensor) else state[0]  # h, (layers and directions, samples, hidden)
    x, read = (x, call.out) if batch_first else (x.transpose(0, 1), call.out.transpose(0, 1))
    gates, additions, multiplications = _CELLS[call.name]
    directions = 2 if bidirectional else 1
    places = x.shape[0] * x.shape[1]
    units, hidden = len(weights[0]) // gates, weights[1].shape[1]  # hidden is less than units if h is projected
    fan_out = directions * gates * units
    each, values, outputs = places * directions * units, places * directions * hidden, places * fan_out

    parts = [_rows(x, x.shape[-1] * fan_out * call.batch, fan_out)]
    # What lies between layers is not seen: analogue, and never zero.
    between = _analogue(values * fan_out, values * fan_out, directions * hidden * fan_out * call.batch, values, outputs)
    parts += [between] * (layers - 1)
    for layer in range(layers):
        # The recurrent product: h is analogue; after the first step only the last layer's is seen.
        products = places * hidden * fan_out
        effective: int | Tensor = products // x.shape[1] * (x.shape[1] - 1)
        if layer == layers - 1:
            forward, backward = read[:, :-1, :hidden], read[:, 1:, hidden:]
            effective = ((forward != 0).sum() + (backward != 0).sum()) * (gates * units)
        first = (begin[layer * directions : (layer + 1) * directions] != 0).sum() * (gates * units)
        parts.append(_analogue(products, first + effective, hidden * fan_out * call.batch, values, outputs))
        if hidden < units:
            read_once = directions * units * hidden * call.batch
            parts.append(_analogue(each * hidden, each * hidden, read_once, each, values))
        parts.append({"additions": each * additions, "multiplications": each * multiplications})
    return _sum(*parts)


# Everything else

# Element-wise operations: additions (comparisons included) and multiplications for each element of the output.
_ADDITIONS = _names(
    "add sub rsub neg abs relu clamp clamp_min clamp_max hardtanh maximum minimum sign ge gt le lt eq ne threshold "
    "floor ceil round leaky_relu heaviside"
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
    scaled = call.name in ("add", "sub") and call.options.get("alpha", 1) != 1
    multiplications += scaled
    if call.kind == "omega":
        return {"omega_operations": size * (additions + multiplications)}
    if call.kind == "neuron":
        # tau u is the update; adding the current to it is the other half, and what is left is firing and reset.
        if not _is_update(call, scaled):
            return {}
        return {"membrane_updates": size, "values_read": size, "values_written": size}
    if call.kind == "carrier" and call.name in ("mul", "rsub"):
        # What its neurons hand to the next time step, tau u (1 - s): an update, and a reset that only selects.
        # A mean where windows overlap is by a number, not by a tensor.
        if call.name == "rsub" or len(varying) != 1:
            return {}
        number = any(isinstance(x, int | float) for x in call.args[:2])
        return {"multiplications" if number else "membrane_updates": size}
    if call.name in ("add", "sub") and len(varying) == 1 and _is_bias(call, varying[0]):
        return {}
    traffic: Amounts = {"values_read": size * len(varying), "values_written": size} if len(varying) > 1 else {}
    return {"additions": size * additions, "multiplications": size * multiplications, **traffic}


def _is_update(call: Call, scaled: bool) -> bool:
    """Whether an operation in a neuron scales a membrane, by itself or (``scaled``) as it is added to a current."""
    if call.name == "lerp":  # a reset, where spikes say how far
        return not (isinstance(call.args[2], Tensor) and call.known(call.args[2]).spikes)
    if scaled or call.name == "addcmul":
        factors = [x for x in call.inputs[1:] if x.dim() and not call.constant(x)]
    else:
        factors = call.varying if call.name in ("mul", "div") else []
    return len(factors) == 1 and not call.known(factors[0]).spikes


def _batch_norm(call: Call) -> Amounts:
    """Amounts of a batch norm: folded into its neighbour, unless it has no running statistics."""
    if isinstance(call.args[3], Tensor):
        return {}
    additions, multiplications = _ELEMENTWISE["native_group_norm"]
    return {"additions": call.out.numel() * additions, "multiplications": call.out.numel() * multiplications}


def _reduction(call: Call) -> Amounts:
    x, size = call.args[0], call.out.numel()
    additions = max(0, x.numel() - size)
    if "adaptive" in call.name:  # pieces that may overlap: from the floor of where one begins to the ceiling of its end
        axes = zip(x.shape[-len(call.args[1]) :], call.out.shape[-len(call.args[1]) :], strict=True)
        pieces = (sum(-(-(i + 1) * n // m) - i * n // m for i in range(m)) for n, m in axes)
        additions = math.prod(x.shape[: -len(call.args[1])]) * math.prod(pieces) - size
    if call.name.startswith(("avg_pool", "max_pool")):
        window = call.args[1] if isinstance(call.args[1], list | tuple) else [call.args[1]]
        area = math.prod(window) if len(window) == x.dim() - 2 else window[0] ** (x.dim() - 2)
        additions = size * (area - 1)
    means = size if "mean" in call.name or "avg" in call.name else 0
    return {"additions": additions, "multiplications": means, "values_read": x.numel(), "values_written": size}


# What is known


def _distinct(call: Call, x: Tensor) -> int:
    """How many values of parameters a constant is made of."""
    distinct = call.known(x).distinct
    return math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step) if distinct is None else distinct


def _sources(call: Call) -> int | None:
    """How many values of parameters a constant that is computed from constants is made of."""
    weights = [x for x in call.inputs if x.is_floating_point()] or call.inputs  # places are no weights
    size, rule = call.out.numel(), RULES.get(call.name, RULES.get(call.name.rstrip("_")))
    if call.name in _FILLED:
        return 1
    if not weights:
        return None
    if call.name in _LOOKUPS:  # what places repeat, what is found there repeats
        places = [x for x in call.inputs if not x.is_floating_point() and x.dtype != torch.bool]
        return size // max([1, *(x.numel() // max(1, _distinct(call, x)) for x in places)])
    if rule is _matmul:  # what a factor repeats, the product repeats
        return size // max(max(1, x.numel() // max(1, _distinct(call, x))) for x in weights)
    if rule is _elementwise:
        return max((_distinct(call, x) for x in weights if x.numel() == size), default=size)
    return min(size, sum({(x.data_ptr(), n := _distinct(call, x)): n for x in weights}.values()))


def _is_bias(call: Call, x: Tensor) -> bool:
    """Whether what is added to an input is a number, or a value for each of the channels that synapses have summed."""
    channels = call.known(x).channels
    return bool(channels) and all(_distinct(call, c) <= channels for c in call.inputs if call.constant(c))


def _channels(call: Call, rule: Rule | None) -> int:
    """How many channels synapses add up in this operation; 0 if it has none."""
    if rule is _linear:
        return call.out.shape[-1]
    if rule is _convolution:
        return call.out.shape[1] if call.constant(call.args[1]) else 0
    if rule is _matmul:
        a, b = _factors(call)
        if not (call.constant(a) or call.constant(b)):
            return 0
        weights, axis = (a, -2) if call.constant(a) else (b, -1)
        channels: int = weights.shape[axis] if weights.dim() > 1 else 1
        inner: int = max(1, a.shape[-1])
        return max(channels, _distinct(call, weights) // inner)
    return 0


def _border(call: Call) -> tuple[int, ...]:
    """Sizes of a border of zeros: a view keeps it where it has the same axes."""
    (x,) = call.varying
    border = call.known(x).border
    if call.name == "constant_pad_nd" and not any(call.args[2:]):
        return tuple(max(0, a + b) for a, b in zip_longest(border, call.args[1], fillvalue=0))
    same = call.view and x.shape == call.out.shape and x.stride() == call.out.stride()
    return border if same or call.name in _COPIES else ()


def _steps(call: Call) -> str:
    """Where steps come before samples in the output, see :class:`Known`."""
    x, out = call.varying[0], call.out
    before = call.known(x).steps
    first = len(x) == call.batch and not before  # samples are, until now
    if call.name == "unsqueeze":  # which names the axis that is new
        place = call.args[1] % out.dim()
        if place == 0:
            return "axis" if first and out.dim() > 2 else ""
        return before if before == "rows" or place > 1 else ""
    if first:
        joined = call.name in ("cat", "stack")
        if joined and (call.args[1] if len(call.args) > 1 else 0) in (0, -out.dim()):
            return "rows" if call.name == "cat" else "axis" if out.dim() > 2 else ""
        if call.name == "repeat" and out.dim() > x.dim():
            return "axis" if out.dim() > 2 and out.shape[1] == len(x) else ""
        if call.name == "repeat" and len(out) > len(x):
            return "rows"
    follow = _steps_of_view if call.view else _steps_of_copy
    axes = call.args[1] if len(call.args) > 1 else None
    if call.name in _INSIDE and isinstance(axes, int | list | tuple):  # axes taken away or made: a sample's own
        rank, first_own = max(x.dim(), out.dim()), 2 if before == "axis" else 1
        axes = [axes] if isinstance(axes, int) else axes
        return before if all(axis % rank >= first_own for axis in axes) else ""
    return next(filter(None, (follow(x, call.known(x).steps, out, call.batch) for x in call.varying)), "")


def _steps_of_view(x: Tensor, steps: str, view: Tensor, batch: int) -> str:
    """Axes are told by their strides, but those of one sample, of which a stride says nothing: by their sizes."""
    if not view.dim():
        return ""
    kept = len(view) == len(x) and view.stride(0) == x.stride(0)
    several = view.dim() > 2
    if steps == "axis":
        if several and view.shape[1] == x.shape[1] and (x.shape[1] == 1 or view.stride(1) == x.stride(1)):
            return "axis"
        if view.dim() < x.dim() and len(view) == x.shape[0] * x.shape[1]:
            return "rows"
        merged = several and x.dim() > view.dim() and view.shape[1] == x.shape[1] * x.shape[2]
        return "axis" if merged and kept else ""
    if steps == "rows":
        if several and view.dim() > x.dim() and view.shape[1] == batch and len(view) * batch == len(x):
            return "axis"
        return "rows" if kept and len(view) != batch else ""
    moved = several and not kept and len(x) == batch == view.shape[1] and view.stride(1) == x.stride(0)
    return "axis" if moved else ""


def _steps_of_copy(x: Tensor, steps: str, out: Tensor, batch: int) -> str:
    if steps == "axis":
        return steps if out.dim() == x.dim() and out.shape[1] == x.shape[1] else ""
    return steps if out.dim() and len(out) == len(x) else ""


def known(call: Call, rule: Rule | None) -> Known:
    """What the output of an operation is known to be.

    Args:
        call: The operation; of one that is free, with its inputs as they are.
        rule: Its rule, if it has one.
    """
    if not call.varying or call.name in _FILLED:
        return Known(distinct=_sources(call))
    single = call.known(call.varying[0]) if len(call.varying) == 1 else UNKNOWN
    copied = call.view or call.name in _COPIES
    scaled = copied or call.name in ("mul", "div", "add", "sub")
    return Known(
        channels=_channels(call, rule) or (single.channels if scaled else 0),
        spikes=call.name in _COMPARISONS
        or ((copied or call.name in _SELECTIONS) and all(call.known(x).spikes for x in call.varying)),
        border=_border(call) if single.border or call.name == "constant_pad_nd" else (),
        steps=_steps(call),
    )


_COMPARISONS = _names("ge gt le lt eq ne heaviside logical_and logical_or logical_not")
_COPIES = _names("_to_copy clone")
_SELECTIONS = _names("mul rsub where masked_fill clamp clamp_min clamp_max")
_FILLED = _names("fill_ full full_like new_full new_ones new_zeros ones ones_like zero_ zeros zeros_like")
_LOOKUPS = _names("embedding gather index index_select")
_INSIDE = _names("mean sum amax amin max min stack")

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

FUNCTIONS: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(_CELLS, _recurrent),
    **dict.fromkeys((f"{name}_cell" for name in _CELLS), _cell),
}
"""Rules of what is counted where it is called as a function: what it is made of no longer tells samples apart."""

POSITIONS = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys((f"{name}_cell" for name in _CELLS), ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")),
}
"""Places of what these functions take by keyword too."""

RANDOM = _names(
    "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal normal_ normal_functional "
    "poisson rand rand_like randint randint_like randn randn_like random_ randperm uniform_"
)
"""What makes other values each time: no constants."""

FREE = RANDOM | _names(
    """
    _local_scalar_dense _reshape_copy _to_copy _unsafe_index _unsafe_view arange as_strided_
    bitwise_and bitwise_not bitwise_or cat channel_shuffle clone constant_pad_nd copy copy_ detach_ embedding empty
    empty_like empty_strided fill fill_ flip full full_like gather im2col index index_select isfinite linspace
    lift_fresh logical_and logical_not logical_or masked_fill native_dropout new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like pixel_shuffle pixel_unshuffle reflection_pad2d repeat
    replication_pad2d resize_ roll scalar_tensor split_with_sizes_copy squeeze_ stack swapaxes_ t_ transpose_ tril triu
    unbind_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze_ upsample_nearest1d upsample_nearest2d
    upsample_nearest3d where zero_ zeros zeros_like
    """
)
"""What moves or makes values, or exists in training alone."""

FACTORIES = frozenset(n for n in FREE if n.startswith(("new_", "zeros", "ones", "full", "empty", "arange", "lift_")))
"""What makes values of nothing but numbers: constants."""
