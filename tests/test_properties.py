"""Properties that hold for any input."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_msnn.data.sampling import ShardSampler, even_batch_size
from lightning_msnn.functional import PROJECTIONS, coupled_scan, recurrent_scan, scan
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import TINY

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


@settings(max_examples=20)
@given(images=st.integers(1, 40), classes=st.integers(2, 12), batch=st.integers(1, 16), seed=seeds)
def test_metrics_are_a_count(images: int, classes: int, batch: int, seed: int) -> None:
    """Whatever the batches, of which the last is smaller."""
    task = SpikingClassifier(num_classes=classes, network_kwargs={"depths": [1], "widths": [8]})
    task._begin()
    logits = noise(seed, images, classes, dtype=torch.float32)
    targets = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))
    for some, theirs in zip(logits.split(batch), targets.split(batch), strict=True):
        task.val_metrics.update(some, theirs)
        task.val_loss.update(torch.nn.functional.cross_entropy(some, theirs, reduction="none"))
    hits, best, loss = 0, 0, 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c: -row[c])
        hits += order[0] == target
        best += target in order[:5]
        loss += math.log(sum(math.exp(x) for x in row)) - row[target]
    got = task.val_metrics.compute()
    assert float(got["val/top1"]) == pytest.approx(hits / images, abs=1e-7)
    assert float(got["val/top5"]) == pytest.approx(best / images, abs=1e-7)
    assert float(task.val_loss.compute()) == pytest.approx(loss / images, rel=1e-5)


@given(images=st.integers(1, 300), processes=st.integers(1, 9), batch=st.integers(1, 70))
def test_processes_share_the_images_out(images: int, processes: int, batch: int) -> None:
    """Each image once, and as many batches for each process."""
    if images < processes:
        return
    dataset: Any = list(range(images))
    shares = [list(ShardSampler(dataset, processes, rank, False, 0)) for rank in range(processes)]
    assert sorted(index for share in shares for index in share) == dataset
    size = even_batch_size(batch, images, processes)
    assert size >= 1
    assert len({math.ceil(len(share) / size) for share in shares}) == 1


@pytest.fixture(scope="module", params=TINY)
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(request.param, num_classes=10).eval()
    return model


@settings(max_examples=8)
@given(order=st.permutations(range(6)), seed=seeds)
def test_the_order_of_a_batch_does_not_matter(network: torch.nn.Module, order: list[int], seed: int) -> None:
    x = noise(seed, 6, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(network(x[order]), network(x)[order])
