"""Data modules: samples are read at the start, and augmented a whole batch at a time.

To add a data set, write one file here, its line in this file, and a YAML in ``configs/data``; no other file changes.
Derive it from :class:`ImageDataModule` or :class:`AudioDataModule`, or from :class:`ArrayDataModule` if it fits into
memory as tensors. A checkpoint keeps the arguments of ``__init__``, and ``test`` and ``predict`` read them there.

Your own data set can lie in any file (``examples/saccades.py``), and any LightningDataModule with ``num_classes``,
``in_chans`` and ``image_size`` will do.
"""

from lightning_msnn.data.arrays import ArrayDataModule
from lightning_msnn.data.audio import AudioDataModule
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.cifar import CIFAR10, CIFAR100
from lightning_msnn.data.digits import Digits
from lightning_msnn.data.folder import ImageFolder
from lightning_msnn.data.speech_commands import SpeechCommands
from lightning_msnn.data.spoken_digits import SpokenDigits
from lightning_msnn.data.tiny_imagenet import TinyImageNet200

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ArrayDataModule",
    "AudioDataModule",
    "BatchAugmentation",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "SpeechCommands",
    "SpokenDigits",
    "TinyImageNet200",
]
