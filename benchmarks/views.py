"""Accuracy of entries where the logits of several views of a test image are averaged, beside that of the image alone.

    python -m benchmarks.views msnn_resnet12.c100_whitened --data <folder>    # 13 passes over the test images

An entry's accuracy is never of averaged views: each takes the energy of a whole image.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn import zoo
from lightning_msnn.zoo.verification import evaluate, test_data


def views(images: Tensor) -> list[Tensor]:
    """Return images and their mirror images, then both moved by a pixel to each corner, over reflected borders."""
    both = [images, images.flip(-1)]
    height, width = images.shape[-2:]
    moved = (F.pad(one, [1] * 4, "reflect") for one in both)
    corners = list(product((0, 2), (0, 2)))
    return both + [one[..., y : y + height, x : x + width] for one in moved for y, x in corners]


class Averaged(nn.Module):
    """A network whose logits are the mean over the first views of an image."""

    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return torch.stack([self.network(view) for view in views(images)[: self.number]]).mean(0)


def measure(name: str, folder: str | None) -> dict[int, float]:
    """Return the accuracy in percent by the number of views."""
    network, data = zoo.load(name, fuse=True), test_data(name, folder)
    return {number: evaluate(Averaged(network, number), data)["top1"] for number in (1, 2, 10)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+")
    parser.add_argument("--data", help="folder of the data set")
    given = parser.parse_args()
    for entry in given.entries:
        print(entry, measure(entry, given.data))
