"""Where the input of a layer comes from, and what cannot be converted."""

import copy
import math
import types

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn.conversion import RectifierSpike, convert, converted_layers, trace
from lightning_msnn.conversion.tracing import APPROXIMATE
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import to_integers

IMAGES = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """A layer, something, and another layer."""

    def __init__(self, between, layer=None, channels=6):
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.between = between
        self.last = nn.Conv2d(channels, 4, 1) if layer is None else layer

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


def within(function, inner):
    """A network that has a layer within, also in a list beside its modules, and hands it what a rectifier returns."""
    net = Net(lambda net, x: function(net, net.act(x)), nn.Identity())
    net.inner, net.held = inner, [inner]
    return net


def assign(net, x):
    y = torch.zeros_like(x)
    y[:, :3] = F.relu(x[:, :3])
    return y


def add_below(net, x):
    rectified = net.act(x)
    view = rectified.flatten(2)
    rectified += x
    return view.view_as(x)


RECTIFIED = {
    "function": lambda net, x: F.relu(x),
    "in-place": lambda net, x: F.relu_(x),
    "method": lambda net, x: x.clamp(min=0),
    "relu6": lambda net, x: F.relu6(x),
    "module": lambda net, x: net.act(x),
    "shared module": lambda net, x: net.act(net.first.weight.sum() + net.act(x)),
    "pooled and padded": lambda net, x: F.pad(F.max_pool2d(net.act(x), 3, 1, 1), (1, 1, 0, 2)),
    "concatenated": lambda net, x: torch.cat([net.act(x[:, :2]), F.relu6(x[:, 2:])], 1),
    "shuffled": lambda net, x: F.channel_shuffle(net.act(x), 3).flip(2).chunk(2, 0)[0],
    "residual beside": lambda net, x: net.act(net.act(x) + x),
    "dropped out": lambda net, x: F.dropout(net.act(x), 0.5, net.training),
}
ANALOGUE = {
    "a sum": lambda net, x: net.act(x) + x,
    "a product": lambda net, x: net.act(x) * x.sigmoid(),
    "average pooling": lambda net, x: F.avg_pool2d(net.act(x), 2),
    "a layer without rectifier": lambda net, x: x,
    "a normalisation": lambda net, x: F.batch_norm(net.act(x), torch.zeros(6), torch.ones(6)),
    "hardtanh()": lambda net, x: F.hardtanh(x),
    "clamp()": lambda net, x: x.clamp(min=-1),
    "constant_pad_nd()": lambda net, x: F.pad(net.act(x), (1, 1), value=1.0),
    "a tensor written in part": assign,
    "a sum, of which there is a view": add_below,
}


@pytest.mark.parametrize("name", RECTIFIED)
def test_a_rectifier_is_found(name):
    assert [row.layer for row in trace(Net(RECTIFIED[name]), IMAGES).spiking] == ["last"]


@pytest.mark.parametrize("why", ANALOGUE)
def test_what_stays_analogue_says_why(why):
    plan = trace(nn.Sequential(Net(ANALOGUE[why]), nn.ReLU(), nn.Conv2d(4, 4, 1)), IMAGES)
    assert [(row.layer, row.spiking, row.why) for row in plan.rows] == [
        ("0.first", False, "the image"),
        ("0.last", False, why.partition(",")[0]),
        ("2", True, "relu"),
    ]


def test_a_layer_called_twice_needs_a_rectifier_each_time():
    net = Net(lambda net, x: net.last(net.act(x)), nn.Conv2d(6, 6, 1))
    plan = trace(nn.Sequential(net, nn.ReLU(), nn.Conv2d(6, 4, 1)), IMAGES)
    assert [row.spiking for row in plan.rows] == [False, False, True]
    both = Net(lambda net, x: net.act(net.last(net.act(x))), nn.Conv2d(6, 6, 1))
    assert convert(both, IMAGES)(IMAGES).shape == (4, 6, 8, 8)


def test_operations_and_table(capsys):
    model = Net(lambda net, x: F.relu(x).flatten(1), nn.Linear(6 * 64, 10))
    assert [row.operations for row in trace(model, IMAGES).rows] == [3 * 9 * 6 * 64, 6 * 64 * 10]
    assert convert(model, IMAGES, dry_run=True) is model
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["last", "Linear", "384", "spikes", "27.0", "%", "relu"]
    assert lines[-1] == "1 of 2 layers, with 27.0 % of the operations, receive spikes"


def test_shared_layers_stay_shared():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), conv := nn.Conv2d(3, 3, 1), nn.ReLU(), conv)
    made = convert(model, IMAGES)
    assert made[2] is made[4]
    assert model[2] is conv
    assert converted_layers(made) == ["2"]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_activations_that_are_no_rectifiers_warn(name):
    with pytest.warns(UserWarning, match=f"layers behind {name} receive spikes"):
        convert(Net(lambda net, x: getattr(F, name)(x)), IMAGES)


class Weighted(nn.Conv2d):
    """A layer that computes its weights."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean())


PLAIN = Net(RECTIFIED["module"])


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), IMAGES, "nothing to convert"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Weighted(4, 4, 1)), IMAGES, "nothing to convert"),
        (Net(lambda net, x: F.relu(x) if x.sum() > 0 else x), IMAGES, "Net cannot be traced .* flow depends on values"),
        (PLAIN, IMAGES[:, :2], r"a sample of shape \(4, 2, 8, 8\): it takes another"),
        (PLAIN, IMAGES.long(), "batch of images, float .* not torch.int64"),
        (PLAIN, IMAGES * math.inf, "the sample must be finite numbers"),
        (timm.create_model("msnn_resnet12_tiny"), torch.randn(2, 3, 16, 16), "has spiking neurons already"),
        (torch.compile(PLAIN), IMAGES, "a compiled network cannot be traced"),
        (
            within(lambda net, x: net.inner(x) if x.is_meta else F.conv2d(x, net.inner.weight), nn.Conv2d(6, 4, 1)),
            IMAGES,
            "Net computes inner in evaluation without calling it",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(model, sample, message):
    before = copy.deepcopy(model.state_dict())
    model.train()
    with pytest.raises(ConfigurationError, match=message) as caught:
        convert(model, sample)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_what_is_no_network():
    with pytest.raises(ConfigurationError, match="a network is converted, a torch.nn.Module, not 'resnet18'"):
        convert("resnet18", IMAGES)


def fired(model, x):
    """What the neurons of a network return, each the values in its output."""
    found = []
    for module in model.modules():
        if isinstance(module, RectifierSpike):
            module.register_forward_hook(lambda m, args, out: found.append(out.unique().tolist()))
    with torch.inference_mode(not model.training):
        model(x)
    return found


def test_a_transformer_of_torchs_own_calls_its_layers():
    """In evaluation it has a fast path, which takes the weights without calling the layers, unless some have hooks."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="relu", batch_first=True)
    source, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(4, 5, 8)
    made = convert(source, x)
    assert list(converted_layers(made)) == ["layers.0.linear2", "layers.1.linear2"]
    with torch.inference_mode():
        found = made(x)
    torch.testing.assert_close(found, made(x))  # which has a gradient, so that no path is fast
    assert not torch.allclose(found, source(x), atol=0.01)


@pytest.mark.parametrize("train", [True, False])
def test_layers_that_a_network_keeps_elsewhere_spike_too(train):
    model = within(lambda net, x: net.held[0](x), nn.Conv2d(6, 4, 1))
    assert fired(convert(model, IMAGES).train(train), IMAGES) == [[0.0, 1.0]]


def test_a_layer_with_a_forward_of_its_own_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[2].forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight), model[2])
    rows = trace(model, IMAGES).rows
    assert [(row.layer, row.why) for row in rows[1:]] == [("2", "weights of its own"), ("4", "relu")]


@pytest.mark.parametrize("form", [fold_batch_norm, to_integers])
def test_weights_can_be_read_in_every_form(form):
    model = within(lambda net, x: net.inner(x.amax((2, 3)).to(net.inner.weight.dtype)), nn.Linear(6, 4))
    made = convert(model.eval(), IMAGES)
    wanted, made = made(IMAGES), form(made)
    torch.testing.assert_close(made(IMAGES), wanted, rtol=0, atol=0.02)
    assert (made.inner.weight.shape, made.inner.bias.shape) == ((4, 6), (4,))
    assert made.bfloat16().inner.weight.dtype == torch.bfloat16
