"""The counting engine: by hand, against brute force, and on every registered network."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn.energy import OperationCounter, count_operations, energy, mean_level, spike_rate
from lightning_msnn.energy.profiles import FIELDS, TRANSCENDENTAL
from lightning_msnn.functional import PROJECTIONS
from lightning_msnn.kernels.layer import neurons
from lightning_msnn.models import SPIKING_CELLS, ConvMixer, Recurrence
from lightning_msnn.nn import Neuron, PatchMerging, Spike, Stem
from lightning_msnn.nn import layer as layers_of_neurons
from lightning_msnn.nn.blocks import WhitenedStem
from tests.conftest import SHALLOW, TINY
from tests.models.test_registry import lively

SMALL = {"num_classes": 10, **SHALLOW}
NETWORKS = [*((name, {}) for name in TINY), *(("msnn_rnn12_tiny", {"cell": cell}) for cell in SPIKING_CELLS)]


def by_hand():
    """Two convolutions and a linear layer, made to fire where the test says."""
    conv1, conv2, linear = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Linear(12, 5)
    with torch.no_grad():
        for layer in (conv1, conv2, linear):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
        conv1.weight.zero_()
        conv1.weight[0, 0, 1, 1], conv1.weight[1, 0, 1, 1] = 1.0, -1.0
    return nn.Sequential(conv1, Spike(), conv2, Spike(), nn.Flatten(), linear)


def test_by_hand():
    images = torch.full((2, 1, 4, 4), 0.1)
    images[0, 0, 0, 0] = images[0, 0, 1, 2] = 0.9
    record = count_operations(by_hand(), images)
    assert record.samples == 2
    assert record.layers == ("", "0", "1", "2", "3", "4", "5")
    assert record.parameters.tolist() == [0, 2 * 9 + 2, 0, 2 * 3 * 9 + 3, 0, 0, 12 * 5 + 5]
    assert not record.uncounted

    # Pixels are analogue. Of the 3 taps of a 3x3 kernel on a side of 4, 2 + 3 + 3 + 2 = 10 lie inside: 10 * 10 places,
    # 1 channel in and 2 out.
    assert record.layer("0") == dict.fromkeys(FIELDS, 0) | {
        "dense": 2 * 200,
        "multiply_accumulates": 2 * 200,
        "effective_multiply_accumulates": 2 * 200,
        "weights_read": 2 * 18,
        "values_read": 2 * 16,
        "values_written": 2 * 32,
        "input_reads": 2 * 200,
        "addresses": 2 * (16 + 32 + 2 * 9),
        "calls": 2,
    }
    # Channel 0 fires at (0, 0) and (1, 2) of the first image, channel 1 nowhere.
    assert record.layer("1") == dict.fromkeys(FIELDS, 0) | {
        "neurons": 2 * 32,
        "spikes": 2,
        "values_read": 2 * 32,
        "spikes_written": 2 * 32,
    }
    # Stride 2 with a border of 1: rows 0 and 1 feed output 0, rows 1, 2 and 3 output 1. So row 0 reaches 1 output,
    # row 1 two, rows 2 and 3 one each, 5 in all: dense 5 * 5 places, 2 channels in, 3 out. The spike at (0, 0) reaches
    # 1 * 1 places, that at (1, 2) 2 * 1, with 3 channels each.
    assert record.layer("2") == dict.fromkeys(FIELDS, 0) | {
        "dense": 2 * 150,
        "accumulates": 3 + 6,
        "weights_read": 2 * 54,
        "values_written": 2 * 12,
        "spikes_read": 2 * 32,
        "input_spikes": 2,
        "convolved_spikes": 2,
        "potentials": 2 * 12,
        "calls": 2,
    }
    # Three of the four places get a spike, in three channels.
    assert record.layer("3")["spikes"] == 9
    assert record.layer("3")["neurons"] == 2 * 12
    assert record.fired["3"].sum() == 9
    assert record.visits == {"1": 2, "3": 2}
    # 9 spikes meet 5 weights each, of 12 * 5.
    assert record.layer("5") == dict.fromkeys(FIELDS, 0) | {
        "dense": 2 * 60,
        "accumulates": 45,
        "weights_read": 2 * 60,
        "values_written": 2 * 5,
        "spikes_read": 2 * 12,
        "input_spikes": 9,
        "potentials": 2 * 5,
        "calls": 2,
    }
    # 400 multiply-accumulates, 54 accumulates, 88 comparisons with a threshold, for two images.
    assert energy(record) == pytest.approx((400 * 4.6 + 54 * 0.9 + 88 * 0.9) * 1e-12 / 2, rel=1e-12)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2),
    nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv3d(4, 2, 3, stride=2, padding=1),
    nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions_against_brute_force(conv):
    """A convolution of spikes with weights of one adds up as many ones as there are accumulates."""
    axes = conv.weight.dim() - 2
    spikes = (torch.rand(3, 4, *(7, 6, 5)[:axes]) < 0.3).double()
    ones = copy.deepcopy(conv).double()
    nn.init.ones_(ones.weight)
    nn.init.zeros_(ones.bias)
    record = count_operations(ones, spikes)
    assert record.total("accumulates") == ones(spikes).sum().item() > 0
    assert record.total("multiply_accumulates") == 0
    analogue = count_operations(ones, torch.full_like(spikes, 0.5))
    assert analogue.total("multiply_accumulates") == ones(torch.ones_like(spikes)).sum().item()
    assert analogue.total("dense") == record.total("dense") == analogue.total("multiply_accumulates")
    assert analogue.total("accumulates") == 0


class Call(nn.Module):
    """A network of one function, and of the layers that it calls."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(model, *inputs):
    record = count_operations(model, *inputs)
    assert not record.uncounted
    return {name: record.total(name) for name in FIELDS if record.total(name)}


@pytest.mark.parametrize("context", ["shared", "isolated"])
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_a_sample_costs_the_same_in_any_batch(name, kwargs, context):
    """Also where a batch is as large as the groups of a product, its windows or its tokens are many."""
    # In float64 rounding moves no membrane across its threshold.
    network = lively(timm.create_model(name, context=context, **SMALL, **kwargs), 16).double()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    parts = [count_operations(network, part) for part in images.split([1, 2, 4])]
    whole = count_operations(network, images)
    assert whole.samples == sum(part.samples for part in parts) == 7
    assert torch.equal(whole.counts, sum(part.counts for part in parts))
    assert whole.total("spikes") > 0
    assert not whole.uncounted


def test_zeros_that_are_put_around_an_image_are_padding():
    padded = nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3, 2))
    x = torch.randn(2, 3, 5, 6)
    assert counted(padded, x) == counted(nn.Conv2d(3, 4, 3, 2, padding=(1, 2)), x)


def test_what_is_a_bias_and_what_is_not():
    linear, extra = nn.Linear(4, 5), nn.Parameter(torch.randn(5))

    def network(function):
        model = Call(function, linear)
        model.extra = extra
        return counted(model, torch.randn(2, 4))

    plain = network(linear)
    assert network(lambda x: (0.5 * linear(x)).view(2, 5) + extra + 1.0) == plain | {"multiplications": 10}
    assert network(lambda x: linear(x).relu() + extra)["additions"] == 2 * 10
    assert network(lambda x: linear(x) + linear(x))["additions"] == 10
    (conv,) = layers = [nn.Conv2d(3, 8, 4, 4)]
    embedding = Call(lambda x: conv(x).flatten(2).mT + embedding.place, *layers)
    embedding.place = nn.Parameter(torch.randn(1, 4, 8))
    assert counted(embedding, torch.randn(2, 3, 8, 8))["additions"] == 2 * 4 * 8, "a place has a value for each token"


def test_spikes_alone_are_counted_beside_the_kernels(monkeypatch):
    """What only neurons do is seen where kernels compute it."""
    network = lively(timm.create_model("msnn_resnet12_tiny", **SMALL), 16)
    x = torch.randn(2, 3, 16, 16)
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        return neurons(*args, **kwargs)

    monkeypatch.setattr(layers_of_neurons, "neurons", called)
    with torch.no_grad():
        network(x)
        on_kernels = len(calls)
        with OperationCounter(network, operations=False) as counter:
            network(x)
    assert len(calls) == 2 * on_kernels
    record = counter.record()
    assert record.samples == 2
    assert record.total("neurons") == count_operations(network, x).total("neurons") > 0


def test_membranes_of_other_libraries():
    """40 neurons: one update for each membrane, and none for what spikes select in a reset."""
    x = 3.0 * torch.rand(4, 10)
    jelly = pytest.importorskip("spikingjelly.activation_based.neuron")
    norse = pytest.importorskip("norse.torch")
    for neuron, updates in (
        (jelly.LIFNode(), 1), (jelly.LIFNode(v_reset=None), 1), (jelly.IFNode(), 0), (norse.LIFCell(), 2),
    ):  # fmt: skip
        record = count_operations(neuron.eval(), x)
        assert record.total("neurons") == 40
        assert record.total("membrane_updates") == 40 * updates, type(neuron)


SPIKES_A = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])  # (1, 2, 3): 3 spikes; columns 1, 0, 2
SPIKES_B = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]])  # (1, 3, 2): 5 spikes; rows 2, 2, 1


@pytest.mark.parametrize(
    ("a", "b", "accumulates", "multiply_accumulates"),
    [
        (SPIKES_A, SPIKES_B, 1 * 2 + 0 * 2 + 2 * 1, 0),  # where two spikes meet
        (SPIKES_A, SPIKES_B - 0.5, 3 * 2, 0),  # each spike of a meets a row of 2
        (SPIKES_A - 0.5, SPIKES_B, 5 * 2, 0),  # each spike of b meets a column of 2
        (SPIKES_A - 0.5, SPIKES_B - 0.5, 0, 2 * 3 * 2),
    ],
)
def test_products_of_activations(a, b, accumulates, multiply_accumulates):
    for product in (torch.matmul, lambda a, b: torch.einsum("bnk,bkm->bnm", a, b)):
        record = count_operations(Call(product), a, b)
        assert record.total("dense") == 12
        assert record.total("accumulates") == accumulates
        assert record.total("multiply_accumulates") == record.total("input_reads") == multiply_accumulates
        assert record.total("addresses") == (6 + 6 + 4 if multiply_accumulates else 0)
        assert record.total("calls") == 1
        assert not record.uncounted


def test_graded_spikes():
    """One of level k is k accumulates; on hardware that sends it as one, a product."""
    fire, linear = Spike(Neuron(threshold=1.0, levels=3)), nn.Linear(4, 5)
    x = torch.tensor([[0.5, 1.5, 2.5, 9.0]])
    record = count_operations(nn.Sequential(fire, linear), x)
    found = {layer: {k: v for k, v in record.layer(layer).items() if v} for layer in "01"}
    assert found["0"] == {
        "additions": 2 * 4, "neurons": 4, "spikes": 3, "further_levels": 3, "values_read": 4, "spikes_written": 3 * 4,
    }  # fmt: skip
    assert found["1"] == {
        "dense": 20, "accumulates": (1 + 2 + 3) * 5, "graded_products": 3 * 5, "weights_read": 20, "values_written": 5,
        "spikes_read": 3 * 4, "input_spikes": 6, "potentials": 5, "calls": 1,
    }  # fmt: skip
    assert (spike_rate(record), mean_level(record)) == (3 / 4, 6 / 4)
    assert "30 AC, 15 graded products" in str(record)
    a, b = 4.0 * torch.rand(2, 5, 4), 4.0 * torch.rand(2, 4, 3)
    both = count_operations(Call(lambda a, b: fire(a) @ fire(b), fire), a, b)
    assert both.total("accumulates") == (fire(a) @ fire(b)).sum()
    assert both.total("graded_products") == ((fire(a) > 0).float() @ (fire(b) > 0).float()).sum()
    one = count_operations(Call(lambda a, b: fire(a) @ b, fire), a, b)
    assert one.total("accumulates") == fire(a).sum() * 3
    assert one.total("graded_products") == (fire(a) > 0).sum() * 3


def test_softmax_attention():
    q = torch.randn(2, 3, 5, 4)  # two samples, three heads, five tokens of four channels
    products = 2 * 3 * 5 * 5 * 4
    written_out = Call(lambda q, k, v: (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v)
    fused = Call(F.scaled_dot_product_attention)
    for model in (written_out, fused):
        record = count_operations(model, q, q + 1, q + 2)
        assert record.total("multiply_accumulates") == record.total("dense") == 2 * products
        assert record.total("additions") == 2 * 3 * 25 * 2
        assert record.total("multiplications") == 2 * 3 * 25 * (1 + TRANSCENDENTAL + 1)
        assert not record.uncounted
    spikes = (q > 0).float()
    record = count_operations(fused, spikes, spikes, spikes)
    assert record.total("multiply_accumulates") == 0
    # Scores: where spikes meet. Then each spike of the values meets the scores of five tokens.
    meetings = (spikes.sum(2) * spikes.sum(2)).sum()
    assert record.total("accumulates") == meetings + 5 * spikes.sum()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers(cell, gates, bidirectional):
    """The input product takes spikes; the recurrent one takes the analogue h, which is zero before the first token."""
    model = cell(6, 5, batch_first=True, bidirectional=bidirectional)
    directions = 2 if bidirectional else 1
    spikes = (torch.rand(2, 7, 6) < 0.3).float()
    record = count_operations(model, spikes)
    fan_out = directions * gates * 5
    assert record.total("accumulates") == int(spikes.sum()) * fan_out
    assert record.total("multiply_accumulates") == 2 * 7 * 5 * fan_out
    assert record.total("effective_multiply_accumulates") == 2 * 6 * 5 * fan_out
    assert record.total("dense") == 2 * 7 * (6 + 5) * fan_out
    assert record.total("weights_read") == 2 * (6 + 5) * fan_out
    assert record.total("input_reads") == 2 * 7 * 5 * directions
    assert record.total("addresses") == 2 * 7 * (5 * directions + fan_out)
    assert not record.uncounted
    for other in (cell(6, 5, 2, batch_first=True, bidirectional=bidirectional), nn.RNN(6, 5, batch_first=True)):
        assert "that is not one layer over (samples, tokens" in str(count_operations(other, spikes).uncounted)


def test_arithmetic():
    x = torch.randn(2, 3, 4, 4)
    cases = {
        "residual": (lambda x: x + x.sin(), 96, 96 * TRANSCENDENTAL),
        "max pool": (lambda x: F.max_pool2d(x, 2), 24 * 3, 0),
        "average pool": (lambda x: F.avg_pool2d(x, 2), 24 * 3, 24),
        "global pool": (lambda x: x.mean((2, 3)), 96 - 6, 6),
        "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 1), 96 - 6, 6),
        "relu": (torch.relu, 96, 0),
        "scale": (lambda x: 0.5 * x, 0, 96),
        "moves": (lambda x: torch.cat([x.flip(1), x.permute(0, 1, 3, 2)]).reshape(4, -1), 0, 0),
    }
    for name, (function, additions, multiplications) in cases.items():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            record = count_operations(Call(function), x.to(memory_format=memory_format))
            assert (record.total("additions"), record.total("multiplications")) == (additions, multiplications), name
            assert not record.uncounted, name


def test_batch_norm_is_folded_and_parameters_are_constants():
    class Net(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return F.linear(x.mean((2, 3)), torch.sigmoid(self[0].weight.flatten(1) * 2.0 + 1.0))

    model = Net(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for train in (False, True):
        record = count_operations(model.train(train), torch.randn(2, 4, 4, 4))
        assert record.total("additions") == 2 * 4 * 16 - 8, "only those of the mean"
        assert record.total("multiplications") == 8
        assert record.total("multiply_accumulates") == 2 * (16 * 16 + 4 * 4), "and a product with a constant"


def test_layers_called_with_something_before_the_samples_are_named():
    linear = nn.Linear(4, 4)
    record = count_operations(Call(lambda x: linear(x.transpose(0, 1)), linear), torch.rand(2, 3, 4))
    assert "mm of 6 rows, which are not those of 2 samples" in str(record.uncounted)


def test_network_is_left_as_it_was():
    model = timm.create_model("msnn_resnet12_tiny", **SMALL).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    with OperationCounter(model) as counter, torch.no_grad():
        # What is watched runs on the equations, which round otherwise than kernels.
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError):
            model(x.double())
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    twice = counter.record().total("accumulates")
    assert twice == 2 * count_operations(model, x).total("accumulates")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(x)
    assert counter.record().total("accumulates") == twice


@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_every_synapse_of_the_branches_is_accumulate_only(name, kwargs):
    model = lively(timm.create_model(name, **SMALL, **kwargs), 16)
    record = count_operations(model, torch.randn(2, 3, 16, 16))
    assert not record.uncounted
    column = list(FIELDS).index("multiply_accumulates")
    analogue = {layer for layer, row in zip(record.layers, record.counts.tolist(), strict=True) if row[column]}
    # Stem, patch merging and read-out are analogue, and so is the output of a recurrent cell that is not spiking.
    expected = {"head.fc"}
    for name, module in model.named_modules():
        if isinstance(module, Stem | PatchMerging):
            expected |= {f"{name}.conv"} | ({f"{name}.whitening"} if isinstance(module, WhitenedStem) else set())
        elif type(module) is Recurrence:
            expected.add(name)
    assert analogue == expected
    assert record.total("accumulates") > 0
    assert record.total("spikes") > 0


@pytest.mark.parametrize("projection", sorted(PROJECTIONS))
def test_membranes_and_omega(projection):
    """Three of four windows carry a membrane over: a membrane update each, and in layer 2 an Omega."""
    mixer = ConvMixer(4, "non_dilated", neuron=Neuron(projection=projection)).eval()
    spikes = (torch.rand(2, 4, 8, 8) < 0.3).float()
    record = count_operations(mixer, spikes)
    carried = 2 * 4 * 8 * 8 * 3 // 4
    assert record.layer("membrane1")["membrane_updates"] == carried
    assert record.layer("membrane2")["membrane_updates"] == carried
    assert record.layer("membrane2.projection")["omega"] == carried
    operations = {"none": 0, "mean": 2, "sine": 4 + 2 * TRANSCENDENTAL}
    if projection in operations:
        assert record.total("omega_operations") == carried * operations[projection]
    else:
        assert record.total("omega_operations") > carried
    assert record.total("neurons") == 2 * 2 * 4 * 64
    assert record.total("additions") == record.total("multiplications") == 0
    single = count_operations(ConvMixer(4, "single", neuron=Neuron(projection=projection)).eval(), spikes)
    assert single.total("membrane_updates") == single.total("omega") == 0


def test_overlapping_windows_cost_their_mean():
    mixer = ConvMixer(4, "dilated").eval()
    record = count_operations(mixer, (torch.rand(1, 4, 8, 8) < 0.3).float())
    # Windows of side 6 on a map of 8 share a strip of 4: two means of 6 x 4 and one of 4 x 8, in 4 channels, 2 layers.
    means = 2 * 4 * (6 * 4 + 6 * 4 + 4 * 8)
    assert record.total("additions") == record.total("multiplications") == means
    assert record.total("membrane_updates") == 2 * 3 * 4 * 36


@pytest.mark.parametrize("name", TINY)
def test_training_under_autocast_and_inference_mode(name):
    """Counts are those of the network, however it is run."""
    model = timm.create_model(name, **SMALL)
    x = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        inference = count_operations(model.eval(), x)
    assert torch.equal(inference.counts, count_operations(model, x).counts)
    with OperationCounter(model.train()) as counter, torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    record = counter.record()
    assert not record.uncounted
    for field in ("dense", "neurons", "membrane_updates", "omega", "omega_operations", "additions", "multiplications"):
        assert record.total(field) == inference.total(field), field
    assert model.stem.conv.weight.grad.isfinite().all()


def test_a_printed_record_is_a_table_of_parts():
    """At most 20 of them, in µJ, each beside the baseline: of the pixels and 45 accumulates, see test_by_hand."""
    images = torch.full((2, 1, 4, 4), 0.1)
    images[0, 0, 0, 0] = images[0, 0, 1, 2] = 0.9
    head, line, *rows = str(count_operations(by_hand(), images)).splitlines()
    assert head.split() == ["part", "operations", "spike", "rate", "energy", "(µJ)", "ReLU", "baseline"]
    assert len(head) == len(line) == len(rows[0])
    assert rows[0].split() == ["0", "200", "MAC", "-", "0.00092"]
    assert rows[1].split() == ["1", "32", "other", "3.1", "%", "2.88e-05"]
    assert rows[4].split() == ["5", "22.5", "AC", "-", "2.03e-05", "13.6", "times"], "60 * 4.6 / (22.5 * 0.9)"
    assert rows[5].split()[0] == "all"
    whole = str(count_operations(timm.create_model("msnn_resnet12", num_classes=10), torch.zeros(1, 3, 32, 32)))
    assert len(whole.splitlines()) <= 2 + 20 + 1 + 2
    assert "Could not be counted: Call: i0 (1 calls)" in str(count_operations(Call(torch.special.i0), images))
