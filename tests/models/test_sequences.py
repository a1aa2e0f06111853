"""Networks on maps of one row, which are cut along it, and on maps that are cut in time alone."""

import pytest
import torch
from torch import nn

from lightning_msnn.energy import OperationCounter
from lightning_msnn.functional.windows_1d import TIME_WINDOWS
from lightning_msnn.nn import CONTEXTS, PatchMerging
from lightning_msnn.nn.folding import fold_batch_norm
from tests.conftest import COMPILED, SHALLOW, TINY
from tests.models.plain import PlainNetwork
from tests.models.test_plain_loop import gradients, uneven
from tests.models.test_registry import SMALL, lively, make

CASES = [("alternate", (1, 45)), ("dilated", (1, 45)), *((windows, (12, 38)) for windows in TIME_WINDOWS)]


@pytest.mark.parametrize(("windows", "size"), CASES)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_a_network_equals_a_plain_loop(name, context, windows, size):
    """Outputs and gradients, with each layer's own numbers; maps of the last stages are too small to cut."""
    model = uneven(make(name, context=context, windows=windows, tau=0.4, depths=(2, 1, 1, 1)))
    x, upstream = torch.randn(2, 3, *size).double(), torch.randn(2, 10).double()
    out, expected = model(x), PlainNetwork(model, 0.4, windows, context)([x])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(model, expected, upstream)
    torch.testing.assert_close(gradients(model, out, upstream), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("width", [2, 7, 12])
def test_patch_merging_of_a_row_is_that_of_a_padded_map(width):
    merging = PatchMerging(3, 5).double()
    x = torch.randn(4, 3, 1, width).double()
    padded = nn.functional.pad(x, [0, width % 2, 0, 1])
    expected = merging.norm(nn.functional.conv2d(padded, merging.conv.weight, stride=2))
    torch.testing.assert_close(merging(x), expected)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", COMPILED)
def test_export_folding_and_features(name, context):
    model = uneven(make(name, **SMALL, context=context))
    x = torch.randn(2, 3, 1, 45).double()
    out = model(x)
    torch.testing.assert_close(fold_batch_norm(model)(x), out)
    if context == "isolated":
        shallow = uneven(make(name, context=context, **SHALLOW))
        torch.testing.assert_close(torch.export.export(shallow, (x,)).module()(x), shallow(x))
    for kwargs in ({}, {"feature_cls": "fx"}):
        features = make(name, **SMALL, features_only=True, context=context, **kwargs)(x.float())
        assert [f.shape[2:] for f in features] == [(1, 23), (1, 12), (1, 6)]


# Counted by hand


def synapses_by_hand(model, x):
    """Accumulates and multiply-accumulates of a convolutional network on a row, place by place."""
    seen, widths, counts = {}, {}, {"accumulates": 0, "multiply_accumulates": 0}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0].detach()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    handles += [
        module.register_forward_pre_hook(lambda m, args, n=name: widths.update({f"{n}.conv": args[0].shape[3]}))
        for name, module in model.named_modules()
        if isinstance(module, PatchMerging)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for name, module in model.named_modules():
        if name not in seen:
            continue
        given, out = seen[name], module.weight.shape[0]
        if isinstance(module, nn.Linear):
            counts["multiply_accumulates"] += given.numel() * out
            continue
        reach, stride, length = module.kernel_size[1] // 2, module.stride[1], given.shape[3]
        for place in range(widths.get(name, length)):  # without the zeros that make it even
            if module.kernel_size == (2, 2):
                meets = 1  # a patch is seen once
            else:
                outputs = range(0, length, stride)
                meets = sum(abs(place - output) <= reach for output in outputs)
            values = given[:, :, 0, place]
            if "mixer" in name or "mlp" in name:
                counts["accumulates"] += int(values.sum()) * meets * out
            else:
                counts["multiply_accumulates"] += values.numel() * meets * out
    return counts


@pytest.mark.parametrize("length", [26, 45, 64])
def test_operations_of_a_sequence_are_those_counted_by_hand(length):
    model = lively(make("msnn_resnet12_tiny", **SMALL))
    x = torch.randn(3, 3, 1, length)
    with OperationCounter(model) as counter:
        model(x)
    record = counter.record()
    for field, number in synapses_by_hand(model, x).items():
        assert record.total(field) == number > 0, field
    updates = omegas = 0
    width = -(-length // 2)
    for stage, (depth, channels) in enumerate(zip(SMALL["depths"], SMALL["widths"], strict=True)):
        width = -(-width // 2) if stage else width
        for block in range(depth):
            quarter = -(-width // 4)
            side = max(3 * width // 8, quarter) if block % 2 and stage < 2 else quarter
            if width >= 4:  # else it is one window; three of four take something from the one before
                updates += 2 * 3 * side * channels * len(x)
                omegas += 3 * side * channels * len(x)
    assert record.total("membrane_updates") == updates > 0
    assert record.total("omega") == omegas > 0
