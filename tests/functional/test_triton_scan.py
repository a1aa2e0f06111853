"""The Triton kernels equal the plain scans, outputs and gradients; by Triton's interpreter where there is no GPU."""

import pytest
import torch

from lightning_msnn.functional import PROJECTIONS, eager_scan, fused, native_scan
from lightning_msnn.functional.fused import BATCH
from tests.functional.test_fused import CASES, against_the_plain_scans, leaves

pytest.importorskip("triton", reason="Triton, which is there on Linux alone, is not installed")

from lightning_msnn.functional import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(monkeypatch):
    """The fused scans with the kernels of Triton, on whatever device."""
    monkeypatch.setattr(fused, "_kernels", lambda *_: triton_scan)


def on_device(kind, size, by_channel, layout):
    made = leaves(kind, size, torch.float32, by_channel, layout)
    return [x.detach().to(DEVICE).requires_grad_() for x in made]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection(projection):
    assert projection in triton_scan.OMEGAS
    against_the_plain_scans(on_device("grid", (4, 6), True, torch.channels_last), "grid", (4, 6), projection)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("layout", "by_channel"), [(torch.contiguous_format, False), (torch.channels_last, True)])
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_every_kind_of_windows(kind, size, layout, by_channel):
    against_the_plain_scans(on_device(kind, size, by_channel, layout), kind, size, "sine")


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
    against_the_plain_scans([x.requires_grad_() for x in inputs], kind, (12, 12), "sine")


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", triton_scan.DTYPES)
def test_chosen_on_cuda(dtype):
    assert fused._kernels(torch.empty(1, device=DEVICE, dtype=dtype)) is triton_scan
    assert fused._kernels(torch.empty(1, device=DEVICE, dtype=torch.float64)) is eager_scan


def test_not_chosen_on_the_cpu():
    assert fused._kernels(torch.empty(2, 3, 4, 4)) in (eager_scan, native_scan)
