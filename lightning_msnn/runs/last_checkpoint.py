"""The checkpoint to resume from."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_msnn.errors import check_integer

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` in the run's folder, from which a training goes on exactly.

    It is written after each epoch, after every ``every_n_steps`` optimizer steps, and when the process is told to
    stop: on SIGTERM, and under SLURM on the signal that announces the end of the time limit (SIGUSR1 unless
    SLURMEnvironment is given another), whereupon the job is put back into the queue. Lightning's own handler of that
    signal saves in the middle of a step; here the step is finished first, on every process the same one.

    Args:
        every_n_steps: Optimizer steps from one checkpoint to the next within an epoch; 0 is only at its end.

    Raises:
        ConfigurationError: If the number is not an integer of at least 0.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 0)
        self._path = Path()
        self._saved_step = 0
        self._requeue = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder and, under SLURM, listen to its signal."""
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self._path = Path(folder) / "checkpoints" / "last.ckpt"
        environment = trainer._accelerator_connector.cluster_environment
        if stage != "fit" or not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        number = environment.requeue_signal or signal.SIGUSR1

        def stop_after_this_step(*_: Any) -> None:
            # Lightning tells the other processes at the beginning of the next step. Every process gets SLURM's
            # signal, each in another moment, so only the first one's counts.
            if trainer.is_global_zero:
                self._requeue = True
                trainer._signal_connector.received_sigterm = True

        signal.signal(number, stop_after_this_step)  # Lightning leaves a handler that exists alone

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every so many steps."""
        if not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        # Where validation follows, the checkpoint after it is soon written, and resuming from before it would leave
        # that validation out.
        interval = trainer.val_check_batch
        if trainer.is_last_batch or (isinstance(interval, int) and (batch_idx + 1) % interval == 0):
            return
        self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation in the middle of an epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save between two steps if the process was told to stop; after an error the last good checkpoint stays."""
        if not isinstance(exception, SIGTERMException):
            return
        if not trainer.fit_loop._should_accumulate():  # else gradients would be lost, and the step be another one
            self._save(trainer)
        rank_zero_info(f"stopped by a signal: --ckpt_path last goes on at step {trainer.global_step}")
        if self._requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", _slurm_job()], check=False)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin the next epoch behind a complete one; with ``max_steps`` Lightning would count an empty one first."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        if trainer.max_steps == -1 or epochs["current"]["processed"] != epochs["current"]["started"]:
            return
        for counts in epochs.values():
            counts["completed"] = counts["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning counts the restart as a step

    def _save(self, trainer: pl.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False) or self._saved_step == trainer.global_step:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self._path, weights_only=False)


def _slurm_job() -> str:
    """Return SLURM's number of this job, or of this task of an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]
