"""Agreement with other counters: NeuroBench's effective accumulates and SpikingJelly's ``SynOpCounter``.

Both are asked about the same networks on spikes, with no weight at zero, since they skip those. Where a rule of theirs
differs from ours by design, the test states it and the difference.
"""

import copy

import pytest
import timm
import torch
from torch import nn

from lightning_msnn.energy import OperationCounter, count_operations
from lightning_msnn.energy.profiles import COLUMN
from tests.conftest import DISTINCT, TINY
from tests.models import test_graded as graded
from tests.models.test_registry import lively

SIZES = [16, 48]


def network(name):
    """A network that fires, no weight of which is zero."""
    model = lively(timm.create_model(name, num_classes=10), 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-3
    return model


def binary_image(size):
    return (torch.rand(1, 3, size, size) < 0.3).float()


def spikingjelly(model, x):
    counting = pytest.importorskip("spikingjelly.activation_based.op_counter")
    counter = counting.SynOpCounter()
    with torch.no_grad(), counting.DispatchCounterMode([counter]):
        model(x)
    return counter.get_total()


def neurobench(model, x):
    """NeuroBench's effective accumulates of the convolutions and linear layers, by the name of the layer."""
    macs = pytest.importorskip("neurobench.metrics.utils.layers")
    seen, handles = {}, []

    def watch(name):
        def hook(module, inputs):
            seen.setdefault(name, []).append((module, inputs[0].detach().clone()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(watch(name)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    counts = {}
    for name, calls in seen.items():
        for module, inputs in calls:
            alone = copy.copy(module)  # they copy a layer with all that its hooks hold: the whole network
            alone._forward_hooks, alone._forward_pre_hooks = {}, {}
            operations, spiking = macs.single_layer_MACs(inputs, alone)
            counts[name] = counts.get(name, 0) + (operations if spiking else 0)
    return counts


def recurrent(model):
    return [n for n, m in model.named_modules() if any("weight_hh" in p for p, _ in m.named_parameters(recurse=False))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DISTINCT)
def test_spikingjelly_to_the_unit(name, size):
    model, x = network(name), binary_image(size)
    record = count_operations(model, x)
    ours = record.total("accumulates")
    # Their counter knows convolutions and products of matrices, not what a recurrent layer is made of: the difference
    # is the input product of those layers, which is accumulates on spikes.
    missing = sum(record.layer(layer)["accumulates"] for layer in recurrent(model))
    assert bool(missing) == bool(recurrent(model))
    # They judge a tensor, we judge each sample, window and head, so that counts do not depend on the batch: scores of
    # one head that happen to be 0 and 1 alone are spikes to us, and meet the spikes of the values in fewer places.
    apart = 0.001 * ours if "vit" in name else 0
    assert 0 < spikingjelly(model, x) == pytest.approx(ours - missing, rel=0, abs=apart)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DISTINCT)
def test_neurobench_to_the_unit(name, size):
    model, x = network(name), binary_image(size)
    with OperationCounter(model) as counter:  # of the same pass: in wide sums another may round to another spike
        theirs = neurobench(model, x)
    record = counter.record()
    column = COLUMN["accumulates"]
    ours = {layer: int(row[column]) for layer, row in zip(record.layers, record.counts, strict=True)}
    assert {layer: ours[layer] for layer in theirs} == theirs
    # They hook modules that are layers: products of spikes in attention and recurrent layers are not among them.
    others = {layer for layer, n in ours.items() if n and layer not in theirs}
    mixers = {n for n, m in model.named_modules() if type(m).__name__ == "AttentionMixer"}
    assert others == mixers | set(recurrent(model))


@pytest.mark.parametrize("name", TINY)
def test_graded_spikes_are_binary_steps(name):
    """Their counts of a network that is sent each level as a binary step of its own."""
    model, x = graded.network(name), binary_image(16).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1 / 1024
    record, steps = count_operations(model, x), graded.unrolled(model)
    theirs = {layer.removesuffix(".synapse"): found for layer, found in neurobench(steps, x).items()}
    layers = [layer for layer in theirs if layer in record.layers]
    assert len(layers) >= 10
    assert {layer: record.layer(layer)["accumulates"] for layer in layers} == {layer: theirs[layer] for layer in layers}
    assert record.total("graded_products") < record.total("accumulates")
    if name == "msnn_resnet12_tiny":  # the others have products of spikes that are not unrolled
        assert record.total("accumulates") == spikingjelly(steps, x)


def test_where_a_zero_weight_or_an_analogue_sample_tells_them_apart():
    """By design: a weight of zero is a weight to us, none to NeuroBench; SpikingJelly judges a batch as a whole."""
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[0] = 0.0
    x = binary_image(16)
    ours = count_operations(conv, x).total("accumulates")
    assert neurobench(nn.Sequential(conv), x) == {"0": ours * 3 // 4}
    assert spikingjelly(conv, x) == ours
    mixed = torch.cat([x, x * 0.5])
    assert count_operations(conv, mixed).total("accumulates") == ours
    assert spikingjelly(conv, mixed) == 0
