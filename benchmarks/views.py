"""Accuracy of entries where the logits of several views of a test image are averaged, beside that of the image alone.

    python -m benchmarks.views msnn_resnet12.c100_whitened --data <folder>    # ten passes over the test images

An entry's accuracy is never of averaged views: each takes the energy of a whole image.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_msnn import zoo
from lightning_msnn.zoo.verification import test_data


def views(images: Tensor) -> list[Tensor]:
    """Return images and their mirror images, then both moved by a pixel to each corner, over reflected borders."""
    both = [images, images.flip(-1)]
    height, width = images.shape[-2:]
    moved = (F.pad(one, [1] * 4, "reflect") for one in both)
    corners = list(product((0, 2), (0, 2)))
    return both + [one[..., y : y + height, x : x + width] for one in moved for y, x in corners]


@torch.inference_mode()
def measure(name: str, folder: str | None) -> dict[int, float]:
    """Return the accuracy in percent by the number of views."""
    network, data = zoo.load(name, fuse=True), test_data(name, folder)
    hits, images = dict.fromkeys((1, 2, 10), 0), 0
    for batch in data.test_dataloader():
        pixels, targets = data.on_after_batch_transfer(batch, 0)
        logits = torch.stack([network(view) for view in views(pixels)])
        hits = {n: hit + int((logits[:n].mean(0).argmax(1) == targets).sum()) for n, hit in hits.items()}
        images += len(targets)
    return {n: round(100 * hit / images, 2) for n, hit in hits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+")
    parser.add_argument("--data", help="folder of the data set")
    given = parser.parse_args()
    for entry in given.entries:
        print(entry, measure(entry, given.data))
