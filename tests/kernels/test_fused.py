"""Layers as torch.compile makes them for CUDA, by the compiler for CPUs."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import WINDOWS
from lightning_msnn.kernels import compiler, fused
from lightning_msnn.kernels.layer import kernels_of
from lightning_msnn.models import ConvMixer, RecurrentMixer
from lightning_msnn.nn import CONTEXTS, Neuron, Spike, set_annealing
from lightning_msnn.nn.layer import fire
from tests.conftest import rest_is_slow

QUICK = [("dilated", "shared"), ("grid", "isolated"), ("time_dilated", "shared")]
pytestmark = pytest.mark.skipif(compiler._compiler() is None, reason="the compiler of torch.compile needs one of C")


@pytest.fixture
def compiled(monkeypatch):
    """As with LIGHTNING_MSNN_COMPILE=1."""
    torch._dynamo.reset()
    fused._compiled.cache_clear()
    counters.clear()
    monkeypatch.setattr(fused, "devices", lambda: ("cpu",))
    monkeypatch.setattr(fused, "_FAILED", [])


def step(mixer, *inputs):
    """What a training step computes: outputs, gradients, running statistics."""
    given = [x.clone().requires_grad_() for x in inputs]
    outs = mixer(*given)
    outs = outs if isinstance(outs, tuple) else (outs,)
    total = sum((out * torch.linspace(-1.0, 1.0, out.numel()).view_as(out)).sum() for out in outs)
    wanted = [*given, *mixer.parameters()]
    grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [*outs, *grads, *(b.float() for b in mixer.buffers())]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.detach().abs().max())))


@pytest.fixture
def traced(compiled, monkeypatch):
    """What the compiler traces runs without generated code, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("cut", rest_is_slow(itertools.product(WINDOWS, CONTEXTS), QUICK))
def test_equals_the_equations(traced, monkeypatch, cut):
    """A training step, and no more regions than layers."""
    check(ConvMixer(4, *cut), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WINDOWS)
def test_generated_code_equals_the_equations(compiled, monkeypatch, kind):
    check(ConvMixer(4, kind), monkeypatch)


def check(mixer, monkeypatch):
    x = (torch.rand(3, 4, 6, 9) < 0.5).float()
    monkeypatch.setattr(fused, "devices", lambda: ())
    expected = step(copy.deepcopy(mixer).double(), x.double())
    monkeypatch.setattr(fused, "devices", lambda: ("cpu",))
    same(step(mixer, x), [e.float() for e in expected])
    assert not fused._FAILED
    layers = fused._compiled.cache_info().currsize
    assert 0 < counters["stats"]["unique_graphs"] <= layers


def test_generated_code_of_one_layer(compiled):
    """The one layer whose code is generated whenever the tests run."""
    norm, spike, x = nn.BatchNorm2d(3), Spike(), torch.randn(2, 3, 4, 4, requires_grad=True)
    out = fire(x, norm, spike)[0]
    assert not fused._FAILED
    assert torch.equal(out, (nn.functional.batch_norm(x, None, None, training=True) >= 0.5).float())
    assert torch.autograd.grad(out.square().sum(), x)[0].any()


def test_recurrent_and_annealed_layers(traced, monkeypatch):
    mixer = RecurrentMixer(4, "dilated", neuron=Neuron(levels=3))
    set_annealing(mixer, 0.4)
    x, received = (torch.rand(3, 4, 6, 6) < 0.5).float(), torch.randn(3, 8, 6, 6)
    monkeypatch.setattr(fused, "devices", lambda: ())
    expected = step(copy.deepcopy(mixer).double(), x.double(), received.double())
    monkeypatch.setattr(fused, "devices", lambda: ("cpu",))
    same(step(mixer, x, received), [e.float() for e in expected])


def test_compiled_once_in_training_and_not_in_evaluation(traced):
    mixer, x = ConvMixer(4, "grid"), (torch.rand(5, 4, 8, 8) < 0.5).float()
    mixer(x), mixer(x)
    assert counters["stats"]["unique_graphs"] == fused._compiled.cache_info().currsize
    regions = fused._compiled.cache_info().currsize
    mixer.eval()(x)
    assert counters["stats"]["unique_graphs"] == fused._compiled.cache_info().currsize == regions


def test_blocks_that_are_computed_again(traced):
    mixer, x = ConvMixer(4, "grid"), (torch.rand(5, 4, 8, 8) < 0.5).float().requires_grad_()
    checkpoint(mixer, x, use_reentrant=False).square().sum().backward()
    assert not fused._FAILED


def test_a_network_that_is_compiled_itself_has_no_regions(compiled):
    mixer = ConvMixer(4, "dilated").eval()
    x = (torch.rand(2, 4, 8, 8) < 0.5).float()
    with torch.no_grad():
        expected = mixer(x)
        made = fused._compiled.cache_info().misses
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), expected)
    assert fused._compiled.cache_info().misses == made


def test_one_warning_where_the_compiler_fails(compiled, monkeypatch, recwarn):
    def fail(*_):
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(fused, "_compiled", lambda *_: fail)
    mixer, x = ConvMixer(4, "dilated"), (torch.rand(2, 4, 8, 8) < 0.5).float()
    made = mixer(x)
    monkeypatch.setattr(fused, "devices", lambda: ())
    torch.testing.assert_close(made, mixer(x), rtol=1e-5, atol=1e-5)
    assert [str(w.message) for w in recwarn if "torch.compile failed" in str(w.message)] == [
        "torch.compile failed, so layers of neurons run without it: no Triton here"
    ]


@pytest.mark.parametrize(("value", "devices"), [(None, ("cuda",)), ("0", ()), ("1", ("cuda", "cpu"))])
def test_the_switch(monkeypatch, value, devices):
    monkeypatch.delenv("LIGHTNING_MSNN_COMPILE", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_MSNN_COMPILE", value)
    assert fused.devices.__wrapped__() == devices
    monkeypatch.setenv("LIGHTNING_MSNN_COMPILE", "yes")
    with pytest.raises(ConfigurationError, match="must be 0 or 1, not 'yes'"):
        fused.devices.__wrapped__()
    assert kernels_of(torch.zeros(1, dtype=torch.float64)) is None
