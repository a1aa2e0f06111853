"""The law of spike rates against simulation, on synthetic Gaussian currents and on trained networks."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from lightning_msnn import convert, zoo
from lightning_msnn.energy import OperationCounter, count_operations, energy, evenly, predict_rates, synaptic_operations
from lightning_msnn.energy.expected import EnergyLaw
from lightning_msnn.energy.rates import RateLaw, Sources, project
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import PROJECTIONS, WINDOWS
from lightning_msnn.models.twins import ann_twin, calibrate
from lightning_msnn.nn import Membrane, Neuron, Projection, Spike, fire
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.layer import Cut
from lightning_msnn.zoo.verification import test_data as data_of
from tests.conftest import DISTINCT, NETWORKS

CHANNELS = 6
DIGITS = ["msnn_resnet12_tiny.digits", "msnn_vit12_tiny.digits", "msnn_rnn12_tiny.digits"]
SIZES = [(6, 8), (5, 7), (2, 3), (1, 4)]


def norm(channels=CHANNELS):
    """Batch norm in evaluation that hands on ``beta + gamma z``."""
    made = nn.BatchNorm2d(channels, eps=0.0)
    with torch.no_grad():
        made.weight.copy_(torch.rand(channels) + 0.3)
        made.weight[0] *= -1.0
        made.bias.copy_(torch.randn(channels) * 0.5)
    return made.eval()


class Noise(nn.Module):
    """Two layers of neurons whose currents are normal, the second coupled with the first, as mixers call them.

    Args:
        correlation: Of the current at any two places of a map.
    """

    def __init__(
        self, kind, form, projection="sine", theta=0.25, tau=0.45, isolated=False, correlation=0.0, size=(6, 8)
    ):
        super().__init__()
        neuron = Neuron(tau=tau, projection=projection, theta=theta)
        self.norms = nn.ModuleList([norm(), norm()])
        self.membranes = nn.ModuleList(
            [Membrane("recurrent" if form == "recurrent" else "first", neuron, CHANNELS, kind),
             Membrane(form, neuron, CHANNELS, kind)]
        )  # fmt: skip
        with torch.no_grad():
            for membrane in self.membranes:
                membrane.decay.logit.add_(torch.randn(CHANNELS) * 0.5) if kind != "single" else None
        self.spikes = nn.ModuleList([Spike(neuron), Spike(neuron)])
        self.kind, self.size, self.isolated, self.correlation = kind, size, isolated, correlation
        self.form = form

    def draw(self, images):
        shape = [images, CHANNELS, *self.size]
        if self.isolated or self.form == "recurrent":
            n = WINDOWS[self.kind].count(*self.size)
            cut = WINDOWS[self.kind].split(torch.zeros(1, 1, *self.size)) if n > 1 else [torch.zeros(1, 1, *self.size)]
            shape = [n, images, CHANNELS, *cut[0].shape[2:]]
        common = torch.randn(images, CHANNELS, 1, 1)
        noise = self.correlation**0.5 * common + (1.0 - self.correlation) ** 0.5 * torch.randn(shape)
        return noise.flatten(0, -4)

    def forward(self, x):
        windows = self.isolated or self.form == "recurrent"
        where = {"cut": Cut(self.kind, windows, self.isolated), "size": self.size}
        other = torch.zeros(len(x), CHANNELS, *self.size) if self.form == "recurrent" else None
        first = [self.draw(len(x)), self.norms[0], self.spikes[0], self.membranes[0], other]
        out = fire(*first, **where, handed=0 if other is not None else CHANNELS, keeps=True)
        other = out[2] if self.form == "recurrent" else out[1]
        second = fire(self.draw(len(x)), self.norms[1], self.spikes[1], self.membranes[1], other, **where)
        return out[0], second[0]


@torch.no_grad()
def simulated(network):
    images = 100_000 // (network.size[0] * network.size[1])  # a standard error of 0.0016 at most
    return [spikes.transpose(0, 1).flatten(1).mean(1) for spikes in network.eval()(torch.zeros(images, 1, 1, 1))]


def compare(network, tolerance):
    law = RateLaw(network, (1, 1, 1), network.correlation)()
    for name, measured in zip(["spikes.0", "spikes.1"], simulated(network), strict=True):
        assert law[name].shape == (CHANNELS,)
        assert (law[name] - measured).abs().max() < tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_kind_of_windows_at_every_size(kind, size):
    compare(Noise(kind, "coupled", "none", size=size), 0.015)


@pytest.mark.parametrize(("tau", "theta", "tolerance"), [(0.45, 0.25, 0.02), (0.15, 0.9, 0.01)])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", [kind for kind in WINDOWS if kind != "single"])
def test_every_projection_with_every_kind_of_windows(kind, projection, tau, theta, tolerance):
    compare(Noise(kind, "coupled", projection, theta, tau), tolerance)


@pytest.mark.parametrize("theta", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("form", ["first", "coupled"])
def test_theta_and_both_contexts(form, isolated, theta):
    compare(Noise("dilated", form, "sine", theta, 0.2, isolated), 0.015)


@pytest.mark.parametrize("kind", ["non_dilated", "grid"])
def test_the_map_of_recurrent_networks(kind):
    compare(Noise(kind, "recurrent"), 0.02)


@pytest.mark.parametrize("correlation", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["non_dilated", "dilated"])
def test_currents_that_are_correlated_over_the_map(kind, correlation):
    compare(Noise(kind, "coupled", "mean", correlation=correlation), 0.02)


def test_without_windows_it_is_one_tail_of_a_normal_distribution():
    network = Noise("single", "first")
    law = RateLaw(network, (1, 1, 1))()
    expected = 1.0 - torch.distributions.Normal(network.norms[0].bias, network.norms[0].weight.abs()).cdf(
        torch.tensor(0.5)
    )
    torch.testing.assert_close(law["spikes.0"].float(), expected)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("theta", [0.1, 0.25, 0.9])
def test_moments_of_projections_against_a_fine_sum(theta, name):
    """Of the sine, whose moments are in closed form, at every theta; of others where Gauss and Hermite reach."""
    if theta > 0.25 and name != "sine":
        theta = 0.4
    one = torch.ones(1, 1, dtype=torch.float64)
    mean, variance = torch.randn(2, 3, dtype=torch.float64) * 0.6, torch.rand(2, 3, dtype=torch.float64) * 0.4 + 0.05
    sources = Sources(dict(zip("ab", variance, strict=True)), dict.fromkeys("ab", one), dict.fromkeys("ab", one[None]))
    a = sources.variable("a", 0, mean[0])
    b = sources.variable("b", 0, mean[1]) + torch.tensor(0.5) * a
    made = project(Projection(name, theta), a, b)
    z = torch.linspace(-7.0, 7.0, 501, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) * (z[1] - z[0]) / math.sqrt(2.0 * math.pi)
    both = density[:, None] * density
    seen = (mean[0][:, None] + variance[0].sqrt()[:, None] * z)[:, :, None].expand(-1, -1, len(z))
    other = (mean[1][:, None] + variance[1].sqrt()[:, None] * z)[:, None] + 0.5 * seen
    value = PROJECTIONS[name](seen, other, torch.tensor(theta))
    first, second = ((x * both).sum((1, 2)) for x in (value, value.square()))
    slope = (value * (z * both.T).T).sum((1, 2)) / variance[0].sqrt()  # of all that depends on the first variable
    torch.testing.assert_close(made.mean[:, 0], first, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(made.variance()[:, 0], second - first**2, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(made.weights["a"][0, :, 0], slope, atol=1e-2, rtol=1e-2)


def test_windows_of_the_users_own(monkeypatch):
    class Halves:
        """Two halves of the width, the second one seen mirrored."""

        def count(self, height, width):
            return 2

        def split(self, x):
            return [x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :].flip(3)]

        def merge(self, windows, height, width):
            return torch.cat([windows[0], windows[1].flip(3)], 3)

    monkeypatch.setitem(WINDOWS, "halves", Halves())
    compare(Noise("halves", "coupled"), 0.02)

    class Means(Halves):
        def split(self, x):
            return [(x[..., ::2] + x[..., 1::2]) / 2] * 2

    monkeypatch.setitem(WINDOWS, "halves", Means())
    with pytest.raises(ConfigurationError, match="Means cuts windows that are not made of the map's pixels"):
        RateLaw(Noise("halves", "coupled"), (1, 1, 1))()


def test_counts_are_of_a_gamma_distribution():
    counts = torch.distributions.Gamma(torch.rand(12) + 0.3, torch.rand(12) + 0.5)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm(12)
            self.norm.running_mean.copy_(counts.mean)
            self.norm.running_var.copy_(counts.variance)
            self.spike = Spike()

        def forward(self, x):
            return fire(counts.sample((len(x), 20)).permute(0, 2, 1)[..., None], self.norm, self.spike)[0]

    network = Counts()
    measured = network(torch.zeros(4000, 1, 1, 1)).transpose(0, 1).flatten(1).mean(1)
    assert (RateLaw(network, (1, 1, 1))()["spike"] - measured).abs().max() < 0.01


def entry(name, images=300):
    network = zoo.load(name)
    return network, torch.cat(list(evenly(data_of(zoo.info(name), None, 100), images)))


@torch.no_grad()
def measured_rates(network, images):
    with OperationCounter(network, operations=False) as counter:
        network(images)
    record = counter.record()
    rates = {}
    for layer, fired in record.fired.items():
        rates[layer] = fired.flatten(1).double().mean(1) / record.visits[layer]
    return rates


@pytest.mark.parametrize("theta", [None, 0.0, 0.9])
@pytest.mark.parametrize("name", DIGITS)
def test_trained_networks(name, theta):
    network, images = entry(name)
    if theta is not None:
        for module in network.modules():
            if isinstance(module, Projection):
                module.theta.fill_(theta)
        calibrate(network, images)
    with torch.no_grad():
        law = predict_rates(network)
    measured = measured_rates(network, images)
    assert law.keys() == measured.keys()
    layers = [abs(float(law[n].mean() - measured[n].mean())) for n in law]
    channels = [float((law[n] - measured[n]).abs().mean()) for n in law]
    assert sum(layers) / len(layers) < 0.02
    assert sum(channels) / len(channels) < 0.04


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("arguments", [{}, {"context": "isolated"}, {"learn_threshold": True, "learn_theta": True}])
def test_every_network_has_a_law_with_a_gradient(name, arguments):
    network = timm.create_model(name, num_classes=10, **arguments).train()
    rates = predict_rates(network, (3, 21, 30))
    assert rates.keys() == measured_rates(network.eval(), torch.randn(2, 3, 21, 30)).keys()
    assert all(((rate >= 0) & (rate <= 1)).all() for rate in rates.values())
    torch.stack([rate.mean() for rate in rates.values()]).mean().backward()
    moved = {n for n, p in network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert any(n.endswith("encoder1.norm.weight") for n in moved)
    assert any(n.endswith("decay.logit") for n in moved)
    assert any(n.endswith("level") for n in moved) == ("learn_threshold" in arguments)
    assert any(n.endswith("theta_logit") for n in moved) == ("learn_theta" in arguments)


@pytest.mark.parametrize("name", DIGITS)
def test_the_gradient_of_trained_networks_is_finite(name):
    network = zoo.load(name)
    torch.stack([rate.sum() for rate in predict_rates(network).values()]).sum().backward()
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert found
    assert all(bool(grad.isfinite().all()) for grad in found)


def test_its_gradient_is_its_derivative():
    network = Noise("dilated", "coupled")
    law = RateLaw(network, (1, 1, 1))
    for parameter in [network.norms[0].weight, network.norms[1].bias, network.membranes[1].decay.logit]:
        network.zero_grad()
        law()["spikes.1"].sum().backward()
        step = 1e-3
        with torch.no_grad():
            parameter[1] += step
            above = law()["spikes.1"].sum()
            parameter[1] -= 2 * step
            below = law()["spikes.1"].sum()
            parameter[1] += step
        assert float(parameter.grad[1]) == pytest.approx(float(above - below) / (2 * step), rel=0.02, abs=1e-4)


def converted():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return convert(network.eval(), torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model(DIGITS[0].split(".")[0], time_steps=2), "of one time step, not of 2"),
        (lambda: timm.create_model(DIGITS[0].split(".")[0], norm=False), "has no batch norm of its own"),
        (lambda: timm.create_model(DIGITS[0].split(".")[0], coding="bernoulli"), "BernoulliEncoder without batch norm"),
        (lambda: fold_batch_norm(timm.create_model(DIGITS[0].split(".")[0]).eval()), "ThresholdEncoder without"),
        (lambda: ann_twin(timm.create_model(DIGITS[0].split(".")[0])), "is a Rectifier, which has no spike rate"),
        (converted, "is a RectifierSpike without a batch norm of its own"),
        (lambda: timm.create_model("resnet18"), "ResNet has no layer of neurons"),
    ],
)
def test_what_it_does_not_know_is_refused_in_a_sentence(make, message):
    with pytest.raises(ConfigurationError, match=message):
        predict_rates(make(), (3, 32, 32))


def test_it_leaves_the_network_as_it_was_and_wants_a_size():
    network = timm.create_model(NETWORKS[0], num_classes=10).train()
    network.stem.eval()
    before = copy.deepcopy(network.state_dict())
    predict_rates(network, (3, 32, 32))
    assert network.training
    assert not network.stem.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ConfigurationError, match="input_size must be channels, height and width"):
        predict_rates(network, (32, 32))


@pytest.mark.parametrize("name", DIGITS)
def test_energy_of_measured_rates_is_that_which_is_counted(name):
    network, images = entry(name, 100)
    law, record = EnergyLaw(network), count_operations(network, images)
    rates = measured_rates(network, images)
    joules, accumulates = float(energy(record)), float(synaptic_operations(record)["accumulates"])
    assert float(law.joules(rates)) == pytest.approx(joules, rel=0.03)
    assert float(law.accumulates(rates)) == pytest.approx(accumulates, rel=0.05)
    assert 0.0 < float(law.rate(rates)) < 1.0
    everything = {n: torch.ones_like(r) for n, r in rates.items()}
    assert float(law.rate(everything)) == pytest.approx(1.0)
