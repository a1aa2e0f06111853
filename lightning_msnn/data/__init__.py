"""Data modules: images decoded once to uint8 tensors, gathered and augmented a whole batch at a time."""

from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.cifar import CIFAR10, CIFAR100
from lightning_msnn.data.digits import Digits
from lightning_msnn.data.folder import ImageFolder
from lightning_msnn.data.tiny_imagenet import TinyImageNet200

__all__ = ["CIFAR10", "CIFAR100", "BatchAugmentation", "Digits", "ImageDataModule", "ImageFolder", "TinyImageNet200"]
