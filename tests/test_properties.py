"""Properties that hold for any input."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_msnn.functional import PROJECTIONS, coupled_scan, recurrent_scan, scan

settings.register_profile("here", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("here")

seeds = st.integers(0, 2**32 - 1)
BOUNDED = sorted(set(PROJECTIONS) - {"mean", "none"})


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def omega_of(name: str, theta: float) -> Any:
    return lambda a, b: PROJECTIONS[name](a, b, torch.tensor(theta, dtype=torch.float64))


@given(name=st.sampled_from(sorted(PROJECTIONS)), theta=st.floats(0.01, 2.0), tau=st.floats(0.0, 1.0), seed=seeds)
def test_every_scan_is_its_loop(name: str, theta: float, tau: float, seed: int) -> None:
    """One neuron after the other, in plain Python."""
    currents, first = noise(seed, 4, 1, 2, 2, 2), noise(seed + 1, 4, 1, 2, 2, 2)
    decay = torch.tensor(tau, dtype=torch.float64)
    omega = omega_of(name, theta)

    def point(a: float, b: float) -> float:
        return float(omega(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)))

    got = {
        "scan": scan(list(currents), decay),
        "coupled": coupled_scan(list(currents), list(first), decay, omega),
        "recurrent": recurrent_scan(list(currents), list(first), decay, omega),
    }
    for index in np.ndindex(1, 2, 2, 2):
        i, m = ([float(x[k][index]) for k in range(4)] for x in (currents, first))
        u, v = [i[0]], [i[0]]
        for k in range(1, 4):
            u.append(i[k] + tau * u[k - 1])
            v.append(i[k] + tau * point(m[k - 1], v[k - 1]))
        w = [i[0] + tau * point(m[0], m[1])]
        w.append(i[1] + tau * point(w[0], m[1]))
        w.append(i[2] + tau * point(m[2], w[1]))
        w.append(i[3] + tau * point(m[3], w[2]))
        for key, expected in (("scan", u), ("coupled", v), ("recurrent", w)):
            assert [float(x[index]) for x in got[key]] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    name=st.sampled_from(BOUNDED),
    a=st.floats(-(2.0**120), 2.0**120, width=32),
    b=st.floats(-(2.0**120), 2.0**120, width=32),
    theta=st.floats(0.0, 8.0, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_bounded_projection_with_any_theta(name: str, a: float, b: float, theta: float, dtype: torch.dtype) -> None:
    out = PROJECTIONS[name](torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), torch.tensor(theta))
    assert -2.0 <= float(out) <= 2.0
