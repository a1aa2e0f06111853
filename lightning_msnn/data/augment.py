"""Augmentation of a whole uint8 batch, on its device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugmentPolicy

from lightning_msnn.errors import check_integer, check_number, choose

__all__ = ["POLICIES", "BatchAugmentation"]

#: Augmentation policies by name; each entry makes the transform from the data set's AutoAugment policy.
POLICIES: dict[str, Callable[[AutoAugmentPolicy], Callable[[Tensor], Tensor] | None]] = {
    "none": lambda learnt: None,
    "autoaugment": lambda learnt: v2.AutoAugment(learnt),
    "randaugment": lambda learnt: v2.RandAugment(),
}


class BatchAugmentation(nn.Module):
    """Random crop, horizontal flip and augmentation policy of a uint8 batch, in this order.

    Crop and flip are drawn for each image and applied to the batch at once, without a loop over images. All random
    numbers come from torch's global CPU generator, whatever the device of the images: one seed gives the same
    augmentation everywhere, and a restored generator state repeats it exactly.

    torchvision draws a policy's operations once for a call, and a call for each image would starve a GPU. So the batch
    is cut into ``policy_groups`` groups of neighbours, each with its own draw. With as many groups as images this is
    the published policy; fewer are faster.

    Args:
        crop_padding: Rows and columns put around an image before a crop of its own size; 0 is no crop.
        flip: Probability of a horizontal flip.
        policy: Augmentation policy, ``none``, ``autoaugment`` or ``randaugment``.
        policy_groups: Number of groups of a batch that get their own draw of the policy.
        autoaugment: Data set whose learnt policy ``autoaugment`` applies.
        border: What is put around an image: ``zeros``, or ``reflect``, its own pixels mirrored at its edge.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    def __init__(
        self,
        crop_padding: int = 4,
        flip: float = 0.5,
        policy: str = "none",
        policy_groups: int = 16,
        autoaugment: AutoAugmentPolicy = AutoAugmentPolicy.IMAGENET,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        self.border = choose({"zeros": "constant", "reflect": "reflect"}, border, "border")
        self.crop_padding = check_integer("crop_padding", crop_padding, 0)
        self.flip = check_number("flip", flip)
        self._policy = choose(POLICIES, policy, "augmentation policy")(autoaugment)
        self.policy_groups = check_integer("policy_groups", policy_groups, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return an augmented copy of a uint8 batch (B, C, H, W); policies take 1 or 3 channels."""
        if self.crop_padding:
            images = self._crop(images)
        if self.flip:
            flipped = (torch.rand(len(images)) < self.flip).to(images.device, non_blocking=True)
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        if self._policy is not None:
            groups = images.tensor_split(max(1, min(self.policy_groups, len(images))))
            images = torch.cat([self._policy(group) for group in groups])
        return images

    def _crop(self, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        top, left = torch.randint(2 * self.crop_padding + 1, (2, B)).to(images.device, non_blocking=True)
        # unfold is a view of every possible crop, so the one indexing below copies each image's own crop and no more
        crops = F.pad(images, [self.crop_padding] * 4, self.border).unfold(2, H, 1).unfold(3, W, 1)
        return crops[torch.arange(B, device=images.device), :, top, left]
