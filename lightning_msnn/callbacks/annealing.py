"""Spikes that sharpen while a network trains: from a function with a true gradient to the exact step."""

import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torchmetrics import Metric, MetricCollection

from lightning_msnn.errors import ConfigurationError, check_number, choose
from lightning_msnn.functional.spike import SOFT
from lightning_msnn.nn import Spike, set_annealing
from lightning_msnn.runs.progress import steps_done
from lightning_msnn.runs.strategies import shards_weights

__all__ = ["ANNEALING_SHAPES", "SpikeAnnealing"]

ANNEALING_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "root": math.sqrt,
    "square": lambda progress: progress * progress,
}
"""Share of the step by the progress of an annealing, both in [0, 1], by the name that configurations use."""

_PASSES = 10  # of exact spikes in an epoch, in the first twice as many, that statistics of batch norm are taken from
_EVERY = 32  # steps at most for one of them


class _Made(NamedTuple):
    """A tensor that a call of the step has made with annealed spikes, as it was when it was made.

    Of one that compiled code or inference mode has made, the version is not known. One inside an object is -1.
    """

    call: int
    leaf: int
    tensor: Tensor
    version: int | None
    grad_fn: Any

    def is_given_as(self, x: Tensor) -> bool:
        """Whether an input is this tensor, perhaps detached, and unchanged."""
        if x is not self.tensor and (
            _memory(x) is None
            or (x.data_ptr(), x.shape, x.stride()) != (self.tensor.data_ptr(), self.tensor.shape, self.tensor.stride())
        ):
            return False
        if self.version is None:
            return x.grad_fn is None or x.grad_fn is self.made_by
        return _version(x) == self.version

    @property
    def made_by(self) -> Any:
        """Autograd's node of it, if there is one."""
        return self.tensor.grad_fn if self.version is None else self.grad_fn

    def shares_memory(self, x: Tensor) -> bool:
        """Whether an input is this tensor or a view of it, perhaps changed."""
        return x is self.tensor or _memory(x) == _memory(self.tensor) is not None


def _memory(x: Tensor) -> int | None:
    """Where a tensor's elements begin, if they are in one place: those of a sparse one are not."""
    try:
        return x.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place, where that is counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class _Call(NamedTuple):
    """What was called in a step, and with what: copies, as what is given may be changed by then."""

    module: nn.Module
    inputs: list[Any]
    spec: TreeSpec
    autocast: tuple[str, torch.dtype, bool]


class _Hook:
    """A hook that what is copied or stored of a module does not keep."""

    def __init__(self, call: Callable[..., None] | None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None]]:
        return _Hook, (None,)


class SpikeAnnealing(Callback):
    """Let neurons return ``a s + (1 - a) f(u)`` in training, with ``a`` rising from 0 to 1; then exact spikes.

    A step has no gradient, so that training with one from the start follows a guess. At ``a = 0`` and with the
    rectifier a network is its ReLU twin. (Whetstone, Severa et al., Nature Machine Intelligence 2019, sharpens a
    bounded rectifier layer by layer instead.)

    Evaluation is with exact spikes throughout, and so are the running statistics of batch norms: while ``a < 1`` they
    are not those of the training steps, but of forward passes with exact spikes, one in 32 steps or about 10 in an
    epoch (20 in the first, or in all if data has no length) if that is more, at random. For these, what the training
    step has called is called once more after it with the same: the module itself, or its parts that have spiking
    neurons and those that get their outputs. (Where a strategy shards the weights, statistics are those of the training
    steps.) All this depends on the step alone, so that a resumed training has the same. Steps are the optimizer's, or
    batches where a module steps its optimizers by hand. ``a`` is logged as ``annealing``.

    Args:
        kind: The function ``f``, one of :data:`lightning_msnn.functional.SOFT`.
        until: Share of the training after which spikes are exact, in (0, 1].
        shape: How ``a`` rises, one of :data:`ANNEALING_SHAPES`.

    Raises:
        ConfigurationError: If an argument is not allowed; when training starts, if the network has no spiking neurons
            or the end of training is not known; in the first step, if what it calls cannot be called once more: a part
            with what the step has computed from the output of another, or a part that gets or returns an iterator.
    """

    def __init__(self, kind: str = "rectifier", until: float = 0.6, shape: str = "linear") -> None:
        choose(SOFT, kind, "kind of annealing")
        if check_number("until, the share of the training that is annealed,", until) == 0.0:
            raise ConfigurationError("until, the share of the training that is annealed, must be above 0, not 0")
        self.kind = kind
        self.until = until
        self.shape = shape
        choose(ANNEALING_SHAPES, shape, "shape of annealing")
        self._total = 1
        self._share = 1.0
        self._hooks: list[Any] = []
        self._held: list[nn.modules.batchnorm._BatchNorm] = []
        self._turn: bool | None = None  # None outside of annealed steps
        self._backward = False
        self._inside: object = None
        self._again = 0  # how often what is called from the step has called itself
        self._calls: list[_Call] = []
        self._made: list[_Made] = []
        self._tracked: dict[nn.Module, int] = {}

    def share_at(self, step: int, total: int) -> float:
        """Return the share ``a`` of the step after ``step`` of ``total`` optimizer steps."""
        return ANNEALING_SHAPES[self.shape](min(1.0, step / (self.until * max(1, total))))

    @staticmethod
    def every(epoch: int, batches: float) -> int:
        """Return in how many batches there is one pass with exact spikes, in an epoch of so many (or ``inf``)."""
        passes = _PASSES if epoch else 2 * _PASSES
        return max(1, int(min(_EVERY * passes, batches)) // passes)

    @classmethod
    def turn(cls, epoch: int, batch_idx: int, batches: float) -> bool:
        """Whether there is one in a batch: in the first, then at random, so that parts called by turns are reached."""
        every = cls.every(epoch, batches)
        block, place = divmod(batch_idx, every)
        return place == (random.Random(f"{epoch} {block}").randrange(every) if epoch or block else 0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is an end to anneal by."""
        if stage != "fit":
            return
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise ConfigurationError(
                f"SpikeAnnealing must know where training ends: set max_epochs, not {trainer.max_epochs}"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to anneal, now that ``setup`` and ``configure_model`` have made it."""
        if not any(isinstance(module, Spike) for module in pl_module.modules()):
            raise ConfigurationError(
                f"{type(pl_module).__name__} has no spiking neurons to anneal: leave out SpikeAnnealing"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See how many steps there will be."""
        total = trainer.estimated_stepping_batches
        if not 0 <= total < math.inf:  # where data has no length, it is max_steps, and so may be -1
            raise ConfigurationError(
                f"SpikeAnnealing must know where training ends, and the data has no length: "
                f"set max_steps, not {trainer.max_steps}"
            )
        self._total = int(total)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the share of this step, in which calls are kept to be made once more if it is the turn of that."""
        self._share = self.share_at(steps_done(trainer), self._total)
        takes = self._share < 1.0 and not shards_weights(trainer.strategy)
        if takes and (norms := [norm for norm in _norms(pl_module) if norm.running_mean is not None]):
            all_batches = self._total * trainer.accumulate_grad_batches
            place = trainer.current_epoch, batch_idx, min(trainer.num_training_batches, all_batches)
            if trainer.num_training_batches == math.inf:  # the training is one epoch
                place = 0, trainer.fit_loop.total_batch_idx, all_batches
            self._turn = self.turn(*place)
            self._tracked = {norm: _tracked(norm) for norm in norms} if self._turn else {}
            for module in (pl_module, *_parts(pl_module)) if not self._hooks else ():
                enter, leave = _Hook(self._enter), _Hook(self._leave)
                self._hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(leave, always_call=True))
        elif self._hooks:
            self._unhook()
        set_annealing(pl_module, self._share, self.kind)
        pl_module.log("annealing", self._share, batch_size=1)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep no calls that repeat what is kept, as activation checkpoints make them."""
        self._backward = True

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take statistics of exact spikes, with the weights of this step."""
        self._backward = False
        if pl_module.automatic_optimization:  # else there may be more to come
            self._take_statistics(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Leave exact spikes, and batch norms that track their input, for what comes between two steps."""
        self._take_statistics(trainer, pl_module)
        self._release()
        if self._share < 1.0:
            set_annealing(pl_module, None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the network as it was."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact spikes, and batch norms that track their input."""
        self._release()
        self._unhook()
        set_annealing(pl_module, None)

    def _release(self) -> None:
        self._turn, self._backward, self._inside, self._again = None, False, None, 0
        self._calls, self._made, self._tracked = [], [], {}
        self._track()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _track(self) -> None:
        for norm in self._held:
            norm.track_running_stats = True
        self._held = []

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the running statistics of what is called from following the step, and what it is called with."""
        if self._turn is None or self._inside is not None:
            self._again += self._inside is module
            return
        if not module.training or (isinstance(module, pl.LightningModule) and _is_redirected(module)):
            return  # in evaluation it is counted, perhaps
        given, spec = tree_flatten((args, kwargs))
        found = [self._find(x) if isinstance(x, Tensor) else None for x in given]
        others = [x for x, made in zip(given, found, strict=True) if made is None]
        spiking = any(isinstance(part, Spike) for part in module.modules())
        computed = (self._turn or not spiking) and _follows(others, self._made)  # it may be a long way back
        if not (spiking or computed or any(found)):
            for norm in _norms(module):
                self._tracked.pop(norm, None)
            return  # it has nothing to do with spikes
        self._inside = module
        for norm in _norms(module):
            if norm.track_running_stats:
                norm.track_running_stats = False
                self._held.append(norm)
        if not self._turn or self._backward:
            return
        if any(isinstance(x, Iterator) for x in others):
            self._refuse(module, "is called with an iterator")
        if computed:
            before = type(self._calls[-1].module).__name__
            self._refuse(module, f"is called with what the step computes from the output of {before}")
        inputs = [
            made or (x.detach().clone() if isinstance(x, Tensor) else x) for x, made in zip(given, found, strict=True)
        ]
        device = next((x.device.type for x in module.parameters()), "cpu")
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._calls.append(_Call(module, inputs, spec, autocast))

    def _find(self, x: Tensor) -> _Made | None:
        return next((made for made in self._made if made.leaf >= 0 and made.is_given_as(x)), None)

    @staticmethod
    def _refuse(module: nn.Module, what: str) -> None:
        raise ConfigurationError(
            f"SpikeAnnealing cannot call {type(module).__name__} once more with exact spikes, since it "
            f"{what}: make that in the forward of the LightningModule, and call the LightningModule in its training "
            "step"
        )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside is not module:
            return
        if self._again:
            self._again -= 1
            return
        self._inside = None
        keeps = self._turn and not self._backward
        if output is None and sys.exc_info()[0]:  # it has failed
            del self._calls[len(self._calls) - bool(keeps) :]
            return
        if keeps and isinstance(output, Iterator):
            self._refuse(module, "returns an iterator")
        for leaf, x in enumerate(tree_leaves(output)):
            inside = () if isinstance(x, Tensor) else getattr(x, "__dict__", {}).values()
            for number, tensor in ((leaf, x), *((-1, value) for value in inside)):
                if isinstance(tensor, Tensor):
                    grad_fn = None if torch.compiler.is_compiling() else tensor.grad_fn
                    self._made.append(_Made(len(self._calls) - 1, number, tensor, _version(tensor), grad_fn))

    @torch.no_grad()
    def _take_statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the calls of the step once more, with exact spikes, if it is the turn of that and it is not done."""
        if not self._turn:
            return
        self._turn = False
        followed = [
            name
            for name, norm in pl_module.named_modules()
            if norm in self._tracked and _tracked(norm) != self._tracked[norm]
        ]
        if followed:
            rank_zero_warn(
                f"SpikeAnnealing takes no statistics of exact spikes for {len(followed)} batch norms, such as "
                f"{followed[0]!r}: the training step has called a method of the part that they are in, not that part"
            )
        self._track()
        calls, self._calls = self._calls, []
        results: list[list[Any]] = []
        self._inside = self  # of these calls nothing is kept
        set_annealing(pl_module, None)
        with trainer.precision_plugin.forward_context():
            for call in calls:
                given = [results[x.call][x.leaf] if isinstance(x, _Made) else x for x in call.inputs]
                args, kwargs = tree_unflatten(given, call.spec)
                device, dtype, enabled = call.autocast
                with torch.autocast(device, dtype, enabled):
                    results.append(tree_leaves(call.module(*args, **kwargs)))
        set_annealing(pl_module, self._share, self.kind)
        self._inside = None


def _norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _tracked(norm: nn.Module) -> int:
    """How many batches a batch norm has tracked."""
    number = norm.num_batches_tracked
    return int(number) if isinstance(number, Tensor) else 0


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost parts of a module that have spiking neurons or batch norms, and can be called."""
    for child in module.children():
        if isinstance(child, Metric | MetricCollection):
            continue
        if getattr(type(child), "forward", None) is nn.Module.forward:  # a container
            yield from _parts(child)
        elif any(isinstance(part, Spike | nn.modules.batchnorm._BatchNorm) for part in child.modules()):
            yield child


def _follows(inputs: list[Any], outputs: list[_Made]) -> bool:
    """Whether an input shares memory with an output, or autograd knows that it was computed from one."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if any(made.shares_memory(x) for made in outputs for x in tensors):
        return True
    ends = {made.made_by for made in outputs} - {None}
    nodes = {x.grad_fn for x in tensors if x.grad_fn is not None} if ends else set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node in ends:
            return True
        nodes |= {before for before, _ in node.next_functions if before is not None} - seen
        seen |= nodes
    return False


def _is_redirected(module: pl.LightningModule) -> bool:
    """Whether a strategy has put the training step in the place of the forward, as DDP has."""
    return not torch.compiler.is_compiling() and getattr(module.forward, "__func__", None) is not type(module).forward
