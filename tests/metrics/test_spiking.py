"""The metrics: values by hand, any batch split, two processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_msnn.energy import (
    count_operations,
    energy,
    saturated_neurons,
    silent_neurons,
    spike_rate,
    synaptic_operations,
)
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.metrics import Energy, SpikeRate, SynapticOperations, Total
from lightning_msnn.nn import Neuron, Spike


def small():
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Spike(Neuron(threshold=0.1)), nn.Flatten(), nn.Linear(64, 3))
        .double()
        .eval()
    )


def images(n=12):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_by_hand():
    model = nn.Sequential(nn.Identity(), Spike(Neuron(threshold=0.5)))
    x = torch.tensor([[0.9, 0.1, 0.9, 0.1], [0.9, 0.1, 0.1, 0.1]])
    record = count_operations(model, x)
    assert spike_rate(record) == 3 / 8
    assert spike_rate(record, by="layer") == {"1": 3 / 8}
    assert silent_neurons(record) == 2 / 4
    assert saturated_neurons(record) == 1 / 4
    assert energy(record) == pytest.approx(4 * 0.9e-12)
    assert energy(record, by="layer") == {"1": pytest.approx(4 * 0.9e-12)}
    assert energy(record, by="kind")["membranes"] == pytest.approx(4 * 0.9e-12)
    assert not any(synaptic_operations(record).values())


def metrics(model, example):
    return {
        "rate": SpikeRate(model),
        "rate by layer": SpikeRate(model, by="layer"),
        "operations": SynapticOperations(model),
        "energy": Energy(model),
        "energy by kind": Energy(model, profile="lemaire", by="kind", skip_zeros=True),
        "sum": Total(example),
    }


def evaluate(parts):
    """Values of all metrics after updates with the parts."""
    model = small()
    every = metrics(model, count_operations(model, images(1)))
    for part in parts:
        record = count_operations(model, part)
        for metric in every.values():
            metric.update(record)
    values = {name: metric.compute() for name, metric in every.items()}
    total = values.pop("sum")
    return values | {"silent": silent_neurons(total), "saturated": saturated_neurons(total)}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def test_classes_agree_with_functions_whatever_the_batches():
    record = count_operations(small(), images())
    expected = {
        "rate": spike_rate(record),
        "rate by layer": spike_rate(record, by="layer"),
        "operations": synaptic_operations(record),
        "energy": energy(record),
        "energy by kind": energy(record, "lemaire", skip_zeros=True, by="kind"),
        "silent": silent_neurons(record),
        "saturated": saturated_neurons(record),
    }
    assert 0 < expected["rate"] < 1
    for sizes in ([12], [3, 4, 5]):
        values = evaluate(images().split(sizes))
        assert all(equal(values[name], value) for name, value in expected.items())


def process(rank, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Shares of different size: a mean of means would differ.
    torch.save(evaluate(images().split([5, 3, 4])[rank : 1 + 2 * rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = evaluate([images()])
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            assert equal(value, values[name]), name


def test_without_neurons():
    record = count_operations(nn.Linear(2, 2), torch.ones(1, 2) * 0.5)
    assert math.isnan(spike_rate(record))
    assert spike_rate(record, by="layer") == {}
    assert math.isnan(silent_neurons(record))
    assert energy(record) == pytest.approx(4 * 4.6e-12)


def test_wrong_use_is_refused():
    record = count_operations(small(), images())
    with pytest.raises(ConfigurationError, match="another network"):
        Energy(nn.Linear(2, 2)).update(record)
    with pytest.raises(ConfigurationError, match="one size"):
        Total(count_operations(small()[:2], torch.rand(1, 1, 8, 8).double())).update(record)
    with pytest.raises(ConfigurationError, match="division of a metric 'layers'.*did you mean 'layer'"):
        SpikeRate(small(), by="layers")
    with pytest.raises(ConfigurationError, match="field 'acs'"):
        record.total("acs")
