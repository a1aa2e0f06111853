"""Networks of timm's and torchvision's: the same at the start, spikes at the end, and all between."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_msnn.conversion import RectifierSpike, convert, revert, trace
from lightning_msnn.energy import count_operations
from lightning_msnn.models.twins import calibrate
from lightning_msnn.nn import set_annealing
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import IntegerConv2d, to_integers
from tests.conversion.networks import IMAGES, NETWORKS


def converted(model, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of activations that are no rectifiers
        return convert(model, IMAGES, **arguments)


@torch.no_grad()
def outputs(model, share=None):
    """Outputs with the statistics of evaluation; with a share, as annealed in training."""
    model.eval()
    set_annealing(model, share)
    for module in model.modules():
        if isinstance(module, RectifierSpike):
            module.train(share is not None)
    out = model(IMAGES)
    set_annealing(model, None)
    return out


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_from_the_network_to_spikes(name):
    make, spiking, layers = NETWORKS[name]
    source = calibrate(make(), IMAGES).train()  # statistics as if it were trained
    read_out = [module for module in source.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(read_out.weight)  # some begin with zeros
    before = copy.deepcopy(source.state_dict())
    plan = trace(source, IMAGES)
    assert (len(plan.spiking), len(plan.rows)) == (spiking, layers)
    model = converted(source)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.modules())

    expected = outputs(source)
    assert torch.equal(outputs(model, 0.0), expected)
    assert torch.equal(outputs(revert(model)), expected)
    assert not torch.allclose(outputs(model), expected)

    neurons = {k: p for k, p in model.named_parameters() if ".neuron." in k}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    learnt = set()
    model.train()
    for step in range(10):
        set_annealing(model, step / 9)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGES), torch.arange(4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.isfinite()
        learnt |= {key for key, p in neurons.items() if p.grad.abs().sum() > 0}
    assert {key for key in neurons if key.endswith("threshold")} <= learnt
    assert len(learnt) > 0.9 * len(neurons)  # a lambda has no gradient where, in ten steps, no neuron fires

    set_annealing(model, None)
    record = count_operations(model.eval(), IMAGES)
    for row in plan.rows:
        counts = record.layer(row.layer)
        analogue = counts["accumulates"] == 0 < counts["multiply_accumulates"]
        binary = counts["multiply_accumulates"] == 0 < counts["dense"]
        assert binary if row.spiking else analogue, row.layer
    assert record.total("neurons") == 4 * sum(torch.Size(row.shape).numel() for row in plan.spiking)
    folded, integers = fold_batch_norm(model), to_integers(model)
    with torch.no_grad():  # in float64, where rounding flips no spike
        twice = copy.deepcopy(model).double()
        close(fold_batch_norm(twice)(IMAGES.double()), twice(IMAGES.double()), 1e-9)
    exact = {key: module for key, module in integers.named_modules() if isinstance(module, IntegerConv2d)}
    by_hand = ("Conv2d", "Linear")  # others pad more at one end
    assert len(exact) == sum(row.kind in by_hand for row in plan.spiking)
    for key, module in exact.items():
        weight = folded.get_submodule(key).weight
        largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1)) / 127
        weight.data = torch.where(largest > 0, (weight / largest).round() * largest, 0.0)
        assert torch.equal(module.weight.view_as(weight), (weight / largest).nan_to_num().round())
    with torch.no_grad():
        found, wanted = integers(IMAGES), folded(IMAGES)
    # Exact sums round otherwise, which flips a spike of one image at most.
    same = ((found - wanted).abs().amax(1) <= 1e-5 * wanted.abs().max()).sum()
    assert same >= len(IMAGES) - 1
