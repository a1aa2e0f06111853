"""Spikes that sharpen while a network trains."""

import copy

import pytest
import timm
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.baselines import relu_baseline
from lightning_msnn.nn import Neuron, Spike, fire, set_annealing
from tests.conftest import SHALLOW, TINY


def network(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **SHALLOW, **arguments).train()


def learnt(model, x):
    out = model(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("share", [1.0, None])
@pytest.mark.parametrize("name", TINY)
def test_at_its_end_the_network_is_what_it_was(name, share):
    x = torch.randn(4, 3, 32, 32)
    plain, annealed = network(name), network(name)
    set_annealing(annealed, 0.2)
    set_annealing(annealed, share)
    for a, b in zip(learnt(annealed, x), learnt(plain, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", TINY)
def test_at_its_beginning_it_is_the_rectifier_twin(name):
    x = torch.randn(4, 3, 32, 32)
    model = network(name, windows="single")
    twin = relu_baseline(model).train()
    set_annealing(model, 0.0)
    for a, b in zip(learnt(model, x), learnt(twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", TINY)
def test_kernels_and_equations_agree(name):
    x = torch.randn(4, 3, 16, 16)
    model = network(name, learn_threshold="layer", levels=1 + TINY.index(name))
    set_annealing(model, 0.4)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if not isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda m, args: None)  # what is watched runs equation by equation
    # Rounding may put a membrane on the other side of a corner; each layer alone is compared in the kernels' own tests.
    for a, b in zip(learnt(model, x), learnt(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("levels", [1, 3])
def test_kernels_and_equations_agree_at_the_corners(levels):
    membrane = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 9.0]).view(1, 1, 1, 10)
    spike = Spike(Neuron(threshold=0.5, learn_threshold="layer", levels=levels)).train()
    set_annealing(spike, 0.3)
    made = []
    for dtype in (torch.float32, torch.float64):
        u, neurons = membrane.to(dtype).requires_grad_(), copy.deepcopy(spike).to(dtype)
        out = fire(u, None, neurons)[0]
        made.append([x.float() for x in (out, *torch.autograd.grad(out.sum(), [u, neurons.level]))])
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("name", TINY)
def test_evaluation_is_with_exact_spikes(name):
    model = network(name).eval()
    x = torch.randn(2, 3, 32, 32)
    before, names = model(x), set(model.state_dict())
    set_annealing(model, 0.3)
    fired = []
    for module in model.modules():
        if isinstance(module, Spike):
            module.register_forward_hook(lambda m, args, out: fired.append(out))
    assert torch.equal(model(x), before)
    assert all(set(spikes.unique().tolist()) <= {0.0, 1.0} for spikes in fired)
    assert set(model.state_dict()) == names, "a checkpoint has none of it"
    assert torch.equal(copy.deepcopy(model)(x), before)


@pytest.mark.parametrize("share", [1.5, float("nan")])
def test_bad_arguments(share):
    with pytest.raises(ConfigurationError, match=rf"share of spikes .* \[0, 1\], not {share}"):
        set_annealing(network(TINY[0]), share)
