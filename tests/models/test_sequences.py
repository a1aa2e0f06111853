"""Networks on maps of one row, which are cut along it; tests/models/test_plain_loop.py compares what they compute."""

import pytest
import torch

from lightning_msnn.energy import count_operations
from lightning_msnn.nn import CONTEXTS
from lightning_msnn.nn.folding import fold_batch_norm
from tests.conftest import COMPILED, SHALLOW
from tests.models.test_plain_loop import uneven
from tests.models.test_registry import SMALL, lively, make


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


@pytest.mark.parametrize("length", [26, 45, 64])
def test_membranes_of_a_sequence_are_those_counted_by_hand(length):
    x = torch.randn(3, 3, 1, length)
    record = count_operations(lively(make("msnn_resnet12_tiny", **SMALL)), x)
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
