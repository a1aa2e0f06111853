"""Spikes that sharpen while a network trains: from a function with a true gradient to the exact step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_msnn.errors import ConfigurationError, check_number, choose
from lightning_msnn.functional.spike import SOFT
from lightning_msnn.nn import Spike, set_annealing
from lightning_msnn.runs.strategies import shards_weights

__all__ = ["ANNEALING_SHAPES", "SpikeAnnealing"]

ANNEALING_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "root": math.sqrt,
    "square": lambda progress: progress * progress,
}
"""Share of the step by the progress of an annealing, both in [0, 1], by the name that configurations use."""

_PASSES = 20  # of exact spikes in an epoch, that statistics of batch norm are taken from
_EVERY = 16  # steps at most from one to the next


class SpikeAnnealing(Callback):
    """Let neurons return ``a s + (1 - a) f(u)`` in training, with ``a`` rising from 0 to 1; then exact spikes.

    A step has no gradient, so that training with one from the start follows a guess. At ``a = 0`` and with the
    rectifier a network is its ReLU twin. (Whetstone, Severa et al., Nature Machine Intelligence 2019, sharpens a
    bounded rectifier layer by layer instead.)

    Evaluation is with exact spikes throughout, and so are the running statistics of batch norms: while ``a < 1`` they
    are not those of the training steps, but of forward passes with exact spikes, one in 16 steps or about 20 in an
    epoch if that is more. For these, what the training step has called is called once more with the same: the module
    itself, or its parts that have spiking neurons. (Where a strategy shards the weights, statistics are those of the
    training steps.) ``a`` depends on the step alone, so that a resumed training has the same. Steps are the
    optimizer's. ``a`` is logged as ``annealing``.

    Args:
        kind: The function ``f``, one of :data:`lightning_msnn.functional.SOFT`.
        until: Share of the training after which spikes are exact, in (0, 1].
        shape: How ``a`` rises, one of :data:`ANNEALING_SHAPES`.

    Raises:
        ConfigurationError: If an argument is not allowed; when training starts, if the network has no spiking neurons
            or the end of training is not known; in the first step, if it calls several parts with spiking neurons, one
            with what another has made.
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
        self._held: list[nn.modules.batchnorm._BatchNorm] = []
        self._hooks: list[Any] = []
        self._inside: object = None
        self._calls: list[tuple[nn.Module, Any, Any]] | None = None

    def share_at(self, step: int, total: int) -> float:
        """Return the share ``a`` of the step after ``step`` of ``total`` optimizer steps."""
        return ANNEALING_SHAPES[self.shape](min(1.0, step / (self.until * max(1, total))))

    @staticmethod
    def every(batches: float) -> int:
        """Return the batches from one pass with exact spikes to the next, in an epoch of so many (or ``inf``)."""
        return max(1, int(min(_EVERY * _PASSES, batches)) // _PASSES)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is something to anneal and an end to do it by."""
        if stage != "fit":
            return
        if not any(isinstance(module, Spike) for module in pl_module.modules()):
            raise ConfigurationError(
                f"{type(pl_module).__name__} has no spiking neurons to anneal: leave out SpikeAnnealing"
            )
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise ConfigurationError(
                f"SpikeAnnealing must know where training ends: set max_epochs, not {trainer.max_epochs}"
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
        """Set the share of this step, in which what is to be called once more is kept if it is the turn of that."""
        self._share = self.share_at(trainer.global_step, self._total)
        if self._share < 1.0 and not shards_weights(trainer.strategy):
            self._calls = [] if batch_idx % self.every(trainer.num_training_batches) == 0 else None
            for module in (pl_module, *_parts(pl_module)):
                self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        set_annealing(pl_module, self._share, self.kind)
        pl_module.log("annealing", self._share, batch_size=1)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take statistics of exact spikes, with the weights of this step."""
        if self._calls:
            self._take_statistics(trainer, pl_module, self._calls)
            self._calls = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Let batch norms track their input again."""
        self.on_after_backward(trainer, pl_module)  # where the module has called backward of the loss itself
        self._release()
        if self._calls == []:
            rank_zero_warn(
                f"SpikeAnnealing takes no statistics of exact spikes: the training step has called neither "
                f"{type(pl_module).__name__} nor a part of it that has spiking neurons, but perhaps a method of one"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the network as it was."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact spikes, and batch norms that track their input."""
        self._release()
        self._calls = None
        set_annealing(pl_module, None)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inside = [], None
        self._track()

    def _track(self) -> None:
        for norm in self._held:
            norm.track_running_stats = True
        self._held = []

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the running statistics of what is called from following the step, and what it is called with."""
        if self._inside is not None or not module.training:  # but counted, perhaps
            return
        if isinstance(module, pl.LightningModule) and _is_redirected(module):
            return
        self._inside = module
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                norm.track_running_stats = False
                self._held.append(norm)
        if self._calls is None:
            return
        if self._calls and any(isinstance(x, Tensor) and x.grad_fn is not None for x in tree_leaves((args, kwargs))):
            raise ConfigurationError(
                f"SpikeAnnealing cannot call {type(module).__name__} once more with exact spikes, since it is called "
                f"with what {type(self._calls[0][0]).__name__} has made: call both in the forward of the "
                "LightningModule, and that in its training step"
            )
        self._calls.append((module, *tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside is module:
            self._inside = None

    @torch.no_grad()
    def _take_statistics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, calls: list[tuple[nn.Module, Any, Any]]
    ) -> None:
        self._track()
        self._inside = self  # of these calls nothing is kept
        set_annealing(pl_module, None)
        with trainer.precision_plugin.forward_context():
            for module, args, kwargs in calls:
                module(*args, **kwargs)
        set_annealing(pl_module, self._share, self.kind)
        self._inside = None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost parts of a module that have spiking neurons and can be called."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        elif any(isinstance(part, Spike) for part in child.modules()):
            yield child


def _is_redirected(module: pl.LightningModule) -> bool:
    """Whether a strategy has put the training step in the place of the forward, as DDP has."""
    return getattr(module.forward, "__func__", None) is not type(module).forward
