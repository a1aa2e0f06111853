"""Callbacks that make a run survive a crash, and functions that read its checkpoints."""

from lightning_msnn.runs.checkpoints import (
    AtomicCheckpointIO,
    is_checkpoint,
    network_of,
    network_state,
    read_checkpoint,
    write_whole,
)
from lightning_msnn.runs.finite_loss import FiniteLoss
from lightning_msnn.runs.last_checkpoint import LastCheckpoint
from lightning_msnn.runs.random_state import RandomState

__all__ = [
    "AtomicCheckpointIO",
    "FiniteLoss",
    "LastCheckpoint",
    "RandomState",
    "is_checkpoint",
    "network_of",
    "network_state",
    "read_checkpoint",
    "write_whole",
]
