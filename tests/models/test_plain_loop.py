"""Networks beside the method as it is written: one window and one time step after another, nothing batched."""

import pytest
import torch

from lightning_msnn.functional.windows_1d import TIME_WINDOWS
from lightning_msnn.models.baselines import lif_network
from lightning_msnn.nn import CONTEXTS
from tests.conftest import TINY
from tests.models.plain import PlainNetwork
from tests.models.test_registry import lively, make


def uneven(model):
    """Give each channel its own decay, threshold and scale, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return lively(model).double()


def gradients(model, out, upstream):
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(out, learnt, upstream, allow_unused=True, materialize_grads=True)


FOUR = {"depths": (2, 1, 1, 1), "widths": (24, 24, 24, 24)}


MAPS = [
    *((windows, (20, 16)) for windows in ("alternate", "alternate_grid", "grid", "single")),
    *((windows, (1, 45)) for windows in ("alternate", "dilated")),
    *((windows, (12, 38)) for windows in TIME_WINDOWS),
]


@pytest.mark.parametrize(("windows", "size"), MAPS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_equals_a_plain_loop(name, context, windows, size):
    """Outputs and gradients, with each layer's own numbers; maps of the last stages are too small to cut."""
    arguments = {"context": context, "windows": windows, "learn_threshold": "channel", **FOUR}
    model = uneven(make(name, tau=0.4, threshold=0.5, **arguments))
    x, upstream = torch.randn(2, 3, *size).double(), torch.randn(2, 10).double()
    out, expected = model(x), PlainNetwork(model, 0.4, windows, context)([x])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(model, expected, upstream)
    torch.testing.assert_close(gradients(model, out, upstream), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_lif_neurons_equal_a_plain_loop(name):
    """An image that is seen in each of three time steps."""
    model = uneven(make(name, tau=0.4, threshold=0.5, learn_threshold="channel", **FOUR))
    lif = lif_network(model, 3)
    x, upstream = torch.randn(2, 3, 20, 16).double(), torch.randn(2, 10).double()
    out, expected = lif(x), PlainNetwork(lif.network, 0.4, "single")([x] * 3)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(lif, expected, upstream)
    torch.testing.assert_close(gradients(lif, out, upstream), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_one_step_equals_a_plain_loop(name, context):
    """The default networks, which kernels compute, in float32."""
    model = lively(make(name, context=context, tau=0.4, threshold=0.5))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), PlainNetwork(model, 0.4, context=context)([x]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_large_maps_equal_a_plain_loop(name, context):
    """The default networks in float64, on maps that the last stage cuts otherwise by each kind of windows."""
    model = uneven(make(name, context=context, tau=0.4, threshold=0.5, **FOUR | {"depths": (2, 2, 1, 2)}))
    x = torch.randn(2, 3, 56, 56).double()
    torch.testing.assert_close(model(x), PlainNetwork(model, 0.4, context=context)([x]), rtol=1e-9, atol=1e-9)
