"""A stop at the first loss or weight that is not finite."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_msnn.errors import TrainingError
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.runs.folders import run_folder
from lightning_msnn.runs.random_state import get_generators, set_generators

__all__ = ["FiniteLoss"]


class FiniteLoss(Callback):
    """Stop at the first loss that is infinite or not a number, before that loss reaches the weights.

    The step is then run once more to find the layer whose output is the first that is not finite, and what repeats it
    goes to ``non_finite/step_<step>_rank_<rank>.ckpt`` in the run's folder, which
    ``torch.load(file, weights_only=True)`` reads: ``batch`` as the step received it, ``generators`` (see
    :func:`~lightning_msnn.runs.random_state.set_generators`), ``state_dict`` of the weights before the step, and
    the numbers of step, epoch and batch. Running means of batch norm are those after its forward pass, which training
    does not read.

    A membrane that is not finite in front of a spike is not seen by the loss, which a spike of 0 or 1 leaves finite,
    but by the gradients. The next step is then the one that stops, and the message names the first layer whose weights
    they reached. Such weights are never saved: a checkpoint that is due before that step stops the training instead,
    and those written before stay.

    On a GPU the check is copied to the host while the backward pass is under way and read after that is queued, so
    that the device does not wait. Gradients that overflow in fp16 are no concern of this callback: the gradient scaler
    leaves such a step out.
    """

    def __init__(self) -> None:
        self._folder = ""
        self._batch: Any = None
        self._generators: dict[str, Any] = {}
        self._finite = torch.tensor(True)
        self._copied: torch.cuda.Event | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the run's folder while all processes are here: it takes a broadcast; a ``fast_dev_run`` has none."""
        self._folder = "" if getattr(trainer, "fast_dev_run", False) else run_folder(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, and the generators before the step."""
        self._batch = batch
        self._generators = get_generators(pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Begin the check."""
        finite = loss.detach().isfinite().all()
        if not finite.is_cuda:
            self._finite = finite
            return
        if self._copied is None:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._finite.copy_(finite, non_blocking=True)
        self._copied.record()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the check.

        Raises:
            TrainingError: If the loss is not finite; the message names step, batch, layer and file.
        """
        if self._copied is not None:
            self._copied.synchronize()
        if self._finite:
            return
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        where = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx})"
        layer = self._first_layer(trainer, pl_module, batch_idx)
        saved = "this run keeps no files"
        if self._folder:
            path = os.path.join(
                self._folder, "non_finite", f"step_{trainer.global_step}_rank_{trainer.global_rank}.ckpt"
            )
            step = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "batch_idx": batch_idx,
                "batch": self._batch,
                "generators": self._generators,
                "state_dict": pl_module.state_dict(),
                "layer": layer,
            }
            try:
                write_whole(step, path)
                saved = f"what repeats the step is in {path!r}"
            except OSError as error:
                saved = f"what repeats the step could not be written to {path!r} ({error.strerror})"
        raise TrainingError(f"the loss is not finite at {where}, from {layer} on: {saved}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the weights, their average and the optimizer's state before they are written.

        Raises:
            TrainingError: If a number among them is not finite; the message names the step and the first weight.
        """
        for name in ("state_dict", "current_model_state", "optimizer_states"):
            content = checkpoint.get(name, {})
            if _all_finite(content):
                continue
            first = next((n for n in content if not _all_finite(content[n])), "") if isinstance(content, dict) else ""
            raise TrainingError(
                f"{first or 'the state of the optimizer'} is not finite after step {trainer.global_step} (epoch "
                f"{trainer.current_epoch}): it is not saved, and the checkpoints written before are kept"
            )

    def _first_layer(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> str:
        """Run the step once more, and say where it first leaves the finite numbers."""
        if not _all_finite(self._batch):
            return "the batch itself"
        found: list[str] = []

        def watch(name: str, module: nn.Module) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if found or _all_finite(output):
                    return
                broken = [n for n, p in module.named_parameters(recurse=False) if not _all_finite(p)]
                weights = f", whose {' and '.join(broken)} has been so since before this step" if broken else ""
                found.append(f"layer {name!r}{weights}")

            return module.register_forward_hook(hook)

        # A module ends after those inside it, so the first that is found is the innermost.
        handles = [watch(name, module) for name, module in pl_module.named_modules() if name]
        set_generators(self._generators, pl_module.device)
        pl_module.log = lambda *_, **__: None  # type: ignore[method-assign]
        pl_module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            with torch.no_grad(), trainer.precision_plugin.train_step_context():
                pl_module.training_step(self._batch, batch_idx)
        finally:
            del pl_module.log, pl_module.log_dict
            for handle in handles:
                handle.remove()
        return found[0] if found else "the loss function"


def _all_finite(value: Any) -> bool:
    """Return whether every number in nested tensors is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_all_finite, value))
