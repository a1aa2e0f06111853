"""The images that an exported file is run on again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export.source import Source

__all__ = ["DRAWN", "NUMBER", "Samples", "find_samples"]

NUMBER = 500
"""Images that a file is run on, at most."""

DRAWN = 64
"""Images that are drawn where there are no others, at most."""

_VALUES = 2**25
"""Values of all images that are drawn, but for two images."""


class Samples(NamedTuple):
    """Images as a network takes them.

    Args:
        images: Images ``(N, C, H, W)``, or frames ``(N, T, C, H, W)``, normalised.
        targets: Their classes ``(N,)``, None where they are not known.
        what: What they are, for people.
    """

    images: Tensor
    targets: Tensor | None
    what: str


def find_samples(source: Source, data: str | Path | None = None, folder: str | Path | None = None) -> Samples:
    """Return images of a folder, test images of the data that a network learnt from, or random ones.

    Args:
        source: The network.
        data: Folder of its data set, for those that need one.
        folder: Folder of other images, which takes the place of the data.

    Raises:
        ConfigurationError: If a folder that is given has no such images.
    """
    if data is not None and folder is not None:
        raise ConfigurationError("data and images must not both be given: the file is run on one of them")
    if folder is not None:
        return _of_folder(source, Path(folder).expanduser())
    found = _of_data(source, data)
    if found is not None:
        return found
    if data is not None:
        raise ConfigurationError(
            f"data must not be given: {source.name} is of data that lightning_msnn.data does not have or that is not "
            "classified; give images"
        )
    generator = torch.Generator().manual_seed(0)
    number = max(2, min(DRAWN, _VALUES // math.prod(source.shape)))
    pixels = torch.rand(number, *source.shape, generator=generator)
    return Samples(_normalised(source, pixels), None, "random images (seed 0), since no real ones were given")


def _normalised(source: Source, pixels: Tensor) -> Tensor:
    """From pixels in [0, 1] to what the network takes."""
    if not source.mean:
        return pixels
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (source.mean, source.std))
    return (pixels - mean) / std


def _of_folder(source: Source, folder: Path) -> Samples:
    from lightning_msnn.data.reading import decode_files, list_folder

    channels, height, width = source.input_size
    if height != width or channels not in (1, 3) or source.shape != source.input_size:
        raise ConfigurationError(
            f"images must not be given: {source.name} takes {' x '.join(map(str, source.shape))}, and image files are "
            "square ones of 1 or 3 channels"
        )
    files = list_folder(folder)
    step = max(1, len(files) / NUMBER)
    chosen = [files[int(i * step)] for i in range(min(len(files), NUMBER))]
    pixels = decode_files(chosen, height, channels).float() / 255
    return Samples(_normalised(source, pixels), None, f"images of {str(folder)!r}")


def _of_data(source: Source, root: str | Path | None) -> Samples | None:
    """Test images of the source's data, evenly of all classes; None where there is none to read."""
    from lightning_msnn import data as data_sets
    from lightning_msnn.energy.sampling import evenly, spread

    name = source.data.rpartition(".")[2]
    kind = getattr(data_sets, name, None) if source.data.startswith(f"{data_sets.__name__}.") else None
    if kind is None or (root is None and getattr(kind, "needs_root", True)):
        return None
    try:
        module: Any = source.test_data(root, batch_size=250)
    except ConfigurationError:
        if root is None:  # nobody has said where it is, or it is other data of that name
            return None
        raise
    dataset = module.test_dataloader().dataset
    targets = torch.as_tensor(getattr(dataset, "targets", []))
    if targets.dim() != 1 or targets.is_floating_point() or not len(targets):
        return None
    images = torch.cat(list(evenly(module, NUMBER)))
    chosen = targets[spread(targets, NUMBER)]
    return Samples(images, chosen, f"test images of {name}")
