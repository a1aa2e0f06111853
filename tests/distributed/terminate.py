"""A callback that has one process told to stop."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, Trainer


class Terminate(Callback):
    """Send SIGTERM to the process of a rank at the eleventh batch; to none if the rank is -1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 10:
            os.kill(os.getpid(), signal.SIGTERM)
