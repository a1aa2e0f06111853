"""Batch norm folded for inference."""

import copy

import pytest
import torch
from torch import nn

from lightning_msnn.conversion import convert
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import CONTEXTS, BernoulliEncoder, Encoder, Neuron
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm
from lightning_msnn.nn.integer import to_integers
from tests.conftest import COMPILED, SHALLOW, TINY
from tests.models.test_registry import lively, make


def varied(model):
    """Batch norms as after training: scales of both signs, shifts, statistics."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.uniform_(-1.0, 1.5)
                norm.bias.normal_(0.2, 0.3)
    return lively(model)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_outputs_stay(name, context):
    """In float64 rounding moves no membrane across its threshold, so the outputs agree to the last digits."""
    model = varied(make(name, context=context, **SHALLOW)).double()
    folded = fold_batch_norm(model)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    torch.testing.assert_close(folded(x), before)
    assert torch.equal(model(x), before), "the network itself is as it was"
    left = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [n for n in left if "synapse" in n or "encoder" in n or "conv" in n or "stem" in n]
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("name", TINY)
def test_batch_norm_of_several_processes_folds_alike(name):
    model, x = varied(make(name, **SHALLOW)), torch.randn(3, 3, 16, 16)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    for change in (fold_batch_norm, to_integers):
        assert torch.equal(change(synchronised)(x), change(model)(x))


@pytest.mark.parametrize("change", [fold_batch_norm, to_integers])
@pytest.mark.parametrize("name", TINY[:2])
def test_weights_load_into_a_folded_network(name, change):
    """Into one whose scales were all positive: which way a channel compares comes with them."""
    model, x = change(varied(make(name, **SHALLOW))), torch.randn(3, 3, 16, 16)
    other = change(make(name, **SHALLOW).eval())
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", COMPILED)
def test_folded_networks_export(name):
    folded = fold_batch_norm(varied(make(name, **SHALLOW)))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), folded(x))
    model = varied(make(name, **SHALLOW)).to(memory_format=torch.channels_last)
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in fold_batch_norm(model).modules()
        if isinstance(m, nn.Conv2d)
    )


def test_thresholds_by_hand():
    encoder = Encoder(4, neuron=Neuron(threshold=0.5)).eval()
    with torch.no_grad():
        encoder.norm.weight.copy_(torch.tensor([2.0, -2.0, 0.0, 0.0]))
        encoder.norm.bias.copy_(torch.tensor([0.0, 0.0, 0.6, 0.4]))
        encoder.norm.running_var.fill_(1.0 - encoder.norm.eps)
    folded = ThresholdEncoder(encoder)
    x = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5]).view(1, 1, 1, 5).expand(1, 4, 1, 5)
    expected = [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert folded(x)[0, :, 0].tolist() == expected
    assert torch.equal(folded(x), encoder(x))


def test_learnt_thresholds_fold():
    encoder = Encoder(3, neuron=Neuron(learn_threshold="channel")).eval()
    with torch.no_grad():
        encoder.spike.level.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ThresholdEncoder(encoder)(x), encoder(x))


def test_leaves_other_encoders_alone_and_refuses_training_mode():
    model = make("msnn_resnet12_tiny", coding="bernoulli", **SHALLOW)
    assert any(isinstance(m, BernoulliEncoder) for m in fold_batch_norm(model.eval()).modules())
    with pytest.raises(ConfigurationError, match="evaluation mode"):
        fold_batch_norm(model.train())


def test_refuses_a_gradient_to_the_input():
    """A comparison has none, so that of the whole would be wrong, and silently."""
    folded = fold_batch_norm(varied(make("msnn_vit12_tiny", **SHALLOW)))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    converted = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), x.detach())
    for network in (folded, fold_batch_norm(converted)):
        with pytest.raises(ConfigurationError, match="no gradient to its input: load the network without fuse"):
            network(x)
    with torch.no_grad():
        assert folded(x).shape == (2, 10)
    assert folded(x.detach()).shape == (2, 10)
