"""The whitened stem, alone and in a network."""

import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features_fx import create_feature_extractor
from torch.nn import functional as F

from lightning_msnn.energy import count_operations
from lightning_msnn.models.baselines import relu_baseline
from lightning_msnn.nn.blocks import Stem, WhitenedStem
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import to_integers
from tests.conftest import SHALLOW
from tests.models.test_registry import lively


def make(**kwargs):
    return timm.create_model("msnn_resnet12_tiny", **{"num_classes": 10, "stem": "whitened", **SHALLOW, **kwargs})


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("stride", [2, 4])
def test_shape_is_that_of_the_convolution(channels, stride):
    plain, stem = Stem(channels, 8, stride=stride), WhitenedStem(channels, 8, stride=stride)
    for size in ((32, 32), (31, 17), (9, 8)):
        x = torch.randn(2, channels, *size)
        assert stem(x).shape == plain(x).shape


def test_each_filter_comes_with_its_negative():
    """Before there are images filters are orthonormal; a rectifier follows, then a 2x2 convolution of stride 2."""
    stem, x = WhitenedStem(3, 8).eval(), torch.randn(2, 3, 9, 12)
    filters = stem.whitening.weight.flatten(1)
    torch.testing.assert_close(filters[:12] @ filters[:12].mT, torch.eye(12))
    assert torch.equal(filters[12:], -filters[:12])
    answers = torch.zeros(2, 24, 10, 12)
    answers[..., :8, :11] = F.conv2d(x, stem.whitening.weight, stem.whitening.bias).clamp(min=0.0)
    torch.testing.assert_close(stem(x), stem.norm(F.conv2d(answers, stem.conv.weight, None, 2)))
    assert not stem.is_whitened


def test_a_network_is_all_that_it_was():
    """Features, tracing, export, folding, 8 bits, baseline and groups; only the filters do not learn."""
    model = lively(make())
    assert model.arguments["stem"] == "whitened"
    x = torch.randn(3, 3, 17, 16)
    out = model(x)
    torch.testing.assert_close(create_feature_extractor(model, ["head.fc"])(x)["head.fc"], out)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), out)
    assert [f.shape[2:] for f in make(features_only=True)(x)] == [(9, 8), (5, 4)]
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(fold_batch_norm(double)(x.double()), double(x.double()))
    assert to_integers(model)(x).isfinite().all()
    assert relu_baseline(model)(x).shape == out.shape
    names = {name for name, _ in model.named_parameters()}
    assert {"stem.conv.weight", "stem.norm.weight"} < names
    assert set(group_parameters(model, model.group_matcher(), reverse=True)) == names
    model.train()(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"stem.whitening.weight"}


def test_products_with_pixels_are_multiply_accumulates():
    record = count_operations(lively(make()), torch.randn(1, 3, 16, 16))
    assert record.layer("stem.whitening")["multiply_accumulates"] == 15 * 15 * 4 * 3 * 24
    assert record.layer("stem.conv")["multiply_accumulates"] == 15 * 15 * 24 * 24  # of 16 rows one is zeros
    assert record.layer("stem.whitening")["accumulates"] == record.layer("stem.conv")["accumulates"] == 0


@pytest.mark.parametrize(("channels", "stays"), [(3, True), (1, False), (4, False)])
def test_images_of_other_channels_get_a_stem_of_their_own(channels, stays):
    """All else is the entry's, as where timm adapts a first convolution."""
    entry = make()
    with torch.no_grad():
        for value in entry.state_dict().values():
            value.add_(1)
    overlay = {"state_dict": copy.deepcopy(entry.state_dict()), "first_conv": "stem.whitening", "num_classes": 10}
    model = make(pretrained=True, in_chans=channels, pretrained_cfg_overlay=overlay)
    assert model.stem.is_whitened is stays
    own, state = model.state_dict(), entry.state_dict()
    differ = {name for name in own if own[name].shape != state[name].shape or not torch.equal(own[name], state[name])}
    stem = {"stem.whitening.weight", "stem.whitening.bias", "stem.conv.weight"}
    assert differ == (set() if stays else stem)
