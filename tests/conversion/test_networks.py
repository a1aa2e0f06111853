"""Networks of timm's and torchvision's: the same at the start, spikes at the end, and all between."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision

from lightning_msnn.conversion import RectifierSpike, convert, revert, trace
from lightning_msnn.energy import count_operations
from lightning_msnn.models.baselines import calibrate
from lightning_msnn.nn import set_annealing
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import IntegerConv2d, to_integers
from tests.conftest import rest_is_slow

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def named(name, **arguments):
    return lambda: timm.create_model(name, num_classes=10, **arguments)


def of_torchvision(name):
    return lambda: getattr(torchvision, name)(num_classes=10)


# By name: its maker; the layers that receive spikes; the layers.
NETWORKS = {
    # All but stem and read-out, which follows the average over the map.
    "timm resnet18": (named("resnet18"), 17 + 3 - 1, 17 + 3 + 1),
    "timm resnet50": (named("resnet50"), 49 + 4 - 1, 49 + 4 + 1),
    "timm regnetx_002": (named("regnetx_002"), 13 * 3 + 4, 13 * 3 + 4 + 2),
    "timm densenet121": (named("densenet121"), 58 * 2 + 3, 58 * 2 + 3 + 2),
    # Seven of eight convolutions, also behind max pooling, and the second of the head, whose first is behind an average
    # where the map is smaller than its kernel.
    "timm vgg11_bn": (named("vgg11_bn"), 7 + 1, 8 + 3),
    # The depthwise convolution of each block and the one that follows; what goes into a block is a sum or linear.
    "timm mobilenetv2_100": (named("mobilenetv2_100"), 17 * 2, 1 + 2 + 16 * 3 + 2),
    # The depthwise convolution and, of squeeze-and-excitation, the second; its gate is a product that stays analogue.
    "timm efficientnet_b0": (named("efficientnet_b0"), 16 * 2, 1 + 4 + 15 * 5 + 2),
    # The second layer of each MLP.
    "timm convnext_femto": (named("convnext_femto"), 12, 1 + 12 * 3 + 3 + 1),
    "timm vit_tiny": (named("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), 2, 1 + 2 * 5 + 1),
    "torchvision resnet18": (of_torchvision("resnet18"), 17 + 3 - 1, 17 + 3 + 1),
    "torchvision vgg11_bn": (of_torchvision("vgg11_bn"), 7 + 2, 8 + 3),
    "torchvision vit": (lambda: torchvision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 2, 1 + 2 * 3 + 1),
}
SMALL = {name: named(name) for name in ("test_resnet", "test_efficientnet", "test_convnext")}
SMALL["test_vit"] = named("test_vit", img_size=32)
WHOLE = {**SMALL, **{name: make for name, (make, *_) in NETWORKS.items() if "vgg" not in name}}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_that_receive_spikes(name):
    make, spiking, layers = NETWORKS[name]
    with torch.device("meta"):
        plan = trace(make(), IMAGES)
    assert (len(plan.spiking), len(plan.rows)) == (spiking, layers)


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


def learn(model, steps=5):
    """Anneal a network to exact spikes; names of the neurons' parameters, and of those that had gradients."""
    neurons = {k: p for k, p in model.named_parameters() if ".neuron." in k}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    learnt = set()
    model.train()
    for step in range(steps):
        set_annealing(model, step / (steps - 1))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGES), torch.arange(4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.isfinite()
        learnt |= {key for key, p in neurons.items() if p.grad.abs().sum() > 0}
    set_annealing(model, None)
    return neurons.keys(), learnt


@pytest.mark.parametrize("name", rest_is_slow(WHOLE, SMALL))
def test_from_the_network_to_spikes(name):
    source = calibrate(WHOLE[name](), IMAGES).train()  # statistics as if it were trained
    read_out = [module for module in source.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(read_out.weight)  # some begin with zeros
    before = copy.deepcopy(source.state_dict())
    plan = trace(source, IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of activations that are no rectifiers
        model = convert(source, IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.modules())

    expected = outputs(source)
    assert torch.equal(outputs(model, 0.0), expected)
    assert torch.equal(outputs(revert(model)), expected)
    assert not torch.equal(outputs(model), expected)

    neurons, learnt = learn(model)
    assert {key for key in neurons if key.endswith("threshold")} <= learnt
    assert len(learnt) > 0.9 * len(neurons)  # a lambda has no gradient where, in so few steps, no neuron fires

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
        wanted = twice(IMAGES.double())
        torch.testing.assert_close(
            fold_batch_norm(twice)(IMAGES.double()), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max())
        )
    exact = {key: module for key, module in integers.named_modules() if isinstance(module, IntegerConv2d)}
    by_hand = ("Conv2d", "Linear")  # others pad more at one end
    assert len(exact) == sum(row.kind in by_hand for row in plan.spiking)
    for key, module in exact.items():
        weight = folded.get_submodule(key.removesuffix(".integer")).weight
        largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1)) / 127
        weight.data = torch.where(largest > 0, (weight / largest).round() * largest, 0.0)
        assert torch.equal(module.weight.view_as(weight), (weight / largest).nan_to_num().round())
        torch.testing.assert_close(integers.get_submodule(key.removesuffix(".integer")).weight, weight)
    with torch.no_grad():
        found, wanted = integers(IMAGES), folded(IMAGES)
    # Exact sums round otherwise, which flips a spike of one image at most.
    same = ((found - wanted).abs().amax(1) <= 1e-5 * wanted.abs().max()).sum()
    assert same >= len(IMAGES) - 1
