"""The inputs that an exported file is run on, and what the file says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_msnn import __version__
from lightning_msnn.data.reading import decode_files, list_files, normalise
from lightning_msnn.energy.sampling import evenly, spread
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.trained import Trained

__all__ = ["DRAWN", "NUMBER", "Samples", "facts", "find_samples"]

NUMBER = 500
"""Test inputs that a file is run on, at most."""

DRAWN = 64
"""Random inputs that it is run on if there are no others."""


def facts(trained: Trained) -> dict[str, str]:
    """Return what an exported file says of itself; values other than names and versions are JSON."""
    return {
        "source": trained.name,
        "architecture": trained.architecture,
        "lightning_msnn": __version__,
        "class_names": json.dumps(trained.class_names),
        "input_size": json.dumps(list(trained.input_size)),
        "in_chans": json.dumps(trained.input_size[0]),
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
    }


class Samples(NamedTuple):
    """Inputs of a network.

    Args:
        images: Normalised inputs ``(N, C, H, W)``.
        targets: Their classes ``(N,)``, None where they are not known.
        what: What they are, for people.
    """

    images: Tensor
    targets: Tensor | None
    what: str


def find_samples(trained: Trained, data: str | Path | None = None, folder: str | Path | None = None) -> Samples:
    """Return images of a folder, test inputs of the data that a network was trained on, or random ones.

    Args:
        trained: The network.
        data: Folder of its data set, for those that need one.
        folder: Folder of other images, which are run instead.

    Raises:
        ConfigurationError: If a folder is given and has no such images.
    """
    if data is not None and folder is not None:
        raise ConfigurationError("data and images must not both be given: the file is run on one of them")
    if folder is not None:
        channels, height, width = trained.input_size
        if height != width:
            raise ConfigurationError(
                f"images are square, and {trained.name} takes {height} x {width}: leave images out"
            )
        files = list_files(Path(folder).expanduser())
        pixels = decode_files(files[:: 1 + len(files) // NUMBER], height, channels)
        return Samples(normalise(pixels, trained.mean, trained.std), None, f"images of {str(folder)!r}")
    try:
        return _of_data(trained, data)
    except (ConfigurationError, OSError, RuntimeError):  # data of the user's own raise their own
        if data is not None:
            raise
    pixels = torch.randint(256, (DRAWN, *trained.input_size), generator=torch.Generator().manual_seed(0))
    images = normalise(pixels, trained.mean, trained.std)
    return Samples(images, None, "random images (seed 0), since no real ones were given")


def _of_data(trained: Trained, root: str | Path | None) -> Samples:
    """Test inputs of a network's data, the same number of each class."""
    module: Any = trained.test_data(root, batch_size=250)
    targets = getattr(module.test_dataloader().dataset, "targets", None)
    if targets is None:
        raise ConfigurationError(f"{type(module).__name__} has no classes to compare with: give images")
    targets, images = torch.as_tensor(targets), torch.cat(list(evenly(module, NUMBER)))
    return Samples(images, targets[spread(targets, NUMBER)], f"test images of {type(module).__name__}")
