"""The samples of each process, and their order."""

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

from lightning_msnn.errors import ConfigurationError

__all__ = ["ShardSampler", "even_batch_size"]


class ShardSampler(DistributedSampler[Any]):
    """The images of one process, in an order that depends on seed and epoch alone.

    To train, this is torch's DistributedSampler: shuffled, and a few images twice so that each process has as many. To
    evaluate, each image goes to one process, so that a metric that adds up over processes is exact.

    Args:
        dataset: The dataset.
        num_replicas: Number of processes.
        rank: Number of this process.
        training: Whether to shuffle.
        seed: Seed of the order, the same on every process.

    Raises:
        ConfigurationError: If a process would have no image to evaluate.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int, rank: int, training: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=training, seed=seed)
        size = len(dataset)  # type: ignore[arg-type]
        if not training:
            if size < num_replicas:
                raise ConfigurationError(
                    f"{num_replicas} processes cannot share {size} images: use at most {size} devices"
                )
            self.num_samples = len(range(rank, size, num_replicas))
        self.start = 0
        """Images that the next iteration, and no other, leaves out at its beginning."""

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        everything = super().__iter__() if self.shuffle else self._in_order()
        return islice(everything, start, None)

    def _in_order(self) -> Iterator[Any]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def even_batch_size(batch_size: int, images: int, processes: int) -> int:
    """Return the batch size nearest to ``batch_size`` that gives every process as many batches to evaluate.

    Processes that shard a network meet in every forward pass: one with a batch more than the others would wait for
    ever. Each has ``images // processes`` images, or one more.
    """
    share, more = divmod(images, processes)
    if not more:
        return batch_size
    # The extra image of some processes begins a new batch only if the share is a multiple of the batch size.
    return next(size for size in chain(range(batch_size, 1, -1), count(batch_size + 1)) if share % size)
