"""The images that operations are counted on: as many of each class, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["SAMPLES", "evenly", "spread"]

SAMPLES = 512
"""Images that reports, cards and monitors count on by default."""


def spread(targets: Tensor, samples: int, seed: int = 0) -> Tensor:
    """Choose samples so that the numbers of any two classes differ by one at most, or a class is exhausted.

    Args:
        targets: Classes, int64, ``(N,)``; anything else ``(N, ...)`` counts as one class.
        samples: How many to choose; all if there are no more.
        seed: Seed of the choice; torch's global generator is neither read nor moved.

    Returns:
        Sorted indices, int64, ``(min(samples, N),)``.
    """
    if targets.dim() > 1 or targets.is_floating_point():
        targets = torch.zeros(len(targets), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=generator)
    _, classes, sizes = torch.unique(targets[shuffled], return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)
    turn = torch.arange(len(targets)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # Each class takes one in each turn, in random order.
    order = (turn + torch.rand(len(targets), generator=generator, dtype=torch.float64)).argsort()
    return shuffled[by_class[order[:samples]]].sort().values


def evenly(datamodule: Any, samples: int = SAMPLES, batch_size: int = 64) -> Iterator[Tensor]:
    """Yield test images of a data module as its network takes them, evenly of all classes if they have ``targets``.

    Args:
        datamodule: A data module that is set up for testing.
        samples: How many.
        batch_size: Images of a batch.
    """
    loader = datamodule.test_dataloader()
    targets = getattr(loader.dataset, "targets", None)
    targets = torch.zeros(len(loader.dataset)) if targets is None else torch.as_tensor(targets)
    chosen = spread(targets, samples).tolist()
    for batch in DataLoader(loader.dataset, batch_size, sampler=chosen, collate_fn=loader.collate_fn):
        images: Tensor = datamodule.on_after_batch_transfer(batch, 0)[0]
        yield images
