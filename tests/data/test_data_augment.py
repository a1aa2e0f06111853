from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_msnn.data import BatchAugmentation
from lightning_msnn.data.augment import POLICIES


def batch(number: int = 16, channels: int = 3, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("channels", "border", "mode"), [(1, "zeros", "constant"), (3, "reflect", "reflect")])
def test_crop_and_flip_equal_a_naive_reference(channels: int, border: str, mode: Any) -> None:
    images, padding, flip = batch(40, channels), 3, 0.4
    torch.manual_seed(11)
    result = BatchAugmentation(crop_padding=padding, flip=flip, border=border)(images)

    torch.manual_seed(11)
    tops, lefts = torch.randint(2 * padding + 1, (2, len(images))).tolist()
    flips = (torch.rand(len(images)) < flip).tolist()
    for image, new, top, left, flipped in zip(images.numpy(), result.numpy(), tops, lefts, flips, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode)
        expected = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        assert (new == (expected[:, :, ::-1] if flipped else expected)).all()
    # Each image has its own draw, and the extreme offsets occur.
    assert len(set(zip(tops, lefts, flips, strict=True))) > 20
    assert {0, 2 * padding} <= set(tops + lefts)
    assert 0 < sum(flips) < len(flips)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_policies_keep_type_and_shape_and_repeat_with_the_seed(policy: str, channels: int, size: int) -> None:
    images = batch(20, channels, size)
    before = images.clone()
    augment = BatchAugmentation(2, 0.5, policy, policy_groups=6)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    # Several batches, so that most operations of the policies occur, the colour ones on grey images among them.
    first = [augment(images) for _ in range(8)]
    other = augment(images)
    torch.set_rng_state(state)
    assert all(torch.equal(augment(images), result) for result in first)
    assert not torch.equal(first[0], other)
    assert all(result.dtype == torch.uint8 and result.shape == images.shape for result in first)
    assert torch.equal(images, before)


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_policy_draws_once_a_group(policy: str) -> None:
    same = batch(1).expand(12, -1, -1, -1)
    torch.manual_seed(0)
    one = BatchAugmentation(0, 0.0, policy, policy_groups=1)
    assert all(len(torch.unique(one(same), dim=0)) == 1 for _ in range(5))
    four = BatchAugmentation(0, 0.0, policy, policy_groups=4)
    kinds = [torch.unique(four(same).flatten(1), dim=0).shape[0] for _ in range(5)]
    assert max(kinds) > 1
    assert max(kinds) <= 4
    every = BatchAugmentation(0, 0.0, policy, policy_groups=100)
    assert torch.unique(every(same).flatten(1), dim=0).shape[0] > 4
