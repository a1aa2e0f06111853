"""Integer inference: exact sums, spikes as bytes, and the same spikes as the same weights in float32."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.energy import count_operations
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional.windows import WINDOWS
from lightning_msnn.kernels import integer
from lightning_msnn.models.baselines import relu_baseline
from lightning_msnn.nn import Membrane, Spike, Synapse
from lightning_msnn.nn.blocks import AnalogueMLP
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm
from lightning_msnn.nn.integer import IntegerConv2d, IntegerSynapse, quantised, to_integers
from lightning_msnn.nn.synapse import CentredConv2d
from tests.conftest import COMPILED, PUBLISHED, SHALLOW, TINY, rest_is_slow
from tests.models.test_registry import make
from tests.nn.test_folding import varied

SPIKING = [name for name in zoo.list_models("msnn*") if "spike_rate" in zoo.info(name)]
ENTRIES = rest_is_slow(SPIKING, [name for name in SPIKING if name.endswith("tiny.digits")])
LAID_OUT = [(n, w, "shared") for n in TINY for w in ("dilated", "grid")] + [(TINY[0], w, "shared") for w in WINDOWS]
LAID_OUT += [(name, "dilated", "isolated") for name in TINY]
SHAPES = [  # channels in and out, kernel, groups, height, width, batch
    (5, 7, 3, 1, 5, 6, 2),
    (16, 9, 3, 1, 2, 2, 40),
    (24, 24, 3, 24, 9, 4, 2),
    (70, 33, 1, 1, 3, 5, 1),
    (1, 1, 1, 1, 1, 1, 1),
    (8, 6, 1, 2, 4, 4, 3),
    (19, 6, 3, 1, 1, 1, 4),
    (19, 6, 3, 1, 1, 6, 4),
    (300, 4, 3, 1, 4, 4, 1),
]


def convolution(channels, outputs, kernel, groups):
    return CentredConv2d(channels, outputs, kernel, groups=groups)


def loop(spikes, weight, groups):
    """Sums of the weights that spikes meet, in int32, weight by weight."""
    batch, channels, height, width = spikes.shape
    outputs, each, kernel, _ = weight.shape
    reach = kernel // 2
    padded = np.zeros((batch, channels, height + 2 * reach, width + 2 * reach), dtype=np.int32)
    padded[:, :, reach : reach + height, reach : reach + width] = spikes
    sums = np.zeros((batch, outputs, height, width), dtype=np.int32)
    for o in range(outputs):
        first = o // (outputs // groups) * each
        for c in range(each):
            for i in range(kernel):
                for j in range(kernel):
                    met = padded[:, first + c, i : i + height, j : j + width]
                    sums[:, o] += np.int32(weight[o, c, i, j]) * met
    return sums


@pytest.mark.parametrize("kind", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_a_loop_over_integers(shape, kind):
    channels, outputs, kernel, groups, height, width, batch = shape
    conv = convolution(channels, outputs, kernel, groups)
    made = IntegerConv2d(conv)
    spikes = torch.rand(batch, channels, height, width) < 0.3
    sums = loop(spikes.numpy(), made.weight.numpy(), groups)
    scale, bias = (x.numpy().reshape(-1, 1, 1) for x in (made.scale, made.bias))
    expected = sums.astype(np.float32) * scale + bias
    assert expected.dtype == np.float32
    for given in (spikes.to(kind), spikes.to(kind).contiguous(memory_format=torch.channels_last)):
        current = made(given)
        assert current.dtype == torch.float32
        assert np.array_equal(current.numpy(), expected)
    for dtype in (torch.float32, torch.bfloat16):
        stream = torch.randn(expected.shape).to(dtype)
        before = stream.clone()
        after = made(spikes.to(kind), stream)
        assert after.dtype == dtype
        assert torch.equal(after, (torch.from_numpy(expected) + stream).to(dtype))
        assert torch.equal(stream, before), "the stream itself is as it was"
    levels = torch.linspace(-1.0, 1.0, outputs)
    fired = IntegerConv2d(conv, levels)(spikes.to(kind))
    reached = sums * made.scale.double().numpy().reshape(-1, 1, 1) + bias.astype(np.float64)
    assert fired.dtype == torch.uint8
    assert np.array_equal(fired.numpy(), reached >= levels.double().numpy().reshape(-1, 1, 1))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 5)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 0, 1), (2, 1, 1), ((1, 3), (2, 0), (2, 1))])
def test_any_convolution(kernel, stride, padding, dilation, groups):
    """As of a converted network, on a map that it fits and on one as small as it can be."""
    conv = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups)
    made = IntegerConv2d(conv)
    exact = copy.deepcopy(conv).double().requires_grad_(False)
    exact.weight.copy_(made.weight * made.scale.double().view(-1, 1, 1, 1))
    smallest = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    for height, width in ((9, 11), smallest):
        spikes = (torch.rand(2, 6, height, width) < 0.5).double()
        torch.testing.assert_close(made(spikes), exact(spikes).float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(made(spikes), made(spikes.to(torch.uint8)))


@pytest.mark.skipif(not integer.available(), reason="no 8-bit dot products")
def test_weights_are_kept_in_order_for_a_few_shapes():
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (9, 5, 3, 3), dtype=torch.int8)
    scale, bias, packed = torch.rand(9), torch.randn(9), integer.Packed()
    for size in (*range(3, 12), 3):
        spikes = torch.randint(0, 2, (2, 5, size, size), dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        found = integer.convolve(spikes, weight, scale, bias, packed, integer.Steps())
        expected = integer._in_floats(spikes, weight, scale, bias, integer.Steps(), False, None)
        assert torch.equal(found, expected)
        assert tuple(spikes.shape) in packed.forms
        assert len(packed.forms) <= 4


def test_weights_by_hand():
    weight = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.02]]).view(3, 3, 1, 1)
    integers, scale = quantised(weight)
    assert integers.flatten(1).tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 1]]
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 1.0, 0.02]))
    again, _ = quantised(integers * scale.view(-1, 1, 1, 1))
    assert torch.equal(again, integers)


def reference(model):
    """The network with its integer weights in float32."""
    folded = fold_batch_norm(model)
    analogue = {part for m in folded.modules() if isinstance(m, AnalogueMLP) for part in (m.fc1, m.fc2)}
    for module in folded.modules():
        if isinstance(module, Synapse) and module not in analogue:
            integers, scale = quantised(module.conv.weight)
            module.conv.weight.data = integers * scale.view(-1, 1, 1, 1)
    return folded


def spikes_of(network, x):
    """What each layer of neurons returned, call by call, by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, Spike | ThresholdEncoder) or (isinstance(module, IntegerConv2d) and module.fires):
            calls = found.setdefault(name.replace("mlp.fc1", "mlp.spike"), [])
            module.register_forward_hook(lambda m, given, out, calls=calls: calls.append(out))
    with torch.no_grad():
        network(x)
    return found


def differ(model, x):
    """Count places, spikes, and those that differ in float32 although their membrane is not next to its threshold.

    Each layer of the reference gets the spikes that the integers gave.
    """
    found, counts = spikes_of(to_integers(model), x), [0, 0, 0]
    network = reference(model)

    def compare(name, module, given, out):
        level = module.level_of(given[0]) if isinstance(module, Spike) else module.level.view(-1, 1, 1)
        membrane = given[0] if isinstance(module, Spike) or not module.mixed else given[0] * module.sign.view(-1, 1, 1)
        other = found[name].pop(0)
        wrong = other.to(out.dtype) != out
        level = level * (membrane / level).round().clamp(1, module.levels) if isinstance(module, Spike) else level
        counts[0] += out.numel()
        counts[1] += int(out.sum())
        counts[2] += int((wrong & ((membrane - level).abs() > 1e-4)).sum())
        return other.to(out.dtype)

    for name, module in network.named_modules():
        if isinstance(module, Membrane | nn.BatchNorm2d):  # what is watched runs on the equations: spikes see membranes
            module.register_forward_hook(lambda *_: None)
        elif isinstance(module, Spike | ThresholdEncoder):
            module.register_forward_hook(lambda m, given, out, name=name: compare(name, m, given, out))
    with torch.no_grad():
        network(x)
    assert not any(found.values())
    return counts


@pytest.mark.parametrize(("name", "windows", "context"), sorted(set(LAID_OUT)))
def test_spikes_are_those_of_the_same_weights_in_float32(name, windows, context):
    model = varied(make(name, windows=windows, context=context, **SHALLOW))
    places, spikes, wrong = differ(model, torch.randn(3, 3, 36, 32))
    assert 0.02 * places < spikes < 0.98 * places, "most neurons are not silent, so that there is something to compare"
    assert wrong == 0


@pytest.mark.parametrize("arguments", [{"norm": False}, {"mlp": "gelu"}, {"learn_threshold": "channel"}, {"levels": 4}])
@pytest.mark.parametrize("name", TINY)
def test_other_networks(name, arguments):
    if "mlp" in arguments and name not in PUBLISHED:
        pytest.skip(f"{name} has no channel mixer")
    places, spikes, wrong = differ(varied(make(name, **arguments, **SHALLOW)), torch.randn(2, 3, 20, 20))
    assert 0 < spikes < places
    assert wrong == 0


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name):
    size = zoo.info(name)["input_size"]
    places, spikes, wrong = differ(zoo.load(name), torch.randn(2, *size))
    assert 0 < spikes < places
    assert wrong == 0
    loaded = zoo.load(name, integer=True)
    assert any(isinstance(module, IntegerSynapse) for module in loaded.modules())
    x = torch.cat([zoo.fixed_images(zoo.info(name)), torch.randn(30, *size)])
    with torch.no_grad():
        made, expected = loaded(x), reference(zoo.load(name))(x)
    # A membrane next to its threshold moves the logits of its image, and where two classes are level, the class.
    assert (made.argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    assert ((made - expected).abs().amax(1) < 1e-3).float().mean() >= 0.9


@pytest.mark.parametrize("name", TINY)
def test_a_processor_without_8_bit_dot_products(name, monkeypatch):
    """The same to the last bit, in plain torch."""
    network, x = to_integers(varied(make(name, **SHALLOW))), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        monkeypatch.setattr(integer, "available", lambda: False)
        assert torch.equal(network(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(x).isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_the_type_of_the_network_is_that_of_its_analogue_parts(name):
    network, x = to_integers(varied(make(name, context="isolated", **SHALLOW))), torch.randn(4, 3, 32, 32)
    scales = {n: b.clone() for n, b in network.named_buffers() if n.endswith(("conv.scale", "conv.bias"))}
    narrow = copy.deepcopy(network).bfloat16()
    for n, buffer in narrow.named_buffers():
        if n in scales:
            assert torch.equal(buffer, scales[n])
    assert narrow.stem.conv.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        wide = network(x)
    assert torch.equal(network(x), wide), "what oneDNN keeps serves outside too"
    with torch.no_grad():
        assert narrow(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(network)(x), wide)
        assert copy.deepcopy(network).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", COMPILED)
def test_exports(name):
    network, x = to_integers(varied(make(name, **SHALLOW))), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


@pytest.mark.parametrize("name", TINY)
def test_counts_are_those_of_the_network(name):
    model, x = varied(make(name, **SHALLOW)), torch.randn(2, 3, 16, 16)
    expected, found = count_operations(reference(model), x), count_operations(to_integers(model), x)
    for field in ("dense", "accumulates", "multiply_accumulates", "membrane_updates", "omega_operations"):
        a, b = found.total(field), expected.total(field)
        assert abs(a - b) <= 0.01 * b, field
    assert found.total("accumulates") > 0


def test_refused():
    tiny = make("msnn_resnet12_tiny")
    for network, reason in (
        (tiny.train(), "integer weights are for inference"),
        (relu_baseline(make("msnn_resnet12_tiny").eval()), "is a ReLU baseline"),
        (make("msnn_resnet12_tiny", coding="bernoulli").eval(), "draws its spikes"),
        (make("msnn_resnet12_tiny").eval().to("meta"), "integer weights are for CPUs, and the network is on meta"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), "Sequential has none"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            to_integers(network)
    for arguments, reason in (
        ({"fuse": False}, "fuse must not be false"),
        ({"device": "cuda"}, "device must be 'cpu', not 'cuda'"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            zoo.load("msnn_resnet12_tiny_digits", integer=True, **arguments)
    broken = varied(make("msnn_resnet12_tiny"))
    broken.stages[0].blocks[0].mlp.fc1.conv.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match="weights must be finite"):
        to_integers(broken)
    network = to_integers(varied(make("msnn_resnet12_tiny")))
    with pytest.raises(ConfigurationError, match="no gradient to its input"):
        network(torch.randn(1, 3, 16, 16, requires_grad=True))
