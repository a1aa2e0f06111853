"""Converted networks in timm's registry, and what timm asks of any network."""

import warnings

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_with_matcher

from lightning_msnn.conversion import calibrate, converted_layers, trace
from lightning_msnn.errors import ConfigurationError

IMAGES = torch.randn(2, 3, 32, 32)
SOURCES = {
    "test_resnet": {},
    "resnet18_cifar": {"channels": [16, 32, 64, 128]},
    "test_efficientnet": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 1},
    "msnn_resnet12_tiny": {"spiking": False, "windows": "single", "depths": [1, 1], "widths": [16, 24]},
}


def build(source, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(
            "spiking", source=source, source_kwargs=SOURCES[source], image_size=32, num_classes=7, **arguments
        )


@pytest.mark.parametrize("source", SOURCES)
def test_timms_contract(source, tmp_path):
    model = build(source, levels=3).eval()
    calibrate(model, IMAGES)
    original = timm.create_model(source, num_classes=7, **SOURCES[source])
    assert type(model) is type(original)
    assert converted_layers(model) == [row.layer for row in trace(original, IMAGES).spiking]
    again = timm.create_model(model.architecture, **model.arguments).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), model(IMAGES))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    features = model.forward_features(IMAGES)
    assert torch.equal(model.forward_head(features), model(IMAGES))
    assert model.get_classifier().out_features == 7
    final, _ = model.forward_intermediates(IMAGES)
    assert torch.equal(final, features)
    maps = build(source, features_only=True)
    assert isinstance(maps, FeatureGetterNet)
    assert len(maps(IMAGES)) == len(maps.feature_info.channels())
    model.reset_classifier(3)
    assert model(IMAGES).shape == (2, 3)
    assert group_with_matcher(model.named_parameters(), model.group_matcher())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "resnet81"}, "unknown source 'resnet81' .* did you mean 'resnet18'"),
        ({"source": "resnet18", "source_kwargs": {"pretrained": True}}, "source_kwargs must not have pretrained"),
        ({"source": "resnet18", "layers": ["layer1"]}, "layer1 .* cannot receive spikes"),
        ({"source": "resnet18", "levels": 16}, "levels must be 15 at most, not 16"),
        ({"source": "resnet18", "pretrained": True}, "no weights for spiking"),
        (
            {"source": "resnet18", "layers": {"conv1": "grid"}},
            r"layers must be a list of names .*, not {'conv1': 'grid'}",
        ),
        ({"source": "resnet18", "source_kwargs": {"depth": 3}}, r"resnet18 cannot be built with \['depth'\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        timm.create_model("spiking", **arguments)
