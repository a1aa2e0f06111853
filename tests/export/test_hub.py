"""The networks through ``torch.hub``, from a checkout."""

import runpy
from pathlib import Path

import pytest
import timm
import torch

from lightning_msnn import zoo
from lightning_msnn.errors import ConfigurationError

CHECKOUT = str(Path(__file__).parents[2])


def test_the_hub_lists_every_network():
    found = runpy.run_path(f"{CHECKOUT}/hubconf.py")
    for name in timm.list_models("msnn*"):
        assert callable(found[name])
        assert "pretrained" in found[name].__doc__


def test_the_hub_loads_entries():
    x = torch.randn(2, 1, 16, 16)
    model = torch.hub.load(CHECKOUT, "msnn_resnet12_tiny", source="local", pretrained="digits")
    assert torch.equal(model(x), zoo.load("msnn_resnet12_tiny.digits")(x))
    untrained = torch.hub.load(CHECKOUT, "msnn_resnet12_tiny", source="local", num_classes=3)
    assert untrained.num_classes == 3
    with pytest.raises(ConfigurationError, match="unknown zoo entry 'msnn_resnet12_tiny.cifar'"):
        torch.hub.load(CHECKOUT, "msnn_resnet12_tiny", source="local", pretrained="cifar")
