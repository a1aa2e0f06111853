import math

import pytest
import torch
from torch.autograd import gradcheck

from lightning_msnn.functional import PROJECTIONS

CLOSED_FORMS = {
    "sine": lambda a, b, t: 2 * math.sin(math.pi * t * a * math.cos(math.pi * t * b)),
    "mean": lambda a, b, t: (a + b) / 2,
}


@pytest.mark.parametrize("theta", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_closed_form(name, theta):
    a, b = torch.randn(2, 50, dtype=torch.float64)
    got = PROJECTIONS[name](a, b, torch.tensor(theta, dtype=torch.float64))
    expected = [CLOSED_FORMS[name](x, y, theta) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_gradcheck(name):
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, b, t: PROJECTIONS[name](a, b, t) + 0 * t, (a, b, theta))


def test_sine_is_bounded():
    a, b = 100 * torch.randn(2, 10_000)
    out = PROJECTIONS["sine"](a, b, torch.tensor(0.9))
    assert out.abs().max() <= 2.0
    assert out.abs().max() > 1.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_theta_does_not_widen_the_type(name, dtype):
    a, b = torch.randn(2, 5).to(dtype)
    assert PROJECTIONS[name](a, b, torch.tensor(0.25)).dtype == dtype
