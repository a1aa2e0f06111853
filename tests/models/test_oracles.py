"""Whole networks equal the method as the paper writes it."""

import pytest
import timm
import torch

from benchmarks.published import publish
from lightning_msnn.models.twins import calibrate
from tests.conftest import TINY


@pytest.mark.parametrize("windows", ["alternate", "alternate_grid"])
@pytest.mark.parametrize("name", TINY)
def test_isolated_windows_equal_the_published_loop(name, windows):
    fast = timm.create_model(name, num_classes=5, context="isolated", windows=windows, tau=0.4)
    calibrate(fast, torch.randn(16, 3, 32, 32))
    slow = publish(fast)
    x = torch.randn(2, 3, 32, 32)
    a, b = fast(x), slow(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(a)
    got = torch.autograd.grad(a, list(fast.parameters()), upstream)
    wanted = torch.autograd.grad(b, list(slow.parameters()), upstream)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
