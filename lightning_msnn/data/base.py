"""The data module that every set of images derives from."""

import os
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import AutoAugmentPolicy

from lightning_msnn.data.archives import download_and_extract_archive
from lightning_msnn.data.arrays import ArrayDataModule, Part
from lightning_msnn.data.augment import BatchAugmentation
from lightning_msnn.data.datasets import ArrayDataset, FileDataset
from lightning_msnn.data.reading import IMAGE_SUFFIXES, decode_files, list_classes, list_files, normalise
from lightning_msnn.errors import ConfigurationError, check_integer, check_number

__all__ = ["ImageDataModule"]


class ImageDataModule(ArrayDataModule):
    """Images decoded at the start to uint8 tensors, gathered, augmented and normalised a whole batch at a time.

    A data set is a subclass that states its classes, size, mean and standard deviation, and where its files lie if not
    in ``train/<class>/`` and ``test/<class>/``. ``fit`` reads no test image; validation is split off the training part.

    Args:
        root: Folder of the data set.
        image_size: Height and width of the images; images of another size are scaled by their shorter side, and their
            centre is taken. By default the data set's own size.
        download: Download the data set to ``root`` if it is not there.
        folder: An image to predict, or a folder of them, its sub-folders included.
        crop_padding: Rows and columns put around a training image before a crop of its own size; 0 is no crop.
        flip: Probability of a horizontal flip of a training image; or ``"alternate"``: half of the images are mirrored
            in the first epoch, the others in the next, and so on (K. Jordan, arXiv 2404.00498).
        policy: Augmentation policy of training images. ``autoaugment`` takes the policy learnt for the data set.
        policy_groups: Groups of a batch that get their own draw of the policy; more are nearer to the published policy
            and slower.
        train_sizes: Height and width of augmented training images from an epoch on, such as ``{0: 24, 20: 32}``:
            smaller images early on make epochs cheaper. Before the first epoch named, and in validation and test,
            images have ``image_size``.
        border: What ``crop_padding`` puts around an image: ``zeros``, or ``reflect``, its own pixels mirrored.
        **kwargs: Arguments of :class:`~lightning_msnn.data.arrays.ArrayDataModule`.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    noun, suffixes = "images", IMAGE_SUFFIXES
    layout = "train/<class>/ and test/<class>/"
    #: Channels of an image: 1 (grey) or 3 (RGB).
    in_chans: ClassVar[int] = 3
    #: Height and width of the images unless the user asks for another.
    native_size: ClassVar[int]
    # Of the training images, of values in [0, 1]; ImageNet's by default.
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    #: Data set whose learnt policy ``autoaugment`` applies.
    autoaugment: ClassVar[AutoAugmentPolicy] = AutoAugmentPolicy.IMAGENET
    #: What under ``root`` shows that the data set is there, beside the archive's own folder.
    unpacked: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(
        self,
        root: str | None = None,
        image_size: int | None = None,
        download: bool = False,
        folder: str | None = None,
        crop_padding: int = 4,
        flip: float | Literal["alternate"] = 0.5,
        policy: Literal["none", "autoaugment", "randaugment"] = "none",
        policy_groups: int = 16,
        train_sizes: dict[int, int] | None = None,
        border: Literal["zeros", "reflect"] = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = self.native_size if image_size is None else check_integer("image_size", image_size, 1)
        self.download = download
        self.alternate = flip == "alternate"
        chance = 0.0 if flip == "alternate" else check_number("flip, if not 'alternate',", flip)
        self.augment = BatchAugmentation(crop_padding, chance, policy, policy_groups, self.autoaugment, border)
        self.train_sizes = {
            check_integer("an epoch of train_sizes", epoch, 0): check_integer(f"train_sizes[{epoch!r}]", size, 1)
            for epoch, size in (train_sizes or {}).items()
        }

    # What a data set may define

    def list_part(self, part: Part) -> tuple[list[str], list[int]]:
        """Return the files of a part and their classes.

        Raises:
            ConfigurationError: If they are not where they should be.
        """
        folder = self._part_folder(part)
        if not folder.is_dir():
            raise ConfigurationError(
                f"there is no folder {str(folder)!r}: {type(self).__name__} needs {self.layout} under root"
                f"{self._download_hint}"
            )
        return list_classes(folder, self.class_names)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the images of a part, uint8, (N, C, H, W), and their classes (N,)."""
        files, targets = self.list_part(part)
        return decode_files(files, self.image_size, self.in_chans), torch.tensor(targets)

    def open(self, part: Part | None) -> ArrayDataset | FileDataset:
        """Return the dataset of a part, or of the images to predict."""
        if part is not None:
            return super().open(part)
        assert self.folder is not None
        return FileDataset(list_files(self.folder), None, self.image_size, self.in_chans)

    def _part_folder(self, part: Part) -> Path:
        """The folder with a part's class folders."""
        assert self.root is not None
        return self.root / part

    # What Lightning calls

    def check(self, stage: str) -> None:
        """Check the files that a stage needs, unless they are to be downloaded."""
        if stage == "predict" or not self._will_download():
            super().check(stage)

    def prepare_data(self) -> None:
        """Download the data set if ``download`` is true and it is not there.

        Raises:
            ConfigurationError: If it cannot be downloaded; nothing has been written then.
        """
        if not self._will_download():
            return
        assert self.root is not None
        assert self.archive is not None
        root = self.root.absolute()
        # A temporary folder on the same disk, so that a failure or an interruption leaves nothing.
        anchor = next(place for place in (root, *root.parents) if place.exists())
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=anchor) as place:
                download_and_extract_archive(self.archive, place)
                root.mkdir(parents=True, exist_ok=True)
                os.replace(os.path.join(place, self.archive.folder), root / self.archive.folder)
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise ConfigurationError(
                f"cannot download {self.archive.url} (MD5 {self.archive.md5}) to {str(root)!r}: {error}"
            ) from error

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Augment uint8 images (when training) and normalise them."""
        size = self.image_size
        if training:
            inputs = self.augment(inputs)
            size = self.train_size(self.trainer.current_epoch if self.trainer is not None else 0)
        images = inputs.float()
        if size != self.image_size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return normalise(images, self.mean, self.std)

    def train_size(self, epoch: int) -> int:
        """Height and width of the training images in an epoch, counted from 0."""
        begun = [first for first in self.train_sizes if first <= epoch]
        return self.train_sizes[max(begun)] if begun else self.image_size

    def _will_download(self) -> bool:
        if not self.download or self.archive is None or self.root is None:
            return False
        return not any((self.root / name).exists() for name in (self.archive.folder, *self.unpacked))
