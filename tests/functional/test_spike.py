import math

import pytest
import torch

from lightning_msnn.functional import SURROGATES, heaviside

CLOSED_FORMS = {
    "rectangular": lambda x: 1.0 if abs(x) < 0.5 else 0.0,
    "triangular": lambda x: max(0.0, 1.0 - abs(x)),
    "arctan": lambda x: 1.0 / (1.0 + (math.pi * x) ** 2),
    "sigmoid": lambda x: 1.0 / math.cosh(2.0 * x) ** 2,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SURROGATES)
def test_forward_is_the_exact_step(name, dtype):
    x = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    s = heaviside(x, SURROGATES[name])
    assert s.dtype == dtype
    assert s.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", SURROGATES)
def test_backward_is_the_closed_form(name):
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64).requires_grad_()
    upstream = torch.randn_like(x)
    heaviside(x, SURROGATES[name]).backward(upstream)
    expected = torch.tensor([CLOSED_FORMS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected * upstream, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SURROGATES)
def test_graded_spikes_count_thresholds_and_sum_their_surrogates(name):
    x = torch.linspace(-3, 5, 801, dtype=torch.float64).requires_grad_()
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    s = heaviside(x, SURROGATES[name], threshold, 4)
    assert s.tolist() == [min(max(math.floor(v / 0.7), 0), 4) for v in x.tolist()]
    slopes = torch.tensor([[CLOSED_FORMS[name](v - 0.7 * k) for v in x.tolist()] for k in range(1, 5)]).double()
    by_x, by_threshold = torch.autograd.grad(s, (x, threshold), upstream)
    torch.testing.assert_close(by_x, slopes.sum(0) * upstream, rtol=1e-6, atol=1e-6)
    expected = -(slopes * torch.arange(1.0, 5).view(-1, 1) * upstream).sum()
    torch.testing.assert_close(by_threshold, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_an_even_density(name):
    x = torch.linspace(-500, 500, 1_000_001, dtype=torch.float64)
    h = SURROGATES[name](x)
    assert (h >= 0).all()
    torch.testing.assert_close(h, h.flip(0))
    assert torch.trapezoid(h, x).item() == pytest.approx(1.0, abs=2e-3)
    assert h.max().item() == pytest.approx(1.0, abs=1e-9)
