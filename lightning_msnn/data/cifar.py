"""CIFAR-10 and CIFAR-100."""

from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import AutoAugmentPolicy

from lightning_msnn.data.archives import Archive
from lightning_msnn.data.arrays import Part
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.reading import image_array
from lightning_msnn.errors import ConfigurationError

__all__ = ["CIFAR10", "CIFAR100"]

# In the order of the official labels, which is the alphabetical one in both.
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 32x32 RGB.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. ``root`` holds either the
    official ``cifar-10-batches-py`` folder (its checksums are compared) or ``train/<class>/*`` and ``test/<class>/*``
    with one image a file; the official one is read where both exist. Both number the classes alike.
    """

    classes: ClassVar[list[str]] = CIFAR10_CLASSES.split()
    native_size = 32
    # Of the 50,000 training images, as published with most CIFAR-10 programs.
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    autoaugment = AutoAugmentPolicy.CIFAR10

    official: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    archive: ClassVar[Archive] = Archive(
        datasets.CIFAR10.url,
        datasets.CIFAR10.tgz_md5,
        datasets.CIFAR10.base_folder,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    )

    @property
    def _is_official(self) -> bool:
        return self.root is not None and (self.root / self.archive.folder).is_dir()

    def list_part(self, part: Part) -> tuple[list[str], list[int]]:
        """Return the files of a part and their classes; none of the official ones, which are checked when read."""
        return ([], []) if self._is_official else super().list_part(part)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the images of a part, uint8, (N, 3, H, W), and their classes (N,)."""
        if not self._is_official:
            return super().read(part)
        try:
            # Checks the MD5 sums before it unpickles anything.
            official = self.official(str(self.root), train=part == "train")
        except RuntimeError as error:
            raise ConfigurationError(
                f"a file in {str(self.root)!r} is not the official one of {type(self).__name__}: delete "
                f"{self.archive.folder!r} and download it again with data.download: true"
            ) from error
        pixels = np.stack([image_array(Image.fromarray(image), self.image_size) for image in official.data])
        return torch.from_numpy(pixels), torch.tensor(official.targets)


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 training and 10,000 test images of 100 classes, 32x32 RGB.

    As :class:`CIFAR10`, with the official ``cifar-100-python`` folder and the fine labels.
    """

    classes: ClassVar[list[str]] = CIFAR100_CLASSES.split()
    # Of the 50,000 training images.
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)

    official: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR100
    archive: ClassVar[Archive] = Archive(
        datasets.CIFAR100.url,
        datasets.CIFAR100.tgz_md5,
        datasets.CIFAR100.base_folder,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    )
