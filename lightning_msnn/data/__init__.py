"""Data modules: inputs read once to tensors, gathered and augmented a whole batch at a time."""

from lightning_msnn.data.arrays import ArrayDataModule
from lightning_msnn.data.audio import AudioDataModule
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.cifar import CIFAR10, CIFAR100
from lightning_msnn.data.digits import Digits
from lightning_msnn.data.events import EventFrames
from lightning_msnn.data.folder import ImageFolder
from lightning_msnn.data.forecasting import ForecastSeries
from lightning_msnn.data.speech_commands import SpeechCommands
from lightning_msnn.data.spoken_digits import SpokenDigits
from lightning_msnn.data.time_series import TimeSeries
from lightning_msnn.data.tiny_imagenet import TinyImageNet200

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ArrayDataModule",
    "AudioDataModule",
    "BatchAugmentation",
    "Digits",
    "EventFrames",
    "ForecastSeries",
    "ImageDataModule",
    "ImageFolder",
    "SpeechCommands",
    "SpokenDigits",
    "TimeSeries",
    "TinyImageNet200",
]
