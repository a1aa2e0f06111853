"""The checkpoint to resume from."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.runs.checkpoints import AtomicCheckpointIO
from lightning_msnn.runs.trainer import LAST, run_folder, stand_last

__all__ = ["LastCheckpoint"]

#: Meanings of signals; of several processes the largest counts.
GO_ON, STOP, STOP_AND_REQUEUE = range(3)


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` in the run's folder, from which a training resumes exactly.

    It is written after each epoch, after each validation, after every ``every_n_steps`` optimizer steps, and when one
    of the processes gets SIGTERM, or under SLURM the signal that announces the end of the time limit (SIGUSR1 unless
    SLURMEnvironment is given another): then the job goes back into the queue too. The optimizer step or validation
    under way is finished first, the same one on every process, since gradients that are still accumulating are in no
    checkpoint. The processes then exit with status 143, as a shell reports a SIGTERM.

    Args:
        every_n_steps: Optimizer steps from one checkpoint to the next within an epoch; 0 is only at its end.
    """

    best_model_path = ""  # Lightning asks the first of the checkpoint callbacks for it

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 0)
        self._path = ""
        self._saved_step = 0
        self._signal = GO_ON

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder, and let checkpoints be written in a way that a kill leaves them whole."""
        self._path = os.path.join(run_folder(trainer), LAST)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's own, not one that a user gives
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Behind every ModelCheckpoint, whose state goes into this one, and whose best is what Lightning looks for.
        stand_last(trainer, self)
        if stage == "fit":
            self._saved_step = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drop what would remove files elsewhere, and begin the next epoch behind a complete one.

        With ``max_steps`` Lightning would count an empty epoch first.

        Raises:
            ConfigurationError: If the training that is resumed would end otherwise.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        inexact = [type(c).__name__ for c in callbacks if isinstance(c, StochasticWeightAveraging)]
        inexact += ["overfit_batches"] if trainer.overfit_batches else []  # type: ignore[attr-defined]
        if inexact and trainer.state.fn == "fit":
            raise ConfigurationError(f"a training with {inexact[0]} cannot be resumed exactly: begin it anew")
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and not _all_in(str(callback.dirpath), state):
                del checkpoint["callbacks"][callback.state_key]
                if trainer.state.fn == "fit":
                    rank_zero_info("the best checkpoint before stays: %s gets the best of the rest", callback.dirpath)
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        if trainer.max_steps == -1 or epochs["current"]["processed"] != epochs["current"]["started"]:
            return
        for counts in epochs.values():
            counts["completed"] = counts["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning counts the restart as a step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of Lightning's handlers, one of which waits for ever and one of which saves within a step."""
        self._signal = GO_ON
        meanings = {signal.SIGTERM: STOP}
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            meanings[environment.requeue_signal or signal.SIGUSR1] = STOP_AND_REQUEUE

        def remember(number: int, _: Any) -> None:
            self._signal = max(self._signal, meanings[signal.Signals(number)])

        if threading.current_thread() is threading.main_thread():
            for number in meanings:
                signal.signal(number, remember)  # Lightning restores what was there before

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every so many steps, or at a signal."""
        # Where validation follows, the checkpoint after it is soon written, and resuming from before it would leave
        # that validation out.
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        if loop._should_accumulate() or trainer.is_last_batch or validates:
            return
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        self._save_and_obey(trainer, always=bool(due))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation between two steps of an epoch."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if not trainer.is_last_batch and not trainer.fit_loop._should_accumulate():
            self._save_and_obey(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch."""
        self._save_and_obey(trainer)

    def _save_and_obey(self, trainer: pl.Trainer, always: bool = True) -> None:
        """Save, and stop if any process got a signal; if not ``always``, save only then."""
        stops, strategy = self._signal, trainer.strategy
        if trainer.world_size > 1:
            stops = int(strategy.reduce(torch.tensor(stops, device=strategy.root_device), reduce_op="max"))
        saved = self._saved_step == trainer.global_step or getattr(trainer, "fast_dev_run", False)
        if (stops or always) and not saved:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self._path, weights_only=False)
        if stops:
            rank_zero_info(f"stopped by a signal: --ckpt_path last resumes at step {trainer.global_step}")
            if stops == STOP_AND_REQUEUE and trainer.is_global_zero:
                array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
                job = f"{array}_{number}" if array else os.environ["SLURM_JOB_ID"]
                subprocess.run(["scontrol", "requeue", job], check=False)
            environment = trainer._accelerator_connector.cluster_environment
            launched = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
            # The process that started this one kills itself if this one fails.
            raise SIGTERMException(0 if launched else 128 + signal.SIGTERM)


def _all_in(folder: str, state: dict[str, Any]) -> bool:
    """Return whether the files that a ModelCheckpoint would remove are in its own folder."""
    paths = [state.get(f"{name}_path") or "" for name in ("best_model", "kth_best_model", "last_model")]
    named = [str(path) for path in (*paths, *(state.get("best_k_models") or ())) if path]
    within = os.path.join(folder, "")  # a slash in a metric's name makes a folder
    parts = [path.removeprefix(within).split("/") if path.startswith(within) else [""] for path in named]
    return all(each[-1].endswith(".ckpt") and not {"", ".", ".."} & {*each} for each in parts)
