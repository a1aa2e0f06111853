"""Spike rates predicted from weights: against the formula, simulation and trained networks."""

import pytest
import timm
import torch
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.energy import OperationCounter, evenly, predict_rates
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Neuron, Spike
from lightning_msnn.zoo.verification import test_data as data_of
from tests.conftest import TINY

DIGITS = ["msnn_resnet12_tiny.digits", "msnn_vit12_tiny.digits", "msnn_rnn12_tiny.digits"]


def one_layer(channels, **options):
    network = nn.Sequential(nn.BatchNorm2d(channels, eps=0.0), Spike(Neuron(**options), channels)).eval()
    nn.init.normal_(network[0].weight)
    nn.init.normal_(network[0].bias)
    return network


@pytest.mark.parametrize("learn", [False, "channel"])
def test_the_tail_of_a_normal_distribution(learn):
    network = one_layer(6, threshold=0.2, learn_threshold=learn)
    norm = network[0].requires_grad_(False)
    expected = 1.0 - torch.distributions.Normal(norm.bias, norm.weight.abs()).cdf(torch.tensor(0.2))
    torch.testing.assert_close(predict_rates(network)["1"].float(), expected)


def test_counts_have_a_gamma_distribution():
    counts = torch.distributions.Gamma(torch.rand(12) + 0.3, torch.rand(12) + 0.5)
    network = one_layer(12)
    network[0].running_mean.copy_(counts.mean)
    network[0].running_var.copy_(counts.variance)
    with torch.no_grad():
        measured = network(counts.sample((100_000,))[..., None, None]).mean((0, 2, 3))
    assert (predict_rates(network)["1"] - measured).abs().max() < 0.01


def test_trained_networks():
    for name in DIGITS:
        network = zoo.load(name)
        images = torch.cat(list(evenly(data_of(name, None, 100), 100)))
        with torch.no_grad(), OperationCounter(network, operations=False) as counter:
            network(images)
        predicted, record = predict_rates(network), counter.record()
        measured = {n: fired.flatten(1).double().mean(1) / record.visits[n] for n, fired in record.fired.items()}
        assert predicted.keys() == measured.keys()
        layers = [abs(float(predicted[n].mean() - measured[n].mean())) for n in predicted]
        channels = [float((predicted[n] - measured[n]).abs().mean()) for n in predicted]
        assert sum(layers) / len(layers) < 0.02
        assert sum(channels) / len(channels) < 0.045


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model(TINY[0], norm=False), r"spike\d? has no batch norm with scale and shift"),
        (lambda: timm.create_model("resnet18"), "ResNet has no layer of neurons"),
    ],
)
def test_networks_without_norm_or_neurons_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        predict_rates(make())
