"""Neurons that stand for rectifiers: how they begin, what they return, how they learn."""

import math

import pytest
import torch
from torch import nn

from lightning_msnn.conversion import RectifierSpike, SpikingLayer, convert, converted_layers, quantiser, revert
from lightning_msnn.data import Digits
from lightning_msnn.energy import count_operations
from lightning_msnn.nn import set_annealing
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import to_integers


def net(*layers):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), *layers)


def level(x, threshold, levels):
    """How many of V, 3 V, 5 V, ... are reached."""
    return ((x / threshold + 1) / 2).floor().clamp(0, levels)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_the_quantiser_is_the_best_of_all_thresholds(levels):
    x = torch.rand(5, 40) ** 3
    x[3], x[4] = 0.0, -1.0
    thresholds, scales = quantiser(x, levels)

    def error(row, threshold, scale=None):
        spikes = level(row, threshold, levels).double()
        scale = (row * spikes).sum() / spikes.square().sum() if scale is None else scale
        return (row - scale * spikes).square().mean().item()

    for row, threshold, scale in zip(x[:3].double(), thresholds.double(), scales, strict=False):
        above = row.sort().values
        tried = min(error(row, v) for v in (above + torch.cat([torch.zeros(1), above[:-1]])) / 2)
        assert error(row, threshold, scale) == pytest.approx(tried, rel=1e-5)
    assert torch.equal(thresholds[3:], thresholds[:3].median().expand(2))
    assert torch.equal(scales[3:], scales[:3].median().expand(2))
    columns = torch.tensor([0.0, 3.0]).repeat(2, 4096)  # of a map, whose step through the samples must not be theirs
    assert quantiser(columns, levels)[0].tolist() == [1.5, 1.5]
    never = torch.zeros(2, 3)
    assert [v.tolist() for v in quantiser(never, levels)] == [[0.5, 0.5], [1.0, 1.0]]


def test_what_neurons_return_by_hand():
    neuron = RectifierSpike(2, 1).train()
    with torch.no_grad():
        neuron.log_threshold.copy_(torch.tensor([0.5, 2.0]).log())
        neuron.log_scale.copy_(torch.tensor([1.0, 5.0]).log())
    x = torch.tensor([[[0.0, 0.4, 0.6, 3.0], [0.0, 1.0, 2.5, 6.0]]])
    spikes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]])
    assert torch.equal(neuron(x), spikes)
    full = torch.tensor([1.0, 5.0]).view(2, 1)
    set_annealing(neuron, 0.25)
    torch.testing.assert_close(neuron(x), 0.25 * full * spikes + 0.75 * x)
    assert torch.equal(neuron.eval()(x), spikes)


@pytest.mark.parametrize("levels", [1, 3])
def test_gradients_by_hand(levels):
    """A triangle of area 1 about V, 3 V, ... that is V wide to either side; that of log V is the negative threshold."""
    neuron = RectifierSpike(1, 0, levels=levels)
    with torch.no_grad():
        neuron.log_threshold.fill_(math.log(2.0))
    x = torch.linspace(0, 14, 1401, dtype=torch.float64).unsqueeze(1).requires_grad_()
    grad, of_log = torch.autograd.grad(neuron.double()(x).sum(), [x, neuron.log_threshold])
    triangles = {v: (1 - (x.detach() - v).abs() / 2).clamp(min=0) / 2 for v in (2.0, 6.0, 10.0)[:levels]}
    torch.testing.assert_close(grad, sum(triangles.values()))
    assert grad.sum().item() * 0.01 == pytest.approx(levels, rel=1e-6)
    assert of_log.item() == pytest.approx(-sum(v * triangle.sum().item() for v, triangle in triangles.items()))


@pytest.mark.parametrize(
    ("levels", "layers"),
    [
        (1, (nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, padding_mode="reflect", bias=False))),
        (4, (nn.ReLU6(), nn.Conv2d(6, 12, 3, groups=3))),
        (1, (nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 5))),
        (2, (nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 4, 3))),
        (1, (nn.ReLU(), nn.Unflatten(1, (2, 3)), nn.Conv3d(2, 4, 1))),
    ],
)
def test_the_weights_carry_lambda(levels, layers):
    """Spikes that meet scaled weights are lambda times the spikes that meet the weights."""
    source = net(*layers).eval()
    images = torch.randn(16, 3, 8, 8)
    model = convert(source, images, levels=levels)
    (layer,) = (module for module in model if isinstance(module, SpikingLayer))
    x = model[:-1](images)
    shape = (1, -1, *[1] * (x.dim() - 2))
    spikes = level(x, layer.neuron.log_threshold.exp().view(shape), levels)
    assert spikes.unique().tolist() == [*range(levels + 1)]
    torch.testing.assert_close(model(images), source[-1](layer.neuron.log_scale.exp().view(shape) * spikes))
    fused = fold_batch_norm(model)
    torch.testing.assert_close(fused(images), model(images))
    assert not any(isinstance(module, SpikingLayer) for module in fused.modules())
    assert type(revert(model)[-1]) is type(source[-1])
    assert model.state_dict().keys() - source.state_dict().keys() == {
        f"{len(source) - 1}.neuron.log_{name}" for name in ("threshold", "scale")
    }


def test_a_network_is_traced_whole():
    """No graph break, so that a compiler sees neurons and synapses at once."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    model = convert(source, x).train()
    set_annealing(model, 0.3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = model(x), compiled(x)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), parameters), wanted)


@pytest.fixture(scope="module")
def trained():
    """A small CNN that has learnt digits, and 359 digits that it has not seen."""
    torch.manual_seed(0)
    data = Digits()
    data.setup("fit")
    data.setup("test")
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveMaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in [*data.train_dataloader()] * 4:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, torch.cat([images for images, _ in data.test_dataloader()])


@torch.no_grad()
def test_more_levels_are_nearer_to_the_rectifier(trained):
    source, images, tests = trained
    wanted, errors, sent = source(tests), [], {}
    for levels in (1, 2, 4, 8):
        model = convert(source, images, levels=levels)
        for name in converted_layers(model):
            neuron = model.get_submodule(name).neuron
            neuron.register_forward_hook(lambda m, args, out, name=name: sent.update({name: out}))
        record, plain = count_operations(model, tests), revert(model)
        for name, spikes in sent.items():
            assert spikes.unique().tolist() == [*range(levels + 1)]
            steps = [count_operations(plain.get_submodule(name), (spikes >= k).float()) for k in range(1, levels + 1)]
            counts, binary = record.layer(name), sum(step.total("accumulates") for step in steps)
            assert counts["accumulates"] == binary > counts["multiply_accumulates"] == 0
        logits = model(tests)
        errors.append(float((logits - wanted).square().mean()))
        assert (to_integers(model)(tests).argmax(1) == logits.argmax(1)).double().mean() > 0.95
    assert errors == sorted(errors, reverse=True)
