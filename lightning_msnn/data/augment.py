"""Augmentation of a whole uint8 batch, on its device."""

from collections.abc import Callable, Sequence

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

#: Erased share of the image and its height divided by its width (Zhong et al., arXiv 1708.04896, with the upper area of
#: torchvision and timm).
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 3.3)


class BatchAugmentation(nn.Module):
    """Random crop, horizontal flip, augmentation policy and random erasing of a uint8 batch, in this order.

    Crop, flip and erasing are drawn for each image and applied to the batch at once, without a loop over images. All
    random numbers come from torch's global CPU generator, whatever the device of the images: one seed gives the same
    augmentation everywhere, and a restored generator state repeats it exactly.

    torchvision draws a policy's operations once for a call, and a call for each image would starve a GPU. So the batch
    is cut into ``policy_groups`` groups of neighbours, each with its own draw. With as many groups as images this is
    the published policy; fewer are faster.

    Args:
        crop_padding: Rows and columns put around an image before a crop of its own size; 0 is no crop.
        flip: Probability of a horizontal flip.
        policy: Augmentation policy, ``none``, ``autoaugment`` or ``randaugment``.
        erasing: Probability of random erasing: a rectangle of 2 to 33 % of the area, with a height of 0.3 to 3.3 times
            its width, gets the mean colour.
        policy_groups: Number of groups of a batch that get their own draw of the policy.
        mean: Mean colour in [0, 1], one number for each channel, or a single one for all.
        autoaugment: Data set whose learnt policy ``autoaugment`` applies.
        border: What is put around an image: ``zeros``, or ``reflect``, its own pixels mirrored at its edge.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    fill: Tensor

    def __init__(
        self,
        crop_padding: int = 4,
        flip: float = 0.5,
        policy: str = "none",
        erasing: float = 0.0,
        policy_groups: int = 16,
        mean: Sequence[float] = (0.5,),
        autoaugment: AutoAugmentPolicy = AutoAugmentPolicy.IMAGENET,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        self.border = choose({"zeros": "constant", "reflect": "reflect"}, border, "border")
        self.crop_padding = check_integer("crop_padding", crop_padding, 0)
        self.flip = check_number("flip", flip)
        self.policy = policy
        self._policy = choose(POLICIES, policy, "augmentation policy")(autoaugment)
        self.erasing = check_number("erasing", erasing)
        self.policy_groups = check_integer("policy_groups", policy_groups, 1)
        colour = [round(255 * check_number("mean", value)) for value in mean]
        self.register_buffer("fill", torch.tensor(colour, dtype=torch.uint8).view(-1, 1, 1), persistent=False)

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
        if self.erasing:
            images = self._erase(images)
        return images

    def _crop(self, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        top, left = torch.randint(2 * self.crop_padding + 1, (2, B)).to(images.device, non_blocking=True)
        # unfold is a view of every possible crop, so the one indexing below copies each image's own crop and no more
        crops = F.pad(images, [self.crop_padding] * 4, self.border).unfold(2, H, 1).unfold(3, W, 1)
        return crops[torch.arange(B, device=images.device), :, top, left]

    def _erase(self, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        chosen, size, shape, down, right = torch.rand(5, B, dtype=torch.float64)
        low, high = ERASED_AREA
        area = low + (high - low) * size
        # Aspects that would stick out of the image are left out of the range, so that no draw has to be thrown away.
        narrow = (area * H / W).clamp(min=ERASED_ASPECT[0]).log()
        wide = (H / (area * W)).clamp(max=ERASED_ASPECT[1]).log().maximum(narrow)
        aspect = (narrow + (wide - narrow) * shape).exp()
        height = (area * H * W * aspect).sqrt().round().clamp(1, H)
        # Rounding a side moves the area, so the width is taken from the rounded height and kept inside the bounds.
        least, most = (low * H * W / height).ceil(), (high * H * W / height).floor()
        width = (area * H * W / height).round().maximum(least).minimum(most).clamp(1, W)
        top, left = (down * (H - height + 1)).floor(), (right * (W - width + 1)).floor()
        height = torch.where(chosen < self.erasing, height, 0.0)
        box = torch.stack((top, top + height, left, left + width)).long().view(4, B, 1)
        y0, y1, x0, x1 = box.to(images.device, non_blocking=True)
        rows, columns = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
        mask = ((rows >= y0) & (rows < y1)).unsqueeze(2) & ((columns >= x0) & (columns < x1)).unsqueeze(1)
        return torch.where(mask.unsqueeze(1), self.fill.to(images.device), images)
