"""Twins: the same topology, with what they share."""

import pytest
import timm
import torch
from torch import nn

from lightning_msnn.energy import count_operations, spike_rate
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.twins import ann_twin, calibrate, snn_twin, twins
from lightning_msnn.nn import Rectifier, Spike
from tests.conftest import DISTINCT, TINY


def images(size=32):
    return torch.randn(4, 3, size, size)


@pytest.mark.parametrize("name", DISTINCT)
def test_ann_twin(name):
    model = timm.create_model(name, num_classes=7).eval()
    twin = ann_twin(model)
    spikes = [n for n, m in model.named_modules() if isinstance(m, Spike)]
    assert [n for n, m in twin.named_modules() if isinstance(m, Rectifier)] == spikes
    assert not any(isinstance(m, Spike) for m in twin.modules())
    single = timm.create_model(name, num_classes=7, windows="single").eval()
    ours, theirs = count_operations(single, images()), count_operations(twin, images())
    assert theirs.total("dense") == ours.total("dense"), "the same topology"
    assert theirs.total("neurons") == theirs.total("membrane_updates") == theirs.total("omega") == 0
    assert theirs.total("multiply_accumulates") > 0.95 * theirs.total("dense")
    assert not theirs.uncounted
    for key, value in twin.state_dict().items():
        assert "decay" in key or torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", DISTINCT)
def test_snn_twin(name):
    model = timm.create_model(name, num_classes=7, mlp_ratio=2.0, theta=0.3).eval()
    twin = snn_twin(model)
    assert twin.network.arguments == {**model.arguments, "windows": "single", "spiking": True}
    x = images()
    once = count_operations(timm.create_model(name, **{**model.arguments, "windows": "single"}).eval(), x)
    record = count_operations(twin, x)
    assert record.samples == once.samples == 4
    assert record.total("neurons") == 4 * once.total("neurons")
    assert record.total("omega") == 0
    assert record.visits == {f"network.{layer}": 4 * visits for layer, visits in once.visits.items()}
    # Each of T steps leaks each membrane once.
    assert record.total("membrane_updates") == record.total("neurons")
    assert not record.uncounted


@pytest.mark.parametrize("name", TINY)
def test_making_a_twin_leaves_no_trace(name):
    model = timm.create_model(name, num_classes=7).eval()
    x, state = images(), torch.get_rng_state()
    before = model(x)
    for twin in (ann_twin(model), snn_twin(model)):
        calibrate(twin, x)
        assert not twin.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(x), before)


def test_calibration():
    """After it, batch norms see a mean of 0 and a variance of 1 in the network's own activations."""
    twin = ann_twin(timm.create_model("msnn_resnet12_tiny", num_classes=7).eval())
    seen = []
    twin.stages[1].blocks[0].encoder1.norm.register_forward_hook(lambda m, i, out: seen.append(out))
    x = torch.randn(32, 3, 32, 32) * 3 + 1
    calibrate(twin, x)(x)
    assert seen[-1].mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen[-1].var((0, 2, 3)) - 1).abs().max() < 0.05
    record = count_operations(twin, x)
    share = record.total("effective_multiply_accumulates") / record.total("multiply_accumulates")
    assert 0.2 < share < 0.9, "about half of what ReLU returns is zero"


@pytest.mark.parametrize("name", TINY)
def test_twins_have_the_statistics_of_the_images(name):
    """Those that they are given, as their first norm shows: it sees the stem's convolution of them."""
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(16, 3, 32, 32) * 3 + 1
    made = twins(model, x)
    assert len(made) == 2
    current = nn.functional.conv2d(x, model.stem.conv.weight, stride=2, padding=1)
    for twin in made.values():
        norm = getattr(twin, "network", twin).stem.norm
        torch.testing.assert_close(norm.running_mean, current.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, current.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_snn_twin_fires_at_every_step():
    model = timm.create_model("msnn_resnet12_tiny", num_classes=7).eval()
    twin = calibrate(snn_twin(model, time_steps=2), torch.randn(16, 3, 32, 32))
    assert 0.01 < spike_rate(count_operations(twin, images())) < 0.5


def test_networks_without_a_name_have_no_twin():
    for twin in (ann_twin, snn_twin):
        with pytest.raises(ConfigurationError, match="Sequential has no twin"):
            twin(nn.Sequential())
    with pytest.raises(ConfigurationError, match="time_steps .* at least 1, not 0"):
        snn_twin(timm.create_model("msnn_resnet12_tiny"), time_steps=0)
    pruned = timm.create_model("msnn_resnet12_tiny")
    pruned.prune_intermediate_layers([1])
    with pytest.raises(ConfigurationError, match="msnn_resnet12_tiny has lost stages"):
        ann_twin(pruned)
    assert twins(pruned, images()) == {}
    converted = timm.create_model("spiking", source="resnet18", num_classes=3)
    with pytest.raises(ConfigurationError, match="has no twin"):
        ann_twin(converted)
