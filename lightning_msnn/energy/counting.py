"""The counting engine: watches any network through forward hooks and dispatch, and counts what each layer does.

A layer is a module by its qualified name. Hooks say which module runs, the dispatch mode sees every operation in it,
and :mod:`lightning_msnn.energy.rules` says what an operation counts as. One that no rule knows is listed by name.

What the engine needs of a network, and no more:

- The first axis of the first tensor that the network is called with counts the samples.
- A module is a layer of **neurons** if it has a ``threshold``, a ``v_threshold``, a ``p.v_th`` or a ``decay`` and no
  synapse inside, as those of this package, SpikingJelly, snnTorch and Norse have, and is not one of torch's own. What
  it returns first are its spikes, with samples, time steps and samples, or both in one axis first, unless it has a
  ``decay``: then it carries membranes. Which of them is seen from the operations; where they are not counted, and the
  time steps are a multiple of the samples, SpikingJelly's ``step_mode`` tells it alone. Multiplications by constants
  inside, but for those of spikes, are membrane updates, and the rest of its arithmetic is that of firing and reset.
- A module that holds neurons multiplies nothing but what they hand to the next time step.
- A module with a function ``omega`` is a **projection**: its elementary operations are Omega's.
- A buffer holds weights until the network fills it from its inputs while it is counted; then it holds state, as long as
  nothing else, such as zeros, is put there.

A module reads its weights once in a call, however many steps of a recurrence it takes with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_msnn.energy.profiles import COLUMN, FIELDS
from lightning_msnn.energy.rules import (
    FACTORIES,
    FREE,
    FUNCTIONS,
    POSITIONS,
    RANDOM,
    RULES,
    UNKNOWN,
    Call,
    Known,
    Rule,
    known,
)
from lightning_msnn.errors import ConfigurationError, choose

__all__ = ["OperationCounter", "Record", "count_operations", "layer_names", "parameters_of_layers"]

_SYNAPSES = (nn.Linear, nn.RNNBase, nn.modules.conv._ConvNd)


@dataclass
class Record:
    """What a network did for some samples.

    Args:
        layers: Names of all modules, the network's own is ``""``.
        counts: Sums over samples, int64 ``(len(layers), len(FIELDS))``.
        samples: Number of samples.
        parameters: Parameters of each layer without those of its children, int64 ``(len(layers),)``.
        uncounted: Calls of each operation that could not be counted, by ``layer: operation``.
        fired: For each layer of neurons, how often each neuron fired, int64, the shape of one sample. A layer that met
            maps of further shapes is there once more for each, with the shape in its name.
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


def parameters_of_layers(model: nn.Module) -> Tensor:
    """Parameters of each layer without those of its children, int64, in that order; those kept as buffers too.

    Parameters that layers share are those of the first of them.
    """
    numbers, seen = [], set[Tensor]()
    for module in model.modules():
        kept = [b for name, b in module.named_buffers(recurse=False) if name in ("weight", "bias")]
        own = {*module.parameters(recurse=False), *kept} - seen
        seen |= own
        numbers.append(sum(x.numel() for x in own))
    return torch.tensor(numbers, dtype=torch.int64)


def _tensors(values: Any) -> list[Tensor]:
    """Tensors in arguments or outputs, in lists, tuples and mappings too; faster than a general tree."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | Mapping):
            found += _tensors(value)
    return found


def _is_neuron(module: nn.Module) -> bool:
    marked = any(hasattr(module, name) for name in ("threshold", "v_threshold", "decay"))
    marked |= hasattr(getattr(module, "p", None), "v_th")
    kind = type(module).__base__ if nn.utils.parametrize.is_parametrized(module) else type(module)
    others = kind.__module__.startswith("torch.nn.") or any(isinstance(m, _SYNAPSES) for m in module.modules())
    return marked and not others


def _kind(module: nn.Module) -> str:
    """How the operations in a module are to be understood, see :class:`~lightning_msnn.energy.rules.Call`."""
    if callable(getattr(module, "omega", None)):
        return "omega"
    if _is_neuron(module):
        return "neuron"
    return "carrier" if any(_is_neuron(child) for child in module.children()) else "plain"


class _Contents:
    """What a tensor holds: told by itself, its memory and how often that was written into."""

    def __init__(self, x: Tensor) -> None:
        self.tensor, self.address = x, x.untyped_storage().data_ptr()
        self.version = 0 if x.is_inference() else x._version

    def same(self, other: _Contents | None) -> bool:
        """Whether nothing has changed since."""
        if other is None or self.tensor is not other.tensor:
            return False
        return (self.address, self.version) == (other.address, other.version)


def _covers(x: Tensor) -> bool:
    """Whether a tensor is all that there is in its memory."""
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _unknown(call: Call) -> str:
    return call.name


class _Functions(TorchFunctionMode):
    """Hands linear and recurrent layers to the counter as a whole."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # By position, as rules read it.
        given = (*args, *(kwargs[key] for key in POSITIONS.get(name, ())[len(args) :] if key in kwargs))
        if name not in FUNCTIONS or not self.counter.takes(name, given):
            return func(*args, **kwargs)
        with self.counter.pause():  # what it is made of is counted already
            out = func(*args, **kwargs)
        with torch.no_grad(), _disable_current_modes():
            self.counter.count(name, FUNCTIONS[name], given, kwargs, out, written="out" in kwargs)
        return out


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation to the counter."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # Composed operations, views too, arrive in inference mode alone: counted by what they are of, as elsewhere.
        known = name in FREE or name in RULES or name.rstrip("_") in RULES
        if not known and not self.counter.paused and func.namespace == "aten":
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

    ``samples`` is how many went through the network so far. The network runs as always: with or without gradients, in
    training or evaluation, under autocast.

    Args:
        model: Any module; the first axis of its first tensor argument counts the samples.
        operations: Whether to count operations; without, only what neurons do, beside the kernels.

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
        self._handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.layers = layer_names(self.model)
        self.samples = 0
        self.paused = False
        # Buffers as the network left them, filled from its inputs, and all of them as they were when it began.
        self._state: dict[str, _Contents] = {}
        self._buffers: dict[str, _Contents] = {}
        self._numbers: Counter[tuple[int, str]] = Counter()
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._uncounted: Counter[str] = Counter()
        self._fired: dict[tuple[int, torch.Size], Tensor] = {}
        self._visits: Counter[tuple[int, torch.Size]] = Counter()
        self._stack: list[tuple[int, str]] = []  # rows and kinds of the modules that run
        self._read: list[set[tuple[int, torch.Size]]] = []  # weights that each of them has read
        self._modes: ExitStack | None = None
        self._batch = self._whole = 1  # samples that go through what runs, and that went into the network
        self._constants: set[int] = set()
        self._kept: list[Tensor] = []
        self._facts: Any = WeakTensorKeyDictionary()  # what is known of tensors, and after how many writes
        self._writes: Counter[int] = Counter()  # into the memory at an address

    # Hooks

    def __enter__(self) -> OperationCounter:
        """Begin with no counts.

        Raises:
            ConfigurationError: If weights are on the meta device, where nothing is computed.
        """
        self._reset()
        if any(weight.is_meta for weight in self.model.parameters()):
            raise ConfigurationError(
                f"operations of a {type(self.model).__name__} on the meta device cannot be counted: spikes have no "
                "values there; load its weights"
            )
        kinds = {module: _kind(module) for module in self.model.modules()}
        firing = {m for m, kind in kinds.items() if kind == "neuron" and not hasattr(m, "decay")}
        for row, (module, kind) in enumerate(kinds.items()):
            holds = kind == "neuron" and any(m in firing for m in module.modules() if m is not module)
            if self.operations or holds or module is self.model:
                enter, leave = partial(self._enter, (row, kind)), partial(self._leave, (row, kind))
                self._handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, always_call=True, prepend=True),
                ]
            if module in firing:
                self._handles.append(module.register_forward_hook(partial(self._fire, row), prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop()

    def _enter(self, frame: tuple[int, str], module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self.model and self._modes is None:
            tensors = _tensors([*args, *kwargs.values()])
            samples = len(tensors[0]) if tensors and tensors[0].dim() else 1
            self.samples += samples
            self._batch = self._whole = max(1, samples)
            self._buffers = {name: _Contents(buffer) for name, buffer in module.named_buffers()}
            # What the network filled is no weight, until something else is put there, such as zeros.
            fixed = [now.tensor for name, now in self._buffers.items() if not now.same(self._state.get(name))]
            weights = [*module.parameters(), *fixed]
            self._kept = [x for x in weights if x.numel()]  # also if it is replaced
            self._constants = {x.untyped_storage().data_ptr() for x in self._kept}
            torch.clear_autocast_cache()  # of weights in another type, whose making shows that they are constants
            self._modes = ExitStack()
            if self.operations:
                self._modes.enter_context(_Functions(self))
                self._modes.enter_context(_Operations(self))
        if self._modes is not None:
            self._batch *= getattr(module, "steps_in_batch", 1)  # time steps, one after another on the batch axis
            self._stack.append(frame)
            self._read.append(set())

    def _leave(self, frame: tuple[int, str], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._modes is None:
            return
        row, kind = frame
        self._batch //= getattr(module, "steps_in_batch", 1)
        while self._stack and self._stack.pop() != frame:  # an error left the frames of its callees
            pass
        del self._read[len(self._stack) :]
        if not self._stack:
            for name, buffer in module.named_buffers():
                now = _Contents(buffer)
                if self._writes[now.address] or not now.same(self._buffers.get(name)):
                    self._state.pop(name, None)
                    if now.address not in self._constants:
                        self._state[name] = now
            self._stop()
        if kind == "omega":
            self._add(row, omega=sum(x.numel() for x in _tensors(output)))

    def _stop(self) -> None:
        if self._modes is not None:
            self._modes.close()
            self._modes = None
        self._stack.clear()
        self._read.clear()
        self._kept.clear()
        self._buffers = {}
        self._constants.clear()
        self._facts.clear()
        self._writes.clear()

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
        # One transfer from the device.
        tensors = torch.stack(list(self._tensors.values())).tolist() if self._tensors else []
        for (row, name), number in (*self._numbers.items(), *zip(self._tensors, tensors, strict=True)):
            counts[row, COLUMN[name]] += number
        names: dict[tuple[int, torch.Size], str] = {}
        for row, shape in sorted(self._fired, key=lambda key: key[0]):
            layer = self.layers[row]
            names[row, shape] = f"{layer} {tuple(shape)}" if layer in names.values() else layer
        return Record(
            self.layers,
            counts,
            self.samples,
            parameters_of_layers(self.model),
            dict(sorted(self._uncounted.items())),
            {name: self._fired[key] for key, name in names.items()},
            {name: self._visits[key] for key, name in names.items()},
        )

    def _fire(self, row: int, module: nn.Module, args: Any, output: Any) -> None:
        spikes = next(iter(_tensors(output)), None)
        within = any(kind == "neuron" and outer != row for outer, kind in self._stack)  # a part of other neurons
        if self._modes is None or within or spikes is None or spikes.dim() == 0:
            return
        steps = self._known(spikes).steps == "axis" or getattr(module, "step_mode", "") == "m"
        with torch.no_grad(), _disable_current_modes():  # what counting computes is not the network's
            if spikes.dim() > 1 and spikes.shape[1] == self._whole and (steps or spikes.shape[0] % self._whole):
                spikes = spikes.flatten(0, 1)  # time steps, and then samples
            # In the type of the spikes, which is several times as fast as in bool; added up where integers are exact.
            found = torch.ne(spikes, 0, out=torch.empty_like(spikes))
            fired, places = found.sum(0, dtype=torch.promote_types(found.dtype, torch.float32)).long(), spikes.numel()
            self._add(row, neurons=places, spikes=fired.sum(), values_read=places, spikes_written=places)
            key = row, fired.shape
            before = self._fired.get(key)
            self._fired[key] = fired if before is None else before + fired
            self._visits[key] += spikes.shape[0]

    # Operations

    def _constant(self, x: Tensor) -> bool:
        return x.numel() == 0 or x.untyped_storage().data_ptr() in self._constants

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave operations uncounted, while they stay seen by other modes."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def takes(self, name: str, args: Any) -> bool:
        """Whether a function is counted as a whole: a linear layer only where its weights are parameters."""
        if self._modes is None or not self._stack:
            return False
        return name != "linear" or [self._constant(x) for x in args[:2]] == [False, True]

    def count(self, name: str, rule: Rule, args: Any, kwargs: Any, out: Any, written: bool = False) -> None:
        """Add what a rule says of a call, which may have written into its inputs, to the layer that runs."""
        row = self._stack[-1][0]
        if written:  # what is written into a constant makes it one no longer
            self._constants.difference_update(x.untyped_storage().data_ptr() for x in _tensors(out))
        inputs = _tensors([*args, *kwargs.values()])
        call = self._call(name, args, kwargs, inputs, out)
        amounts = rule(call)
        self._know(call, rule, _tensors(out), written)
        if isinstance(amounts, str):
            self._uncounted[f"{self.layers[row] or type(self.model).__name__}: {amounts}"] += 1
            return
        if "weights_read" in amounts:
            matrices = (x for x in inputs if x.dim() > 1 and self._constant(x))
            weights = {(x.data_ptr(), x.shape) for x in matrices if self._known(x).distinct != 1}  # no zeros, made anew
            if weights and weights <= self._read[-1]:
                amounts["weights_read"] = 0
            self._read[-1] |= weights
        self._add(row, **amounts)

    def _call(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any, view: bool = False) -> Call:
        kind = self._stack[-1][1]
        return Call(name, args, kwargs, inputs, _tensors(out)[0], self._batch, kind, self._constant, self._known, view)

    def _known(self, x: Tensor) -> Known:
        """What is known of a tensor, unless its memory was written into since."""
        fact, writes = self._facts.get(x, (UNKNOWN, 0))
        return fact if writes == self._writes[x.untyped_storage().data_ptr()] else UNKNOWN

    def _know(self, call: Call, rule: Rule | None, outputs: Iterable[Tensor], written: bool = False) -> None:
        """Remember what the outputs are."""
        fact = known(call, rule)
        for out in outputs:
            place = out.untyped_storage().data_ptr()
            self._writes[place] += written
            if fact != UNKNOWN:
                self._facts[out] = fact, self._writes[place]
            else:
                self._facts.pop(out, None)

    def dispatched(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation, given its arguments and what it returned."""
        if self._modes is None or not self._stack or self.paused:
            return
        name = func.overloadpacket.__name__
        inputs, outputs = _tensors([*args, *kwargs.values()]), _tensors(out)
        view = func.is_view or name == "_unsafe_view"
        written: bool = func._schema.is_mutable
        emptied = name in ("zero_", "fill_") and len(inputs) == 1 and all(map(_covers, outputs))
        if name in FACTORIES or emptied or (name not in RANDOM and all(map(self._constant, inputs))):
            # Computed from parameters alone: a constant at inference. It is kept, so that its memory is not another's.
            self._constants.update(x.untyped_storage().data_ptr() for x in outputs if x.numel())
            self._kept += outputs
            if outputs:
                self._know(self._call(name, args, kwargs, inputs, outputs, view), None, outputs, written)
            return
        if written:
            self._constants.difference_update(x.untyped_storage().data_ptr() for x in outputs)
        if func.is_view or name in FREE or all(x.dim() == 0 for x in outputs):
            if outputs:
                self._know(self._call(name, args, kwargs, inputs, outputs, view), None, outputs, written)
            return
        name = name if name in RULES else name.rstrip("_")
        self.count(name, RULES.get(name, _unknown), args, kwargs, out, written)


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
