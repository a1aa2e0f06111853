"""The counting engine: hooks say which module runs, and one dispatch mode sees every operation in it.

A layer is a module by its qualified name. :mod:`lightning_msnn.energy.rules` says what an operation counts as; one that
no rule knows is listed by name.

- The first axis of the network's first tensor argument counts the samples. The first axis of what its layers are called
  with is that number or a multiple of it, such as windows of each sample; a product of matrices where it is not is
  listed by name.
- A module is a layer of **neurons** if it has a ``threshold``, a ``v_threshold``, a ``p.v_th`` or a ``decay`` and no
  synapse inside, as in this package, SpikingJelly, snnTorch and Norse, and is not one of torch's own. It returns spikes
  first, or membranes if it has a ``decay``. Multiplications by constants inside, except of spikes, are membrane
  updates; the rest of its arithmetic belongs to firing and reset.
- A **recurrent layer** without modules inside, torch's or one with the same names of parameters, is counted as a whole
  from its input and output.
- A module with a function ``omega`` is a **projection**: its elementary operations are Omega's.
- Parameters, buffers and what is computed from them alone are weights, unless the network writes into them. A module
  reads its weights once in a call, however many steps of a recurrence it takes with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_msnn.energy.measures import Record
from lightning_msnn.energy.profiles import COLUMN, FIELDS
from lightning_msnn.energy.rules import FREE, NOTHING, RULES, Call, mark, recurrent
from lightning_msnn.errors import ConfigurationError

__all__ = ["OperationCounter", "count_operations", "parameters_of_layers"]

_SYNAPSES = (nn.Linear, nn.RNNBase, nn.modules.conv._ConvNd)


def parameters_of_layers(model: nn.Module) -> Tensor:
    """Parameters of each layer without those of its children, int64 ``(layers,)``; also weights kept as buffers.

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
    return [x for value in values for x in _tensors(value)]


def _kind(module: nn.Module) -> str:
    """What a module is, see :class:`~lightning_msnn.energy.rules.Call`."""
    if callable(getattr(module, "omega", None)):
        return "omega"
    fires = any(hasattr(module, x) for x in ("threshold", "v_threshold", "decay"))
    if fires or hasattr(getattr(module, "p", None), "v_th"):
        of_torch = type(module).__module__.startswith("torch.nn.")
        if not (of_torch or any(isinstance(m, _SYNAPSES) for m in module.modules())):
            return "neuron"
    return "recurrent" if hasattr(module, "weight_ih_l0") and not any(module.children()) else "plain"


@dataclass
class _Frame:
    """A module that runs: its row, its kind, the items that it was called with, and the weights that it read."""

    row: int
    kind: str
    items: int
    read: set[tuple[int, torch.Size]] = field(default_factory=set)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation to the counter."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # In inference mode composed operations arrive as they are called; what they are made of is counted.
        if func.namespace == "aten" and name not in FREE and name.rstrip("_") not in RULES:
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

    ``samples`` is how many went through the network so far. The network may run in any mode: with or without gradients,
    in training or evaluation, under autocast.

    Args:
        model: Any module; the first axis of its first tensor argument counts the samples.
        operations: Whether to count operations; without, only what neurons do, while kernels run.

    Raises:
        ConfigurationError: If the network is compiled, which leaves nothing to watch.
    """

    def __init__(self, model: nn.Module, operations: bool = True) -> None:
        for module in model.modules():
            if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
                raise ConfigurationError(
                    "operations of a compiled network cannot be counted: leave that out, or do not compile"
                )
        self.model = model
        self.operations = operations
        self._handles: list[Any] = []
        self._modes = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self.layers = tuple(name for name, _ in self.model.named_modules())
        self.samples = 0
        self._counts: dict[tuple[int, str], int | Tensor] = {}
        self._uncounted: Counter[str] = Counter()
        self._fired: dict[str, Tensor] = {}
        self._visits: Counter[str] = Counter()
        self._weights = [*self.model.parameters(), *self.model.buffers()]  # kept, lest their memory be another's
        self._levels = max([1, *(int(getattr(m, "levels", 1)) for m in self.model.modules() if _kind(m) == "neuron")])
        self._fixed = {x.untyped_storage().data_ptr() for x in self._weights if x.numel()}
        self._stop()

    # Hooks

    def __enter__(self) -> OperationCounter:
        """Begin with no counts."""
        self._reset()
        for row, module in enumerate(self.model.modules()):
            kind = _kind(module)
            if self.operations or module is self.model:
                enter, leave = partial(self._enter, row, kind), partial(self._leave, row)
                self._handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, always_call=True, prepend=True),
                ]
            if kind == "neuron" and not hasattr(module, "decay"):
                self._handles.append(module.register_forward_hook(partial(self._fire, row), prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop()

    def _enter(self, row: int, kind: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next((x for x in _tensors([*args, *kwargs.values()]) if x.dim()), None)
        if not self._stack:
            if module is not self.model:
                return
            self._batch = 1 if first is None else max(1, len(first))
            self.samples += 1 if first is None else len(first)
            if self.operations:
                torch.clear_autocast_cache()  # of weights in another type, whose making shows that they are constants
                self._modes.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)  # it is one operation, whose parts are not seen
                self._modes.enter_context(_Operations(self))
        self._batch *= getattr(module, "steps_in_batch", 1)  # time steps, one after another on the batch axis
        around = self._stack[-1].items if self._stack else self._batch
        self._stack.append(_Frame(row, kind, around if first is None else len(first)))

    def _leave(self, row: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._stack or self._stack[-1].row != row:
            return
        frame = self._stack.pop()
        if frame.kind == "omega":
            self._add(row, {"omega": sum(x.numel() for x in _tensors(output))})
        elif frame.kind == "recurrent" and _tensors(output):
            x, state = [*args, *kwargs.values(), None, None][:2]
            with torch.no_grad(), _disable_current_modes():
                self._add(row, recurrent(module, x, state, _tensors(output)[0], self._batch, self._levels))
        self._batch //= getattr(module, "steps_in_batch", 1)
        if not self._stack:
            self._stop()

    def _stop(self) -> None:
        self._stack: list[_Frame] = []
        self._batch = 1
        self._constants = set(self._fixed)
        self._kept: list[Tensor] = []  # constants that were computed, likewise
        self._marks: Any = WeakTensorKeyDictionary()
        self._modes.close()

    # Sums

    def _add(self, row: int, amounts: Mapping[str, int | Tensor] | str) -> None:
        if isinstance(amounts, str):
            self._uncounted[f"{self.layers[row] or type(self.model).__name__}: {amounts}"] += 1
            return
        for name, amount in amounts.items():
            self._counts[row, name] = self._counts.get((row, name), 0) + amount

    def record(self) -> Record:
        """Return what was counted since the context was entered."""
        counts = torch.zeros(len(self.layers), len(FIELDS), dtype=torch.int64)
        tensors = {key: amount for key, amount in self._counts.items() if isinstance(amount, Tensor)}
        moved = torch.stack([*tensors.values()]).tolist() if tensors else []  # one transfer from the device
        for (row, name), number in (self._counts | dict(zip(tensors, moved, strict=True))).items():
            counts[row, COLUMN[name]] = number
        maps: tuple[dict[str, Any], ...] = self._uncounted, self._fired, self._visits
        found: list[Any] = [dict(sorted(x.items())) for x in maps]
        return Record(self.layers, counts, self.samples, parameters_of_layers(self.model), *found)

    def _fire(self, row: int, module: nn.Module, args: Any, output: Any) -> None:
        spikes = next(iter(_tensors(output)), None)
        if not self._stack or spikes is None or spikes.dim() == 0:
            return
        with torch.no_grad(), _disable_current_modes():  # what counting computes is not the network's
            # In the type of the spikes, which is several times as fast as in bool; added up where integers are exact.
            found = torch.ne(spikes, 0, out=torch.empty_like(spikes))
            fired, places = found.sum(0, dtype=torch.promote_types(found.dtype, torch.float32)).long(), spikes.numel()
            levels = getattr(module, "levels", 1)
            self._add(row, {"neurons": places, "values_read": places, "spikes_written": places * levels})
            self._add(row, {"spikes": fired.sum()})
            if levels > 1:  # a comparison for each level
                further = (
                    spikes.sum(0, dtype=torch.promote_types(spikes.dtype, torch.float32)).long().sum() - fired.sum()
                )
                self._add(row, {"further_levels": further, "additions": places * (levels - 1)})
            name = self.layers[row]
            if name in self._fired and self._fired[name].shape != fired.shape:
                name = f"{name} {tuple(fired.shape)}"
            self._fired[name] = self._fired[name] + fired if name in self._fired else fired
            self._visits[name] += spikes.shape[0]

    # Operations

    def _constant(self, x: Tensor) -> bool:
        return x.numel() == 0 or x.untyped_storage().data_ptr() in self._constants

    def dispatched(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation, given its arguments and what it returned, for the layer that runs."""
        outputs = _tensors(out)
        if not self._stack or self._stack[-1].kind == "recurrent" or not outputs:
            return
        frame, name = self._stack[-1], func.overloadpacket.__name__
        inputs = _tensors([*args, *kwargs.values()])
        places = [x.untyped_storage().data_ptr() for x in outputs if x.numel()]
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not drawn and (name.startswith(_NUMBERS) or all(map(self._constant, inputs))):
            self._constants.update(places)
            self._kept += outputs
            return
        if func._schema.is_mutable:  # what is written into a constant makes it one no longer
            self._constants.difference_update(places)
            self._fixed.difference_update(places)
        name = name if name in FREE else name.rstrip("_")
        call = Call(
            name, args, kwargs, inputs, outputs[0], self._batch, frame.items, frame.kind, self._constant,
            lambda x: self._marks.get(x, NOTHING), func.is_view or name == "_unsafe_view", self._levels,
        )  # fmt: skip
        known = mark(call)
        if not (call.view or name in FREE or all(x.dim() == 0 for x in outputs)):
            with torch.no_grad(), _disable_current_modes():
                amounts = RULES[name](call) if name in RULES else name
            if not isinstance(amounts, str) and "weights_read" in amounts:
                weights = {(x.data_ptr(), x.shape) for x in inputs if x.dim() > 1 and self._constant(x)}
                if weights and weights <= frame.read:
                    amounts["weights_read"] = 0
                frame.read |= weights
            self._add(frame.row, amounts)
        for x in outputs:
            self._marks[x] = known


_NUMBERS = ("new_", "zeros", "ones", "full", "empty", "zero_", "fill_", "arange", "lift_")
"""How names of operations begin whose result holds nothing but numbers."""


def count_operations(model: nn.Module, *inputs: Any) -> Record:
    """Run a network once, without gradients, and count what it does.

    Args:
        model: Any module, run in the mode that it is in.
        *inputs: Its inputs; the first axis of the first tensor counts the samples.

    Raises:
        ConfigurationError: If the network is compiled.
    """
    with torch.no_grad(), OperationCounter(model) as counter:
        model(*inputs)
    return counter.record()
