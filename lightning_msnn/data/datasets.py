"""Datasets that return a whole batch at once, the order of their samples, and their loader."""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from lightning_msnn.data.reading import Pixels, read_image
from lightning_msnn.errors import ConfigurationError

__all__ = ["ArrayDataset", "Batch", "FileDataset", "Loader", "ShardSampler", "collate", "even_batch_size"]

#: Inputs as they are stored (B, ...) with targets (B, ...), or with the names of their files where no target is known.
Batch = tuple[Tensor, Tensor | list[str]]


class _Epochs(Dataset[Batch]):
    """A dataset whose images depend on seed, epoch and image alone in a training, whichever process loads them."""

    alternate = False
    """Whether each image is mirrored in every second epoch."""

    def __init__(self) -> None:
        # Workers keep the copy of the dataset that they began with, so they see a new epoch in shared memory only.
        self._draw = torch.full((2,), -1).share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, seed: int, epoch: int) -> None:
        """Begin an epoch; before the first, crops are drawn from torch's global generator."""
        self._draw.copy_(torch.tensor((seed, epoch)))

    def _mirror(self, images: Tensor, indices: list[int]) -> Tensor:
        """Mirror the images ``(B, C, H, W)`` whose turn it is: half of all, and the others in the next epoch."""
        if not self.alternate:
            return images
        seed, epoch = self._draw.tolist()
        turn = ((torch.tensor(indices) + seed) * 2654435761 >> 31) + epoch  # Knuth's hash
        return torch.where((turn % 2 == 1).view(-1, 1, 1, 1), images.flip(-1), images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | str]:  # type: ignore[override]
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        raise NotImplementedError


class ArrayDataset(_Epochs):
    """Inputs in memory.

    torch's loader hands ``__getitems__`` all indices of a batch, so that one gather makes the batch.

    Args:
        images: Inputs as they are stored, such as uint8 images (N, C, H, W).
        targets: Targets, (N, ...), or names of files where no target is known.
    """

    def __init__(self, images: Tensor, targets: Tensor | list[str]) -> None:
        super().__init__()
        self.images, self.targets = images, targets
        self.indices = torch.arange(len(images))

    def select(self, indices: Tensor, training: bool = False) -> "ArrayDataset":
        """Return the dataset of the inputs at ``indices``, which shares them; only one to train on alternates."""
        chosen = ArrayDataset(self.images, self.targets)
        assert isinstance(self.targets, Tensor)
        chosen.alternate = self.alternate and training
        chosen.indices, chosen.targets = self.indices[indices], self.targets[indices]
        return chosen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.tensor(indices)
        inputs = self._mirror(self.images[self.indices[chosen]], indices)
        if isinstance(self.targets, list):
            return inputs, [self.targets[i] for i in indices]
        return inputs, self.targets[chosen]


class FileDataset(_Epochs):
    """Images decoded when they are asked for.

    Args:
        files: Image files.
        targets: Class of each, int64, (N,); without them a batch has the paths in their place.
        size: Height and width of the images.
        channels: 1 (grey) or 3 (RGB).
        training: Take a random crop of 8 to 100 % of the area, with an aspect of 3/4 to 4/3, in place of the centre.
    """

    def __init__(
        self, files: Sequence[str], targets: Tensor | None, size: int, channels: int, training: bool = False
    ) -> None:
        super().__init__()
        self.files = files
        self.targets = torch.empty(0, dtype=torch.int64) if targets is None else targets
        self.size = size
        self.channels = channels
        self.crop = v2.RandomResizedCrop(size) if training else None

    def select(self, indices: Tensor, training: bool = False) -> "FileDataset":
        """Return the dataset of the files at ``indices``, with random crops if ``training``."""
        files = [self.files[index] for index in indices.tolist()]
        chosen = FileDataset(files, self.targets[indices], self.size, self.channels, training)
        chosen.alternate = self.alternate and training
        return chosen

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> Batch:
        pixels = torch.from_numpy(np.stack([self._read(index) for index in indices]))
        labels = self.targets[indices] if len(self.targets) else [self.files[index] for index in indices]
        return self._mirror(pixels, indices), labels

    def _read(self, index: int) -> Pixels:
        seed, epoch = self._draw.tolist()
        if self.crop is None or epoch < 0:
            return read_image(self.files[index], self.size, self.channels, self.crop)
        entropy = np.random.SeedSequence((seed, epoch, index))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(entropy.generate_state(1)[0]))
            return read_image(self.files[index], self.size, self.channels, self.crop)


class ShardSampler(DistributedSampler[Any]):
    """The images of one process, in an order that depends on seed and epoch alone.

    To train, this is torch's DistributedSampler: shuffled, and a few images twice so that each process has as many. To
    evaluate, each image goes to one process, so that a metric that adds up over processes is exact; each process needs
    an image. The seed is the same on every process.
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
        if self.shuffle:
            return islice(super().__iter__(), start, None)
        return iter(range(self.rank + start * self.num_replicas, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


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


def collate(batch: Any) -> Any:
    """Return what ``__getitems__`` made: it is a batch already."""
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader whose place in an epoch is part of a checkpoint, and that leaves torch's global generator alone.

    The order depends on the sampler's seed and epoch alone, so the epoch and the number of batches given out say where
    to continue, and nothing is decoded to get there. Without ``set_epoch`` each iteration begins the next epoch.

    A configuration error of a worker keeps its one sentence, without torch's traceback.
    """

    _given = 0
    _epoch = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator function: nothing happens before the first batch is asked for, when Lightning has set the epoch.
        sampler = self.sampler if isinstance(self.sampler, ShardSampler) else None
        resume, self._resume = self._resume, None
        self._given = 0
        if sampler is not None:
            self._epoch = sampler.epoch
            if resume is not None and resume[0] == self._epoch and resume[1] < len(self):
                self._given = resume[1]
            sampler.start = self._given * (self.batch_size or 1)
            if isinstance(self.dataset, _Epochs):
                self.dataset.begin(sampler.seed, self._epoch)
            if self.generator is not None:  # of the workers' seeds
                entropy = np.random.SeedSequence((sampler.seed, self._epoch, sampler.rank))
                self.generator.manual_seed(int(entropy.generate_state(1)[0]))
        try:
            for batch in super().__iter__():
                self._given += 1
                yield batch
        except ConfigurationError as error:
            raise ConfigurationError(str(error).rpartition(f"{ConfigurationError.__name__}: ")[2].strip()) from None
        if sampler is not None:
            sampler.set_epoch(self._epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were given out."""
        return {"epoch": self._epoch, "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue behind the last batch that was given out, when the next iteration is in the same epoch."""
        self._resume = state_dict["epoch"], state_dict["batches"]
