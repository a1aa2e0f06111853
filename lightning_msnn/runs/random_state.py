"""Random number generators that belong to a run."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["RandomState", "get_generators", "set_generators"]


def get_generators(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy, torch and a CUDA device, as plain values."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  that of the generator which libraries draw from
    states = {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put this process's generators back into the state that :func:`get_generators` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, *rest = states["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class RandomState(Callback):
    """Keep the state of all generators in the checkpoint, and give each process numbers of its own.

    With this callback and a data module of this library, a resumed training is the uninterrupted one, bit for bit on
    one CPU process: augmentation, mixing and dropout draw what they would have drawn, from the batch on at which the
    checkpoint was written. ``seed_everything`` gives every process the same seed; from the first step on process
    ``r > 0`` draws from a seed made of that one and ``r``.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators, after all that Lightning does before the first batch."""
        states, self._restored = self._restored, None
        if states is not None and len(states) == trainer.world_size:
            set_generators(states[trainer.global_rank], pl_module.device)
            return
        if states is not None:
            rank_zero_warn(
                f"the checkpoint is of {len(states)} processes and there are {trainer.world_size}: "
                "random numbers begin anew"
            )
        if trainer.global_rank > 0:
            entropy = np.random.SeedSequence((torch.initial_seed(), trainer.global_rank))
            seed = int(entropy.generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the generators of all processes."""
        own = get_generators(pl_module.device)
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, own)
        checkpoint["random_state"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the generators until the training starts; a test does not want them."""
        self._restored = checkpoint.get("random_state") if trainer.state.fn == "fit" else None
