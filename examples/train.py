"""Train a spiking network on handwritten digits in a plain PyTorch loop, without Lightning: 40 seconds on one CPU core.

python examples/train.py
"""

import argparse
import time

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from lightning_msnn.nn import Spike  # the package registers its networks with timm when it is imported


def load(size: int = 16):
    """Digits of scikit-learn, 8x8 scaled up and normalised: images and labels to train, images and labels to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - 0.31) / 0.38, size=size, mode="bilinear")
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


class SpikeRate:
    """Counts the spikes of a network: every layer of neurons ends in a module ``Spike``, which a hook listens to."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.spikes = self.neurons = 0
        for module in network.modules():
            if isinstance(module, Spike):
                module.register_forward_hook(self.count)

    def count(self, module, inputs, spikes):
        self.spikes += int(spikes.count_nonzero())
        self.neurons += spikes.numel()


def train_epoch(network, optimizer, schedule, images, labels, batch_size=64):
    """One pass over the training images in random order; spikes have a surrogate gradient, so it is as for any CNN."""
    network.train()
    for batch in torch.randperm(len(images)).split(batch_size):
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test(network, images, labels):
    """Accuracy in percent."""
    network.eval()
    return 100 * (network(images).argmax(1) == labels).float().mean().item()


def main(epochs: int = 12, samples: int | None = None) -> float:
    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = load()
    train_images, train_labels = train_images[:samples], train_labels[:samples]

    # An image is seen once: its membranes are carried from window to window, not from time step to time step.
    network = timm.create_model("msnn_resnet12_tiny", num_classes=10, in_chans=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    steps = epochs * -(-len(train_images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        begin = time.perf_counter()
        train_epoch(network, optimizer, schedule, train_images, train_labels)
        accuracy, seconds = test(network, test_images, test_labels), time.perf_counter() - begin
        print(f"epoch {epoch + 1:2}: {accuracy:.2f} % of the test images, {seconds:.1f} s")

    rate = SpikeRate(network)
    accuracy = test(network, test_images, test_labels)
    print(f"{accuracy:.2f} % right; a neuron fires for {100 * rate.spikes / rate.neurons:.1f} % of the images")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    main(parser.parse_args().epochs)
