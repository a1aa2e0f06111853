"""Evaluation of an entry on its real test set, compared with its card."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_msnn import data as data_sets
from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.models.weights import find
from lightning_msnn.zoo.loading import info, load

__all__ = ["DATA_OF_TAGS", "TOLERANCE", "evaluate", "test_data", "verify"]

DATA_OF_TAGS = {"digits": "Digits", "c10": "CIFAR10", "c100": "CIFAR100", "tin": "TinyImageNet200"}
"""Data set of an entry by its tag, or by what comes before an underscore in it, as in ``c100_relu``."""

TOLERANCE = 0.1
"""Percentage points by which a top-1 accuracy may differ from that of the card: kernels and processors round otherwise,
and a membrane next to its threshold then fires or does not."""


def test_data(config: dict[str, Any], root: str | Path | None, batch_size: int) -> Any:
    """Return the data module of an entry, its test part ready.

    Args:
        config: ``config.json`` of the entry.
        root: Folder of the data set; digits need none.
        batch_size: Images of a batch.

    Raises:
        ConfigurationError: If no data set goes with its tag, or the data is not there.
    """
    kind = choose(DATA_OF_TAGS, config["tag"].partition("_")[0], "tag of a zoo entry with data")
    arguments: dict[str, Any] = {"batch_size": batch_size, "image_size": config["input_size"][1], "num_workers": 0}
    arguments |= {} if root is None else {"root": root}
    module = getattr(data_sets, kind)(**arguments)
    module.check("test")
    module.prepare_data()
    module.setup("test")
    return module


@torch.inference_mode()
def evaluate(model: nn.Module, data: Any, device: str | torch.device | None = None) -> dict[str, float]:
    """Classify the test images of a data module.

    Args:
        model: Network in eval mode.
        data: Data module of :mod:`lightning_msnn.data`, set up for testing.
        device: Device that the network is on.

    Returns:
        ``top1`` and ``top5`` in percent, and the number of ``images``.
    """
    hits = torch.zeros(2, dtype=torch.int64)
    images = 0
    for batch in data.test_dataloader():
        pixels, targets = data.on_after_batch_transfer([part.to(device) for part in batch], 0)
        logits = model(pixels)
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        images += len(targets)
    return {"top1": 100 * hits[0].item() / images, "top5": 100 * hits[1].item() / images, "images": images}


def verify(
    name: str,
    data: str | Path | None = None,
    batch_size: int = 250,
    device: str | torch.device | None = None,
    fuse: bool = False,
) -> dict[str, float]:
    """Evaluate an entry on its real test set and compare with its card.

    Args:
        name: Name of the entry, in either spelling.
        data: Folder of the data set; digits need none.
        batch_size: Images of a batch.
        device: Device to evaluate on.
        fuse: Whether to verify the network with batch norm folded.

    Returns:
        ``top1`` and ``top5`` in percent, the number of ``images``, and the card's top-1, ``claimed``.

    Raises:
        ConfigurationError: If there is no such entry or data, or top-1 differs from the card's by more than
            :data:`TOLERANCE`, or was measured on another number of images.
    """
    config = info(name)
    found = evaluate(load(name, device=device, fuse=fuse), test_data(config, data, batch_size), device)
    claimed = config.get("top1")
    if claimed is None or abs(found["top1"] - claimed) > TOLERANCE or found["images"] != config.get("top1_images"):
        raise ConfigurationError(
            f"{find(name).name} has a top-1 of {found['top1']:.2f} % on {found['images']} test images, but its card "
            f"says {claimed} % on {config.get('top1_images')}"
        )
    return {**found, "claimed": claimed}
