import math

import pytest
import torch
from torch.autograd import gradcheck

from lightning_msnn.functional import PROJECTIONS

CLOSED_FORMS = {
    "sine": lambda a, b, c: 2 * math.sin(c * a * math.cos(c * b)),
    "mean": lambda a, b, c: (a + b) / 2,
    "tanh": lambda a, b, c: 2 * math.tanh(c * (a + b) / 2),
    "exponential": lambda a, b, c: math.copysign(2, a + b) * (1 - math.exp(-c * abs(a + b) / 2)),
    "polynomial": lambda a, b, c: (lambda y: y * (3 - y * y))(max(-1, min(1, c * (a + b) / 2))),
    "piecewise_linear": lambda a, b, c: max(-2, min(2, c * (a + b))),
    "none": lambda a, b, c: b,
}

BOUNDED = {"sine", "tanh", "exponential", "polynomial", "piecewise_linear"}

# Largest magnitude of the derivatives by a and b, for c = pi theta.
SLOPES = {
    "sine": lambda a, c: (2 * c, 2 * c * c * abs(a)),
    "mean": lambda a, c: (0.5, 0.5),
    "tanh": lambda a, c: (c, c),
    "exponential": lambda a, c: (c, c),
    "polynomial": lambda a, c: (1.5 * c, 1.5 * c),
    "piecewise_linear": lambda a, c: (c, c),
    "none": lambda a, c: (0.0, 1.0),
}

THETAS = [0.1, 0.25, 0.9]


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_closed_form(name, theta):
    a, b = 3 * torch.randn(2, 200, dtype=torch.float64)
    got = PROJECTIONS[name](a, b, torch.tensor(theta, dtype=torch.float64))
    expected = [CLOSED_FORMS[name](x, y, math.pi * theta) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_gradcheck(name):
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    theta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, b, t: PROJECTIONS[name](a, b, t) + 0 * t + 0 * a, (a, b, theta))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_range(name, theta):
    """Bounded ones stay in [-2, 2] for any finite input and come near the bound; the others pass it."""
    a, b = torch.cat([100 * torch.randn(2, 10_000), torch.randn(2, 10_000), torch.full((2, 1), 1e30)], 1)
    out = PROJECTIONS[name](a, b, torch.tensor(theta))
    assert out.isfinite().all()
    assert out.abs().max() > 1.9
    assert (out.abs().max() <= 2.0) == (name in BOUNDED)
    zero = torch.zeros(3)
    assert not PROJECTIONS[name](zero, zero, torch.tensor(theta)).any()
    narrow = PROJECTIONS[name](a.bfloat16(), b.bfloat16(), torch.tensor(theta))
    assert narrow.dtype == torch.bfloat16
    assert narrow.abs().max() <= 2.0 or name not in BOUNDED


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_derivative_bound(name, theta):
    """The bound holds everywhere, and is no larger than it must be."""
    grid = torch.linspace(-6, 6, 301, dtype=torch.float64)
    a, b = (g.flatten().requires_grad_() for g in torch.meshgrid(grid, grid, indexing="ij"))
    out = PROJECTIONS[name](a, b, torch.tensor(theta, dtype=torch.float64))
    by_a, by_b = torch.autograd.grad(out.sum(), (a, b), allow_unused=True)
    for index, grad in enumerate((by_a, by_b)):
        got = torch.zeros_like(a) if grad is None else grad.abs()
        bound = grid.new_tensor([SLOPES[name](x, math.pi * theta)[index] for x in grid.tolist()])
        bound = bound.repeat_interleave(len(grid))
        assert (got <= bound + 1e-9).all()
        if bound.max() > 0:
            assert (got / bound.clamp(min=1e-12)).max() > 0.98
