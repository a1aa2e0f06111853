"""Datasets that give a whole batch at once, and the loader for them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lightning_msnn.data.reading import read_image
from lightning_msnn.errors import ConfigurationError

__all__ = ["ArrayDataset", "Batch", "FileDataset", "Loader", "collate"]

#: uint8 images (B, C, H, W) with int64 targets (B,), or with the paths of their files where no target is known.
Batch = tuple[Tensor, Tensor | list[str]]


class ArrayDataset(Dataset[Batch]):
    """Images in memory.

    torch's loader hands ``__getitems__`` all indices of a batch, so that one gather makes the batch; samplers, and
    Lightning's distributed ones among them, work as ever.

    Args:
        images: uint8, (N, C, H, W).
        targets: int64, (N,).
        indices: The images that belong to the dataset; by default all.
    """

    def __init__(self, images: Tensor, targets: Tensor, indices: Tensor | None = None) -> None:
        self.images = images
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.targets = targets[self.indices]

    def select(self, indices: Tensor, training: bool = False) -> "ArrayDataset":
        """Return the dataset of the images at ``indices``, which shares the pixels; ``training`` changes nothing."""
        chosen = ArrayDataset.__new__(ArrayDataset)
        chosen.images, chosen.indices, chosen.targets = self.images, self.indices[indices], self.targets[indices]
        return chosen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.images[self.indices[index]], self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.tensor(indices)
        return self.images[self.indices[chosen]], self.targets[chosen]


class FileDataset(Dataset[Batch]):
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
        self.files = files
        self.targets = torch.empty(0, dtype=torch.int64) if targets is None else targets
        self.size = size
        self.channels = channels
        self.crop = v2.RandomResizedCrop(size) if training else None

    def select(self, indices: Tensor, training: bool = False) -> "FileDataset":
        """Return the dataset of the files at ``indices``, with random crops if ``training``."""
        files = [self.files[index] for index in indices.tolist()]
        return FileDataset(files, self.targets[indices], self.size, self.channels, training)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | str]:  # type: ignore[override]
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        pixels = [read_image(self.files[index], self.size, self.channels, self.crop) for index in indices]
        labels = self.targets[indices] if len(self.targets) else [self.files[index] for index in indices]
        return torch.from_numpy(np.stack(pixels)), labels


def collate(batch: Any) -> Any:
    """Return what ``__getitems__`` made: it is a batch already."""
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader whose workers' configuration errors keep their one sentence.

    torch raises an error of a worker again with the worker's traceback as its message.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ConfigurationError as error:
            raise ConfigurationError(str(error).rpartition(f"{ConfigurationError.__name__}: ")[2].strip()) from None
