"""Baselines: the same topology, with what they share."""

import pytest
import timm
import torch
from torch import nn

from lightning_msnn.energy import count_operations
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.baselines import baselines, calibrate, lif_network, relu_baseline
from lightning_msnn.nn import Rectifier, Spike
from tests.conftest import TINY
from tests.models.test_registry import SMALL, make


def images(number=4):
    return torch.randn(number, 3, 16, 16)


@pytest.mark.parametrize("name", TINY)
def test_relu_baseline(name):
    model = make(name, **SMALL).eval()
    baseline = relu_baseline(model)
    spikes = [n for n, m in model.named_modules() if isinstance(m, Spike)]
    assert [n for n, m in baseline.named_modules() if isinstance(m, Rectifier)] == spikes
    assert not any(isinstance(m, Spike) for m in baseline.modules())
    single = make(name, **SMALL, windows="single").eval()
    ours, theirs = count_operations(single, images()), count_operations(baseline, images())
    assert theirs.total("dense") == ours.total("dense"), "the same topology"
    assert theirs.total("neurons") == theirs.total("membrane_updates") == theirs.total("omega") == 0
    assert theirs.total("multiply_accumulates") > 0.95 * theirs.total("dense")
    assert not theirs.uncounted
    for key, value in baseline.state_dict().items():
        assert "decay" in key or torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", TINY)
def test_lif_network(name):
    model = make(name, **SMALL, tau=0.2, theta=0.3).eval()
    lif = lif_network(model)
    assert lif.network.arguments == {**model.arguments, "windows": "single", "spiking": True}
    x = images()
    once = count_operations(timm.create_model(name, **{**model.arguments, "windows": "single"}).eval(), x)
    record = count_operations(lif, x)
    assert record.samples == once.samples == 4
    assert record.total("neurons") == 4 * once.total("neurons")
    assert record.total("omega") == 0
    assert record.visits == {f"network.{layer}": 4 * visits for layer, visits in once.visits.items()}
    # Each of T steps but the last hands each membrane on.
    assert 4 * record.total("membrane_updates") == 3 * record.total("neurons")
    assert not record.uncounted


@pytest.mark.parametrize("name", TINY)
def test_a_baseline_leaves_no_trace_and_has_the_statistics_of_the_images(name):
    """Its first norm shows them: it sees the stem's convolution of the images."""
    model = make(name, **SMALL).eval()
    x, state = images(16) * 3 + 1, torch.get_rng_state()
    before = model(x)
    made = baselines(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(x), before)
    assert len(made) == 2
    seen = []
    model.stem.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    (current,) = seen
    for baseline in made.values():
        assert not baseline.training
        norm = getattr(baseline, "network", baseline).stem.norm
        torch.testing.assert_close(norm.running_mean, current.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, current.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_calibration():
    """After it, batch norms see a mean of 0 and a variance of 1 in the network's own activations."""
    baseline = relu_baseline(make("msnn_resnet12_tiny", **SMALL).eval())
    seen = []
    baseline.stages[1].blocks[0].encoder1.norm.register_forward_hook(lambda m, i, out: seen.append(out))
    x = images(32) * 3 + 1
    calibrate(baseline, x)(x)
    assert seen[-1].mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen[-1].var((0, 2, 3)) - 1).abs().max() < 0.05


def test_networks_without_baselines():
    pruned = make("msnn_resnet12_tiny", **SMALL)
    pruned.prune_intermediate_layers([1])
    converted = timm.create_model("spiking", source="resnet18", num_classes=3)
    for model, message in (
        (nn.Sequential(), "Sequential has no baseline"),
        (converted, "ResNet has no baseline"),
        (pruned, "msnn_resnet12_tiny has lost stages"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            relu_baseline(model)
        assert baselines(model, images()) == {}
    with pytest.raises(ConfigurationError, match="time_steps .* at least 1, not 0"):
        lif_network(make("msnn_resnet12_tiny"), time_steps=0)
