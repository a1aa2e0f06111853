"""Any folder of images sorted into class folders."""

from pathlib import Path
from typing import Any

import torch

from lightning_msnn.data.arrays import Part
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.datasets import ArrayDataset, FileDataset
from lightning_msnn.data.reading import class_folders
from lightning_msnn.errors import ConfigurationError

__all__ = ["ImageFolder"]

#: Largest part that is decoded into memory unless the user asks for it.
MEMORY_BYTES = 4 * 2**30
MEMORY_IMAGES = 100_000


class ImageFolder(ImageDataModule):
    """RGB images in ``root/train/<class>/`` and ``root/test/<class>/``; the folder names are the classes.

    Where ``root/test`` has no class folders, ``root/val/<class>/`` is the test set (ImageNet's layout: its official
    test set has no labels). Validation is always split off the training part.

    A part is decoded at the start and kept as tensors, or each image is decoded whenever it is needed. In the second
    case a training image gets its random crop when it is decoded (8 to 100 % of the area, scaled to ``image_size``).
    Flip and policy are applied to the batch on the device in both.

    Args:
        root: Folder of the data set.
        image_size: Height and width of the images.
        in_memory: Whether images are decoded at the start and kept; by default for parts of at most 100,000 images and
            4 GiB.
        crop_padding: Rows and columns put around an image before a crop of its own size; by default an eighth of the
            image size in memory, and 0 where the crop is taken on decoding.
        **kwargs: Arguments of :class:`~lightning_msnn.data.base.ImageDataModule`.

    Examples:
        >>> module = ImageFolder("my_images", image_size=32)
    """

    native_size = 224
    layout = "train/<class>/ and test/<class>/ or val/<class>/"

    def __init__(
        self,
        root: str | None = None,
        image_size: int | None = 224,
        in_memory: bool | None = None,
        crop_padding: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, image_size, crop_padding=0 if crop_padding is None else crop_padding, **kwargs)
        self.in_memory = in_memory
        self._default_crop = crop_padding is None

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, of the training part if there is one."""
        root = self.check_root()
        names = class_folders(self._part_folder("train")) or class_folders(self._part_folder("test"))
        if not names:
            raise ConfigurationError(f"{str(root)!r} has no class folders: it needs {self.layout}")
        return names

    def _part_folder(self, part: Part) -> Path:
        folder = super()._part_folder(part)
        val = folder.with_name("val")
        return val if part == "test" and not class_folders(folder) and class_folders(val) else folder

    def open(self, part: Part | None) -> ArrayDataset | FileDataset:
        """Return the dataset of a part, in memory or not, or of the images to predict."""
        if part is None:
            return super().open(part)
        files, targets = self.list_part(part)
        small = len(files) * self.in_chans * self.image_size**2 < MEMORY_BYTES and len(files) <= MEMORY_IMAGES
        held = small if self.in_memory is None else self.in_memory
        if part == "train" and self._default_crop:
            self.augment.crop_padding = self.image_size // 8 if held else 0
        if held:
            return super().open(part)
        return FileDataset(files, torch.tensor(targets), self.image_size, self.in_chans)
