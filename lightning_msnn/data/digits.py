"""The handwritten digits that come with scikit-learn."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import AutoAugmentPolicy

from lightning_msnn.data.arrays import Part, stratified_split
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.reading import image_array

__all__ = ["Digits"]


class Digits(ImageDataModule):
    """1,797 grey images of handwritten digits from scikit-learn, 8x8 scaled to 16x16: no download and no folder.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    Values of 0 to 16 become 0 to 255. The set has no official split: a fifth of each class, always the same whatever
    the ``seed``, is the test set; validation is split off the rest. ``root`` and ``download`` have no effect.

    Args:
        flip: Probability of a horizontal flip; a mirrored digit is not a digit, so 0 by default.
        crop_padding: Rows and columns of zeros put around an image before a crop of its own size.
        **kwargs: Arguments of :class:`~lightning_msnn.data.base.ImageDataModule`.
    """

    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]
    in_chans = 1
    native_size = 16
    # Of the 8x8 pixels of the training part (the 80 % that are not test), divided by 255.
    mean = (0.3053,)
    std = (0.3758,)
    autoaugment = AutoAugmentPolicy.SVHN
    needs_root = False

    test_fraction: ClassVar[float] = 0.2
    test_seed: ClassVar[int] = 881797  # any constant; a change would let a published model see its test images

    def __init__(self, *, flip: float | Literal["alternate"] = 0.0, crop_padding: int = 1, **kwargs: Any) -> None:
        super().__init__(flip=flip, crop_padding=crop_padding, **kwargs)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the images of a part, uint8, (N, 1, H, W), and their classes (N,)."""
        from sklearn.datasets import load_digits  # slow to import, and no other data set needs it

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        images = np.stack([image_array(Image.fromarray(image), self.image_size) for image in pixels])
        targets = torch.from_numpy(digits.target.astype(np.int64))
        rest, test = stratified_split(targets, self.test_fraction, self.test_seed)
        chosen = test if part == "test" else rest
        return torch.from_numpy(images)[chosen], targets[chosen]
