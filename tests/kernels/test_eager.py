"""Kernels stay away where something traces, transforms or watches what is computed."""

import io

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from lightning_msnn.errors import ConfigurationError
from tests.conftest import SHALLOW

FAMILIES = ("msnn_resnet12_tiny", "msnn_rnn12_tiny", "msnn_vit12_tiny")


def make(family, training=False):
    torch.manual_seed(0)
    return timm.create_model(family, num_classes=3, **SHALLOW).train(training), torch.rand(3, 3, 16, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_written():
    network, x = make(FAMILIES[0])
    with torch.no_grad(), io.BytesIO() as file:
        torch.jit.save(torch.jit.trace(network, x, check_trace=False), file)
        file.seek(0)
        found, other = torch.jit.load(file), torch.rand(3, 3, 16, 16)
        torch.testing.assert_close(found(other), network(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_image(family):
    network, x = make(family)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters, image):
        return functional_call(network, parameters, (image.unsqueeze(0),)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    network(x).square().sum().backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-5)


def test_several_gradients_at_once_are_refused():
    network, x = make("msnn_resnet12_tiny", training=True)
    out = network(x).sum(0)
    with pytest.raises(ConfigurationError, match="one gradient at a time: LIGHTNING_MSNN_NATIVE=0"):
        torch.autograd.grad(out, list(network.parameters()), torch.eye(3), is_grads_batched=True)


@pytest.mark.parametrize("differentiated", [True, False])
def test_a_forward_derivative_is_refused(differentiated):
    """Spikes have none, whether gradients are on or not."""
    network, x = make("msnn_resnet12_tiny")
    with torch.set_grad_enabled(differentiated), pytest.raises(NotImplementedError, match="jvp"):
        jvp(network, (x,), (torch.ones_like(x),))
    with torch.set_grad_enabled(differentiated), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            network(dual)
