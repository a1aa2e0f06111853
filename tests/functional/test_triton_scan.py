"""The Triton kernels equal the plain scans, outputs and gradients; by Triton's interpreter where there is no GPU."""

import pytest
import torch

from lightning_msnn.functional import PROJECTIONS, coupled_scan, eager_scan, fused, scan
from lightning_msnn.functional.fused import BATCH
from tests.functional.test_fused import CASES, cut, leaves, put

pytest.importorskip("triton", reason="Triton, which is there on Linux alone, is not installed")

from lightning_msnn.functional import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(monkeypatch):
    """The fused scans with the kernels of Triton, on whatever device."""
    monkeypatch.setattr(fused, "_kernels", lambda *_: triton_scan)


def both(inputs, kind, size, projection):
    """Outputs and gradients of the kernels, and of the plain scans in double precision."""
    omega = PROJECTIONS[projection]
    merged1, first = fused.merged_scan(inputs[0], inputs[2], kind)
    merged2 = fused.merged_coupled_scan(inputs[1], first, inputs[3], inputs[4], projection, kind)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    u1 = scan(cut(exact[0], kind), exact[2])
    u2 = coupled_scan(cut(exact[1], kind), u1, exact[3], lambda a, b: omega(a, b, exact[4]))
    got, expected = torch.cat([merged1, merged2]), torch.cat([put(u1, kind, size), put(u2, kind, size)])
    upstream = torch.randn_like(got)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(got, inputs, upstream, **options)
    wanted = torch.autograd.grad(expected, exact, upstream.double(), **options)
    return (got, *gradients), tuple(x.float() for x in (expected, *wanted))


def check(got, expected):
    """To 1e-5 of the largest value; gradients of parameters, sums over all places, to 5e-5."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = (1e-5 if i < 3 else 5e-5) * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def on_device(kind, size, by_channel, layout):
    made = leaves(kind, size, torch.float32, by_channel, layout)
    return [x.detach().to(DEVICE).requires_grad_() for x in made]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection(projection):
    assert projection in triton_scan.OMEGAS
    check(*both(on_device("grid", (4, 6), True, torch.channels_last), "grid", (4, 6), projection))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("layout", "by_channel"), [(torch.contiguous_format, False), (torch.channels_last, True)])
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_every_kind_of_windows(kind, size, layout, by_channel):
    check(*both(on_device(kind, size, by_channel, layout), kind, size, "sine"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["dilated", "grid", BATCH])
def test_several_tiles(kind):
    """More places and channels than a tile has, neither a multiple of it; memory orders that differ."""
    current1, current2 = torch.randn(2, 4, 70, 12, 12, device=DEVICE)
    inputs = [
        current1.contiguous(memory_format=torch.channels_last),
        current2,
        torch.rand(70, 1, 1, device=DEVICE),
        torch.rand(70, 1, 1, device=DEVICE),
        torch.tensor(0.3, device=DEVICE),
    ]
    check(*both([x.requires_grad_() for x in inputs], kind, (12, 12), "sine"))


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", triton_scan.DTYPES)
def test_chosen_on_cuda(dtype):
    assert fused._kernels(torch.empty(1, device=DEVICE, dtype=dtype)) is triton_scan
    assert fused._kernels(torch.empty(1, device=DEVICE, dtype=torch.float64)) is eager_scan


def test_not_chosen_on_the_cpu():
    assert fused._kernels(torch.empty(1)) is eager_scan
