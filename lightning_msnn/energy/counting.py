"""The counting engine: watches any network through forward hooks and dispatch, and counts what each layer does.

A layer is a module by its qualified name. Hooks say which module runs, the dispatch mode sees every operation in it,
and the rules of :mod:`lightning_msnn.energy.profiles` say what counts. Linear layers, LSTM, GRU and RNN are counted
where they are called as functions, since what they are made of no longer tells samples apart. An operation that no rule
knows is listed by name.

A module is a layer of *neurons* if it has a ``threshold``, a ``v_threshold`` or a ``decay`` and no synapse inside, as
those of this package and of the common spiking libraries have: multiplications by constants inside are membrane
updates, and the rest of its arithmetic is that of firing and reset. A module with a function ``omega`` is a projection:
its elementary operations count as Omega's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_msnn.energy.profiles import COLUMN, FIELDS, TRANSCENDENTAL
from lightning_msnn.errors import ConfigurationError, choose

__all__ = ["OperationCounter", "Record", "count_operations", "layer_names"]

_SYNAPSES = (nn.Linear, nn.RNNBase, nn.modules.conv._ConvNd)


def _names(text: str) -> frozenset[str]:
    """Names separated by spaces."""
    return frozenset(text.split())


# Element-wise operations: additions (comparisons included) and multiplications for each element of the output.
_ADDITIONS = _names(
    "add sub rsub neg abs relu clamp clamp_min clamp_max hardtanh maximum minimum sign ge gt le lt eq ne threshold "
    "floor ceil round leaky_relu"
)
_MULTIPLICATIONS = _names("mul div pow sqrt rsqrt reciprocal square leaky_relu")
_TRANSCENDENTALS = _names(
    "exp expm1 exp2 log log1p log2 sin cos tan tanh sigmoid erf gelu silu softplus elu mish atan hardsigmoid"
)
_ELEMENTWISE: dict[str, tuple[int, int]] = {
    **{name: (int(name in _ADDITIONS), int(name in _MULTIPLICATIONS)) for name in _ADDITIONS | _MULTIPLICATIONS},
    **dict.fromkeys(_TRANSCENDENTALS, (0, TRANSCENDENTAL)),
    "gelu": (1, TRANSCENDENTAL + 1),
    "silu": (0, TRANSCENDENTAL + 1),
    "addcmul": (1, 2),
    "lerp": (2, 1),
    "_softmax": (2, TRANSCENDENTAL + 1),
    "_log_softmax": (3, TRANSCENDENTAL),
    "native_layer_norm": (3, 3),
    "native_group_norm": (3, 3),
}

# What moves or makes values, folds into a neighbour at inference, or exists in training alone.
_FREE = _names(
    """
    _batch_norm_no_update _batch_norm_with_update _local_scalar_dense _native_batch_norm_legit
    _native_batch_norm_legit_no_training _reshape_alias _reshape_copy _to_copy _unsafe_view arange
    as_strided_ batch_norm bernoulli_ bitwise_and bitwise_not bitwise_or cat clone constant_pad_nd contiguous
    copy copy_ cudnn_batch_norm detach_ embedding empty empty_like empty_strided fill fill_ flip full
    full_like gather im2col index index_select isfinite lift_fresh linspace logical_and logical_not
    logical_or masked_fill native_batch_norm native_dropout new_empty new_empty_strided new_full new_ones
    new_zeros ones ones_like pixel_shuffle reflection_pad2d repeat replication_pad2d resize_ roll
    scalar_tensor split_with_sizes_copy squeeze_ stack swapaxes_ t_ transpose_ tril triu unbind_copy unfold
    unsqueeze_ where zero_ zeros zeros_like
    """
)
_FACTORIES = frozenset(n for n in _FREE if n.startswith(("new_", "zeros", "ones", "full", "empty", "arange")))

# Recurrent layers as torch's functions: gates, and for each unit and step the additions and multiplications that are
# not matrix products.
_CELLS: dict[str, tuple[int, int, int]] = {
    "lstm": (4, 4 + 1, 5 * TRANSCENDENTAL + 3),
    "gru": (3, 3 + 3, 3 * TRANSCENDENTAL + 3),
    "rnn_tanh": (1, 1, TRANSCENDENTAL),
    "rnn_relu": (1, 1 + 1, 0),
}


@dataclass
class Record:
    """What a network did for some samples.

    Args:
        layers: Names of all modules, the network's own is ``""``.
        counts: Sums over samples, int64 ``(len(layers), len(FIELDS))``.
        samples: Number of samples.
        parameters: Parameters of each layer without those of its children, int64 ``(len(layers),)``.
        uncounted: Calls of each operation that could not be counted, by ``layer: operation``.
        fired: For each layer of neurons, how often each neuron fired, int64, the shape of one sample.
        visits: For each layer of neurons, how often each neuron could have fired: samples, times windows where a
            neuron fires in each of them, times time steps.
    """

    layers: tuple[str, ...]
    counts: Tensor
    samples: int
    parameters: Tensor
    uncounted: dict[str, int] = field(default_factory=dict)
    fired: dict[str, Tensor] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)

    def total(self, name: str) -> int:
        """Sum of a field over all layers.

        Args:
            name: One of :data:`lightning_msnn.energy.profiles.FIELDS`.

        Raises:
            ConfigurationError: If the name is not one of them.
        """
        return int(self.counts[:, choose(COLUMN, name, "field")].sum())

    def layer(self, layer: str) -> dict[str, int]:
        """Return all fields of a layer by name."""
        return dict(zip(FIELDS, self.counts[self.layers.index(layer)].tolist(), strict=True))


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers of a network, in the order of the rows of its counts."""
    return tuple(name for name, _ in model.named_modules())


@lru_cache(maxsize=4096)
def _reach(size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> tuple[int, ...]:
    """How many outputs each position of an axis reaches; padding reaches none."""
    reached = [0] * size
    for out in range(outputs):
        for k in range(kernel):
            position = out * stride - padding + k * dilation
            if 0 <= position < size:
                reached[position] += 1
    return tuple(reached)


@lru_cache(maxsize=4096)
def _reach_transposed(
    size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int
) -> tuple[int, ...]:
    """How many outputs each position of an axis of a transposed convolution reaches."""
    return tuple(sum(0 <= i * stride - padding + k * dilation < outputs for k in range(kernel)) for i in range(size))


def _tensors(values: Any) -> list[Tensor]:
    """Tensors in arguments or outputs, in lists and tuples too; faster than a general tree."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    if isinstance(values, list | tuple):
        for value in values:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += _tensors(value)
    elif isinstance(values, dict):
        found = _tensors(list(values.values()))
    return found


@lru_cache(maxsize=4096)
def _rule_of(func: Any) -> tuple[str, str]:
    """How an operation is counted and its name: ``factory``, ``free``, ``rule``, ``elementwise`` or ``unknown``."""
    name = func.overloadpacket.__name__
    if name in _FACTORIES:
        return "factory", name
    if func.is_view or name in _FREE:
        return "free", name
    if name in _RULES:
        return "rule", name
    return ("elementwise" if name.rstrip("_") in _ELEMENTWISE else "unknown"), name


def _binary(x: Tensor) -> Tensor:
    """Whether each sample (axis 0) is all in {0, 1}, ``(B,)``."""
    return ((x == 0) | (x == 1)).flatten(1).all(1)


def _is_neuron(module: nn.Module) -> bool:
    marked = any(hasattr(module, name) for name in ("threshold", "v_threshold", "decay"))
    return (
        marked and not isinstance(module, nn.Threshold) and not any(isinstance(m, _SYNAPSES) for m in module.modules())
    )


@dataclass
class _Frame:
    """A module that runs: its row, and how operations in it are to be understood."""

    row: int
    kind: str  # "plain", "neuron" (fires or carries a membrane), "carrier" (holds neurons) or "omega"


class _Functions(TorchFunctionMode):
    """Hands linear and recurrent layers to the counter as a whole."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rule = self.counter.whole(name, args, kwargs)
        if rule is None:
            return func(*args, **kwargs)
        with _disable_current_modes():  # what it is made of is counted already
            out = func(*args, **kwargs)
            with torch.no_grad():
                rule(out)
        return out


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation to the counter."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _rule_of(func)[0] == "unknown" and func.namespace == "aten":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.counter.dispatched(func, args, kwargs, out)
        return out


class OperationCounter:
    """Counts what a network does while the context is open; outside, the network is as it was.

    >>> with OperationCounter(model) as counter:
    ...     model(images)
    >>> counter.record().total("accumulates")

    ``samples`` is how many went through the network so far, ``inputs`` the arguments of its last call. The network runs
    as always: with or without gradients, in training or evaluation, under autocast.

    Args:
        model: Any module; the first axis of its first tensor argument counts the samples.
        operations: Whether to count operations; without, only what neurons do, which costs next to nothing.

    Raises:
        ConfigurationError: If the network is compiled or scripted, which leaves nothing to watch.
    """

    def __init__(self, model: nn.Module, operations: bool = True) -> None:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
                raise ConfigurationError(
                    f"operations of a compiled or scripted {type(module).__name__} cannot be counted: "
                    "give the network itself"
                )
        self.model = model
        self.operations = operations
        self.layers = layer_names(model)
        self.inputs: tuple[Any, ...] = ()
        self._handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self._numbers: Counter[tuple[int, str]] = Counter()
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._uncounted: Counter[str] = Counter()
        self._fired: dict[int, Tensor] = {}
        self._visits: Counter[int] = Counter()
        self._stack: list[_Frame] = []
        self._modes: ExitStack | None = None
        self._batch = 1
        self._constants: set[int] = set()
        self._kept: list[Tensor] = []

    # Hooks

    def __enter__(self) -> OperationCounter:
        """Begin with no counts."""
        self._reset()
        rows = {id(m): i for i, (_, m) in enumerate(self.model.named_modules())}
        for module in self.model.modules():
            frame = _Frame(rows[id(module)], self._kind(module))
            if not (self.operations or frame.kind == "neuron" or module is self.model):
                continue
            self._handles += [
                module.register_forward_pre_hook(self._enter(frame, module is self.model), with_kwargs=True),
                module.register_forward_hook(
                    self._leave(frame, module), with_kwargs=True, always_call=True, prepend=True
                ),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop()

    @staticmethod
    def _kind(module: nn.Module) -> str:
        if callable(getattr(module, "omega", None)):
            return "omega"
        if _is_neuron(module):
            return "neuron"
        if any(_is_neuron(child) for child in module.children()):
            return "carrier"
        return "plain"

    def _enter(self, frame: _Frame, root: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if root and self._modes is None:
                tensors = [*_tensors(args), *_tensors(kwargs)]
                self._batch = len(tensors[0]) if tensors and tensors[0].dim() else 1
                self.samples += self._batch
                self.inputs = args
                self._constants = {
                    x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers()) if x.numel()
                }
                self._modes = ExitStack()
                if self.operations:
                    self._modes.enter_context(_Functions(self))
                    self._modes.enter_context(_Operations(self))
            if self._modes is not None:
                self._stack.append(frame)

        return hook

    def _leave(self, frame: _Frame, module: nn.Module) -> Callable[..., None]:
        fires = frame.kind == "neuron" and not hasattr(module, "decay")

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._modes is None:
                return
            while self._stack and self._stack.pop() is not frame:  # an error left the frames of its callees
                pass
            if not self._stack:
                self._stop()
            if fires and not any(f.kind == "neuron" for f in self._stack):
                with torch.no_grad(), _disable_current_modes():  # what counting computes is not the network's
                    self._spikes(frame.row, output)
            elif frame.kind == "omega":
                self._add(frame.row, omega=sum(x.numel() for x in _tensors(output)))

        return hook

    def _stop(self) -> None:
        if self._modes is not None:
            self._modes.close()
            self._modes = None
        self._stack.clear()
        self._kept.clear()
        self._constants.clear()

    # Sums

    def _add(self, row: int, **amounts: int | Tensor) -> None:
        for name, amount in amounts.items():
            key = (row, name)
            if isinstance(amount, Tensor):
                before = self._tensors.get(key)
                self._tensors[key] = amount if before is None else before + amount
            elif amount:
                self._numbers[key] += amount

    def record(self) -> Record:
        """Return what was counted since the context was entered."""
        counts = torch.zeros(len(self.layers), len(FIELDS), dtype=torch.int64)
        for (row, name), number in self._numbers.items():
            counts[row, COLUMN[name]] += number
        if self._tensors:  # one transfer from the device
            for (row, name), number in zip(
                self._tensors, torch.stack(list(self._tensors.values())).tolist(), strict=True
            ):
                counts[row, COLUMN[name]] += number
        parameters = torch.tensor(
            [sum(p.numel() for p in m.parameters(recurse=False)) for m in self.model.modules()], dtype=torch.int64
        )
        return Record(
            self.layers,
            counts,
            self.samples,
            parameters,
            dict(sorted(self._uncounted.items())),
            {self.layers[row]: fired for row, fired in sorted(self._fired.items())},
            {self.layers[row]: visits for row, visits in sorted(self._visits.items())},
        )

    # Rules: synapses

    def _synapse(
        self,
        row: int,
        binary: Tensor,
        values: Tensor,
        active: Tensor,
        size: int,
        dense: int,
        outputs: int,
        weights: int,
        kernels: int = 0,
    ) -> None:
        """Count a layer of synapses.

        Args:
            row: Row of the layer.
            binary: Which of the items are all in {0, 1}, ``(items,)``; the numbers below are for one item.
            values: Values that are not zero, ``(items,)``.
            active: Times that such a value meets a weight, ``(items,)``.
            size: Values.
            dense: Times that any value meets a weight.
            outputs: Outputs.
            weights: Weights that a sample reads.
            kernels: Places of the kernels of a convolution, one kernel for each output channel; 0 if it is linear.
        """
        analogue = ~binary
        spiking_items, analogue_items = binary.sum(), analogue.sum()
        spikes = (values * binary).sum()
        self._add(
            row,
            dense=dense * len(binary),
            accumulates=(active * binary).sum(),
            multiply_accumulates=dense * analogue_items,
            effective_multiply_accumulates=(active * analogue).sum(),
            weights_read=weights * self._batch,
            values_read=size * analogue_items,
            values_written=outputs * len(binary),
            spikes_read=size * spiking_items,
            input_spikes=spikes,
            convolved_spikes=spikes if kernels else 0,
            potentials=outputs * spiking_items,
            input_reads=(dense if kernels else size) * analogue_items,
            addresses=(size + outputs + kernels) * analogue_items,
            calls=len(binary),
        )

    def _convolution(self, row: int, args: Any, out: Tensor) -> None:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
        axes = x.dim() - 2
        stride, padding, dilation = (list(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation))
        reach = _reach_transposed if transposed else _reach
        places = torch.ones((), dtype=torch.int64, device=x.device)
        for i in range(axes):
            reached = reach(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i], out.shape[2 + i])
            places = places.unsqueeze(-1) * torch.tensor(reached, dtype=torch.int64, device=x.device)
        fan_out = out.shape[1] // groups
        per_place = (x != 0).sum(1)
        dense = (
            x.shape[1]
            * fan_out
            * math.prod(
                sum(reach(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i], out.shape[2 + i]))
                for i in range(axes)
            )
        )
        self._synapse(
            row,
            _binary(x),
            per_place.flatten(1).sum(1),
            (per_place * places).flatten(1).sum(1) * fan_out,
            x[0].numel(),
            dense,
            out[0].numel(),
            weight.numel(),
            out.shape[1] * math.prod(weight.shape[2:]),
        )

    def _rows(self, row: int, x: Tensor, weights: int, fan_out: int) -> None:
        """Count a product with weights of items ``(items, ..., K)``, each value of which meets ``fan_out`` weights."""
        items = x.unsqueeze(0) if x.dim() == 1 else x
        values = (items != 0).flatten(1).sum(1)
        size = items[0].numel()
        outputs = size // x.shape[-1] * fan_out
        self._synapse(row, _binary(items), values, values * fan_out, size, size * fan_out, outputs, weights)

    def whole(self, name: str, args: Any, kwargs: Any) -> Callable[[Any], None] | None:
        """Return how to count a function from what it returns, or None if it is counted by its operations.

        Args:
            name: Name of the function.
            args: Its arguments.
            kwargs: Its arguments by name.
        """
        if self._modes is None or not self._stack:
            return None
        row = self._stack[-1].row
        if name == "linear":
            x, weight = (*args, *kwargs.values())[:2]
            if self._constant(weight) and not self._constant(x):
                return lambda out: self._rows(row, x, weight.numel(), len(weight))
        elif name in _CELLS:
            return lambda out: self._recurrent(row, name, args, out[0])
        return None

    def _recurrent(self, row: int, name: str, args: Any, read: Tensor) -> None:
        """Count a recurrent layer, called as torch's function: ``x, h, weights, has_biases, layers, ...``."""
        if isinstance(args[1], Tensor) and args[1].dim() == 1:  # lengths, where h is else
            self._uncounted[f"{self.layers[row]}: {name} of a packed sequence"] += 1
            return
        x, _, weights, _, layers, _, _, bidirectional, batch_first = args
        if not batch_first:
            x, read = x.transpose(0, 1), read.transpose(0, 1)
        gates, additions, multiplications = _CELLS[name]
        directions = 2 if bidirectional else 1
        batch, steps = x.shape[0], x.shape[1]
        units, hidden = len(weights[0]) // gates, weights[1].shape[1]  # hidden is less than units if h is projected
        fan_out = directions * gates * units
        each, values = batch * steps * directions * units, batch * steps * directions * hidden
        outputs = batch * steps * fan_out
        for layer in range(layers):
            if layer == 0:
                self._rows(row, x, x.shape[-1] * fan_out, fan_out)
            else:  # what lies between layers is not seen: analogue, and never zero
                products = values * fan_out
                self._analogue(row, products, products, directions * hidden * fan_out, values, outputs)
            # The recurrent product: h is analogue, and zero before the first step; only the last layer's is seen.
            products = batch * steps * hidden * fan_out
            effective: int | Tensor = products // steps * (steps - 1)
            if layer == layers - 1:
                forward, backward = read[:, :-1, :hidden], read[:, 1:, hidden:]
                effective = ((forward != 0).sum() + (backward != 0).sum()) * (gates * units)
            self._analogue(row, products, effective, hidden * fan_out, values, outputs)
            if hidden < units:
                products = each * hidden
                self._analogue(row, products, products, directions * units * hidden, each, values)
            self._add(row, additions=each * additions, multiplications=each * multiplications)

    def _analogue(
        self, row: int, products: int, effective: int | Tensor, weights: int, values: int, outputs: int
    ) -> None:
        """Count products of analogue values with weights inside a recurrent layer, which keeps its values to itself."""
        self._add(
            row,
            dense=products,
            multiply_accumulates=products,
            effective_multiply_accumulates=effective,
            weights_read=weights * self._batch,
            input_reads=values,
            addresses=values + outputs,
        )

    def _product(self, row: int, a: Tensor, b: Tensor) -> None:
        """Count a product of activations ``(items, n, k)`` and ``(items, k, m)``."""
        n, k, m = a.shape[-2], a.shape[-1], b.shape[-1]
        a, b = a.reshape(-1, n, k), b.reshape(-1, k, m)
        a_binary, b_binary = _binary(a), _binary(b)
        columns, rows = (a != 0).sum(1), (b != 0).sum(2)  # values of a at each k, of b at each k
        a_spikes, b_spikes, meetings = columns.sum(1), rows.sum(1), (columns * rows).sum(1)
        both, either = a_binary & b_binary, a_binary | b_binary
        accumulates = torch.where(both, meetings, torch.where(a_binary, a_spikes * m, b_spikes * n)) * either
        analogue = (~either).sum()
        items = len(a)
        binary_places = a_binary.sum() * (n * k) + b_binary.sum() * (k * m)
        self._add(
            row,
            dense=items * n * k * m,
            accumulates=accumulates.sum(),
            multiply_accumulates=analogue * (n * k * m),
            effective_multiply_accumulates=(meetings * ~either).sum(),
            values_read=items * (n * k + k * m) - binary_places,
            values_written=items * n * m,
            spikes_read=binary_places,
            input_spikes=(a_spikes * a_binary).sum() + (b_spikes * b_binary).sum(),
            potentials=either.sum() * (n * m),
            input_reads=analogue * (n * k * m),
            addresses=analogue * (n * k + k * m + n * m),
            calls=self._batch,  # the matrices of a sample, one for each head, are there together
        )

    def _matmul(self, row: int, a: Tensor, b: Tensor) -> None:
        """Count ``a @ b`` of matrices or batches of matrices; a factor made of parameters alone is weights."""
        a, b = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(-1) if b.dim() == 1 else b)
        if self._constant(b) or self._constant(a):
            if self._constant(a):
                a, b = b.transpose(-1, -2), a.transpose(-1, -2)
            rows = a.reshape(-1, a.shape[-1])
            # Functional code flattens ``(B, tokens, K)``: the rows of a sample follow each other.
            items = self._batch if len(rows) % self._batch == 0 else len(rows)
            self._rows(row, rows.reshape(items, -1, rows.shape[-1]), b.numel(), b.shape[-1])
        else:
            self._product(row, a, b)

    def _attention(self, row: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Count softmax attention computed in one operation."""
        scores = torch.full((*q.shape[:-1], k.shape[-2]), 0.5, dtype=q.dtype, device=q.device)  # analogue, never zero
        self._product(row, q, k.transpose(-1, -2))
        self._product(row, scores, v)
        additions, multiplications = _ELEMENTWISE["_softmax"]
        self._add(row, additions=scores.numel() * additions, multiplications=scores.numel() * (multiplications + 1))

    # Rules: everything else

    def _spikes(self, row: int, output: Any) -> None:
        spikes = next(iter(_tensors(output)), None)
        if spikes is None or spikes.dim() == 0:
            return
        fired = (spikes != 0).sum(0)
        places = spikes.numel()
        self._add(row, neurons=places, spikes=fired.sum(), values_read=places, spikes_written=places)
        before = self._fired.get(row)
        if before is not None and before.shape != fired.shape:
            raise ConfigurationError(
                f"layer {self.layers[row]!r} has neurons of shape {tuple(fired.shape)} and {tuple(before.shape)}: "
                "count images of one size at a time"
            )
        self._fired[row] = fired if before is None else before + fired
        self._visits[row] += spikes.shape[0]

    def _constant(self, x: Tensor) -> bool:
        return x.numel() == 0 or x.untyped_storage().data_ptr() in self._constants

    def dispatched(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count one operation.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: Its arguments by name.
            out: What it returned.
        """
        if self._modes is None or not self._stack:
            return
        kind, name = _rule_of(func)
        inputs, outputs = [*_tensors(args), *_tensors(kwargs)], _tensors(out)
        if kind == "factory" or all(self._constant(x) for x in inputs):
            # Computed from parameters alone: a constant at inference. It is kept, so that its memory is not another's.
            self._constants.update(x.untyped_storage().data_ptr() for x in outputs if x.numel())
            self._kept += outputs
            return
        if func._schema.is_mutable:  # what is written into a constant makes it one no longer
            self._constants.difference_update(x.untyped_storage().data_ptr() for x in outputs)
        if kind == "free" or all(x.dim() == 0 for x in outputs):
            return
        row = self._stack[-1].row
        if kind == "rule":
            _RULES[name](self, row, args, outputs[0])
        elif kind == "elementwise":
            self._elementwise(name.rstrip("_"), args, inputs, outputs[0])
        else:
            self._uncounted[f"{self.layers[row] or type(self.model).__name__}: {name}"] += 1

    def _elementwise(self, name: str, args: Any, inputs: list[Tensor], out: Tensor) -> None:
        additions, multiplications = _ELEMENTWISE[name]
        frame, size = self._stack[-1], out.numel()
        varying = sum(not self._constant(x) for x in inputs)
        if frame.kind == "omega":
            self._add(frame.row, omega_operations=size * (additions + multiplications))
        elif frame.kind == "neuron":
            # tau u is the update; adding the current to it is the other half, and what is left is firing and reset.
            if name in ("mul", "div") and varying == 1:
                self._add(frame.row, membrane_updates=size, values_read=size, values_written=size)
        elif frame.kind == "carrier" and name in ("mul", "rsub"):
            # What its neurons hand to the next time step, tau u (1 - s): an update, and a reset that only selects.
            # A mean where windows overlap is by a number, not by a tensor.
            if name == "mul" and varying == 1:
                scale = any(isinstance(x, int | float) for x in args[:2])
                self._add(frame.row, **{"multiplications" if scale else "membrane_updates": size})
        else:
            self._add(frame.row, additions=size * additions, multiplications=size * multiplications)
            if varying > 1:
                self._add(frame.row, values_read=size * varying, values_written=size)

    def _reduce(self, row: int, x: Tensor, out: Tensor, mean: bool) -> None:
        self._add(
            row,
            additions=max(0, x.numel() - out.numel()),
            multiplications=out.numel() if mean else 0,
            values_read=x.numel(),
            values_written=out.numel(),
        )

    def _pool(self, row: int, args: Any, out: Tensor, mean: bool) -> None:
        window = args[1] if isinstance(args[1], list | tuple) else [args[1]]
        axes = args[0].dim() - 2
        area = math.prod(window) if len(window) == axes else window[0] ** axes
        self._add(
            row,
            additions=out.numel() * (area - 1),
            multiplications=out.numel() if mean else 0,
            values_read=args[0].numel(),
            values_written=out.numel(),
        )


_Rule = Callable[[OperationCounter, int, Any, Tensor], None]


def _rules() -> dict[str, _Rule]:
    """Rules by the name of the operation: what to do with its layer's row, its arguments and its output."""

    def convolution(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._convolution(row, args, out)

    def product(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._matmul(row, args[0], args[1])

    def biased_product(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._matmul(row, args[1], args[2])

    def attention(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._attention(row, args[0], args[1], args[2])

    def mean(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._reduce(row, args[0], out, mean=True)

    def reduction(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._reduce(row, args[0], out, mean=False)

    def average_pool(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._pool(row, args, out, mean=True)

    def max_pool(counter: OperationCounter, row: int, args: Any, out: Tensor) -> None:
        counter._pool(row, args, out, mean=False)

    fused = _names("flash_attention_for_cpu flash_attention efficient_attention cudnn_attention")
    return {
        "convolution": convolution,
        **dict.fromkeys(_names("mm bmm mv dot"), product),
        **dict.fromkeys(_names("addmm baddbmm addmv"), biased_product),
        **dict.fromkeys((f"_scaled_dot_product_{name}" for name in fused), attention),
        **dict.fromkeys(_names("mean _adaptive_avg_pool2d _adaptive_avg_pool3d"), mean),
        **dict.fromkeys(_names("sum amax amin max min adaptive_max_pool2d adaptive_max_pool3d"), reduction),
        **dict.fromkeys(_names("avg_pool2d avg_pool3d"), average_pool),
        **dict.fromkeys(_names("max_pool2d_with_indices max_pool3d_with_indices"), max_pool),
    }


_RULES = _rules()


def count_operations(model: nn.Module, *inputs: Any) -> Record:
    """Run a network once, without gradients, and count what it does.

    Args:
        model: Any module, run in the mode that it is in.
        *inputs: Its inputs; the first axis of the first tensor counts the samples.

    Raises:
        ConfigurationError: If the network is compiled or scripted.
    """
    with torch.no_grad(), OperationCounter(model) as counter:
        model(*inputs)
    return counter.record()
