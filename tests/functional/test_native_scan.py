"""The scans in C equal the plain ones, outputs and gradients, and are chosen where they can be."""

import pytest
import torch

from lightning_msnn.functional import PROJECTIONS, SURROGATES, eager_scan, fused, native_scan, recurrent_scan
from lightning_msnn.functional.fused import BATCH, batched_recurrent_scan, merged_coupled_scan, merged_scan
from lightning_msnn.functional.spike import heaviside
from tests.functional.test_fused import CASES, against_the_plain_scans, leaves

pytestmark = pytest.mark.skipif(not native_scan.available(), reason="no C compiler")
LAST = torch.channels_last


@pytest.fixture
def alone(monkeypatch):
    """The scans in C or an error."""
    for name in ("scan", "coupled", "recurrent"):
        monkeypatch.delattr(eager_scan, f"{name}_forward")
        monkeypatch.delattr(eager_scan, f"{name}_backward")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", ["dilated", "grid"])
def test_every_projection(projection, kind):
    assert projection in native_scan.OMEGAS
    against_the_plain_scans(leaves(kind, (4, 6), torch.float32, True, LAST), kind, (4, 6), projection)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_every_kind_of_windows(kind, size, by_channel):
    against_the_plain_scans(leaves(kind, size, torch.float32, by_channel, LAST), kind, size, "sine")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_map_that_travels(projection, by_channel):
    current, before, tau, _, theta = inputs = leaves(BATCH, (3, 4), torch.float32, by_channel, LAST)
    got = batched_recurrent_scan(current, before, tau, theta, projection)
    exact = [x.detach().double().requires_grad_() for x in (current, before, tau, theta)]
    omega = PROJECTIONS[projection]
    expected = torch.cat(
        recurrent_scan(list(exact[0].chunk(4)), list(exact[1].chunk(4)), exact[2], lambda a, b: omega(a, b, exact[3]))
    )
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(got)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(got, [*inputs[:3], theta], upstream, **options)
    wanted = torch.autograd.grad(expected, exact, upstream.double(), **options)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "size"), [(1, 70), (5, 24)])
def test_tasks(batch, size, threads):
    """Blocks of channels, which do not divide them, and threads that have several tasks or none."""
    inputs = [torch.randn(batch, 70, size, size).contiguous(memory_format=LAST) for _ in range(2)]
    inputs += [torch.rand(70, 1, 1), torch.rand(70, 1, 1), torch.tensor(0.3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        against_the_plain_scans([x.requires_grad_() for x in inputs], "dilated", (size, size), "sine")
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["dilated", "grid", BATCH])
def test_bf16_is_rounded_once(kind):
    """Membranes travel in float32: the result is that of float32, rounded to nearest."""
    inputs = [x.detach() for x in leaves(kind, (8, 8), torch.float32, True, LAST)]
    current = inputs[0].bfloat16()
    if fused.partitions(kind, 8, 8):
        assert torch.equal(
            merged_scan(current, inputs[2], kind)[0], merged_scan(current.float(), inputs[2], kind)[0].bfloat16()
        )
    # What layer 1's windows hold is rounded before layer 2 reads it.
    _, first = merged_scan(current, inputs[2], kind)
    got = merged_coupled_scan(current, first, *inputs[3:], "sine", kind)
    assert torch.equal(got, merged_coupled_scan(current.float(), first.float(), *inputs[3:], "sine", kind).bfloat16())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_for_any_number_of_threads(threads):
    inputs = [torch.randn(9, 48, 16, 16).contiguous(memory_format=LAST).requires_grad_() for _ in range(2)]
    inputs += [torch.rand(48, 1, 1).requires_grad_(), torch.tensor(0.3).requires_grad_()]

    def gradients():
        merged, first = merged_scan(inputs[0], inputs[2], "dilated")
        second = merged_coupled_scan(inputs[1], first, inputs[2], inputs[3], "sine", "dilated")
        return torch.autograd.grad((merged * second).sum(), inputs)

    before = torch.get_num_threads()
    expected = gradients()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(gradients(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", native_scan.DTYPES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_is_not_finite_stays_so(projection, dtype):
    """A loss must show it; and no finite membrane, however large, leaves the range of a bounded projection."""
    current = torch.randn(4, 3, 8, 8).to(dtype).contiguous(memory_format=LAST)
    current[0, 0, 0, 0] = float("nan")
    tau, theta = torch.tensor(0.5), torch.tensor(0.25)
    for kind in ("grid", "dilated"):
        merged, first = merged_scan(current, tau, kind)
        got = merged_coupled_scan(current, first, tau, theta, projection, kind)
        assert merged[0, 0].isnan().any()
        assert got[0, 0].isnan().any()
        assert got[1:].isfinite().all()
    huge = torch.full_like(current, 1e30)
    zero = torch.zeros_like(current)
    carried = merged_coupled_scan(zero, huge, tau, theta, projection, "grid")
    assert carried.isfinite().all()
    if projection not in ("mean", "none"):
        assert carried.abs().max() <= 0.5 * 2.0


@pytest.mark.parametrize("dtype", native_scan.DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_surrogate_in_one_pass(threshold, dtype):
    x = (3 * torch.randn(3, 5, 7, 90)).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    got = torch.autograd.grad(heaviside(x, threshold=threshold), x, upstream)[0]
    wanted = upstream.float() * SURROGATES["triangular"](x.detach().float() - threshold)
    torch.testing.assert_close(got.float(), wanted, atol=0 if dtype == torch.bfloat16 else 1e-6, rtol=2**-8)
    assert native_scan.triangular_backward(upstream, x.detach(), threshold) is not None
    odd = upstream.transpose(0, 3).contiguous().transpose(0, 3)
    assert native_scan.triangular_backward(odd, x.detach(), threshold) is None  # lies differently
    gaps = torch.zeros(4, 6, dtype=dtype)[:, ::2]
    assert native_scan.triangular_backward(gaps, gaps, threshold) is None
    nan = torch.full((3,), float("nan"), dtype=dtype)
    assert native_scan.triangular_backward(torch.ones_like(nan), nan, threshold).isnan().all()


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 3, 4, 4),
        torch.empty(2, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=LAST),
        torch.empty(2, 3, 4, 4, dtype=torch.float16).contiguous(memory_format=LAST),
        torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=LAST),
        torch.empty(0, 3, 4, 4).contiguous(memory_format=LAST),
        torch.empty(1),
    ],
    ids=["order", "float64", "float16", "meta", "empty", "axes"],
)
def test_what_is_left_to_torch(x):
    assert fused._kernels(x) is eager_scan


def test_chosen_for_channels_last():
    assert fused._kernels(torch.empty(2, 3, 4, 4).contiguous(memory_format=LAST)) is native_scan
    assert fused._kernels(torch.empty(2, 1, 4, 4, dtype=torch.bfloat16)) is native_scan


def test_gradients_that_lie_differently():
    """What reaches layer 1's windows from elsewhere may be in another order than the map."""
    current = torch.randn(2, 3, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    tau = torch.tensor(0.5)
    merged, windows = merged_scan(current, tau, "dilated")
    owed = torch.randn(windows.shape)  # channels first
    got = torch.autograd.grad((merged, windows), current, (torch.ones_like(merged), owed))[0]
    exact = current.detach().double().requires_grad_()
    merged, windows = merged_scan(exact, tau.double(), "dilated")
    wanted = torch.autograd.grad((merged, windows), exact, (torch.ones_like(merged), owed.double()))[0]
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_wrong_shapes_are_refused():
    """Before anything is read beyond its end."""
    x, tau, theta = torch.randn(4, 3, 8, 8).contiguous(memory_format=LAST), torch.tensor(0.5), torch.tensor(0.25)
    with pytest.raises(
        ValueError, match=r"membranes of layer 1 must have the shape \(4, 3, 8, 8\), not \(4, 2, 8, 8\)"
    ):
        merged_coupled_scan(x, x[:, :2], tau, theta, "sine", "grid")
    with pytest.raises(ValueError, match=r"membranes of layer 1 must have the shape \(3, 4, 3, 6, 6\)"):
        merged_coupled_scan(x, x, tau, theta, "sine", "dilated")
    with pytest.raises(ValueError, match="the map that was received must have the shape"):
        batched_recurrent_scan(x, x[:2], tau, theta, "sine")
    with pytest.raises(RuntimeError, match="size"):
        merged_scan(x, torch.rand(2, 1, 1), "grid")
    with pytest.raises(RuntimeError, match="size"):
        merged_coupled_scan(x, x, tau, torch.rand(2), "sine", "grid")
    with pytest.raises(RuntimeError, match="expected all tensors to be on the CPU, but tau is on meta"):
        merged_scan(x, torch.tensor(0.5, device="meta"), "grid")


def test_other_defaults_of_torch():
    current = torch.randn(4, 3, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    tau = torch.tensor(0.5, requires_grad=True)

    def gradients():
        return torch.autograd.grad(merged_scan(current, tau, "grid")[0].square().sum(), (current, tau))

    expected = gradients()
    torch.set_default_dtype(torch.float64)
    try:
        for a, b in zip(gradients(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_default_dtype(torch.float32)
