"""The fused scans equal the plain ones, outputs and gradients."""

import pytest
import torch

from lightning_msnn.functional import PROJECTIONS, coupled_scan, merge, recurrent_scan, scan, split
from lightning_msnn.functional.fused import (
    BATCH,
    batched_recurrent_scan,
    can_fuse,
    cut_windows,
    join_windows,
    merged_coupled_scan,
    merged_scan,
    scan_and_hand_on,
)

CASES = [("non_dilated", (8, 6)), ("non_dilated", (7, 5)), ("dilated", (8, 8)), ("dilated", (7, 10)), ("grid", (4, 6))]
CASES += [("dilated", (2, 3)), ("non_dilated", (3, 2)), (BATCH, (3, 4))]


def cut(x, kind):
    return list(x.chunk(4)) if kind == BATCH else split(x, kind)


def put(windows, kind, size):
    return torch.cat(windows) if kind == BATCH else merge(windows, kind, *size)


def leaves(kind, size, dtype, by_channel, layout):
    current1, current2 = torch.randn(2, 8, 3, *size, dtype=dtype)
    tau = torch.rand((3, 1, 1) if by_channel else (), dtype=dtype)
    theta = torch.tensor(0.3, dtype=dtype)
    maps = [x.to(memory_format=layout) for x in (current1, current2)]
    return [x.detach().clone().requires_grad_() for x in (*maps, tau, tau + 0.01, theta)]


def against_the_plain_scans(inputs, kind, size, projection):
    """Compare the fused scans in single precision with the plain ones in double precision, outputs and gradients.

    To 1e-5 of the largest value; gradients of parameters, sums over all places, to 5e-5.
    """
    omega = PROJECTIONS[projection]
    merged1, first = merged_scan(inputs[0], inputs[2], kind)
    merged2 = merged_coupled_scan(inputs[1], first, inputs[3], inputs[4], projection, kind)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    u1 = scan(cut(exact[0], kind), exact[2])
    u2 = coupled_scan(cut(exact[1], kind), u1, exact[3], lambda a, b: omega(a, b, exact[4]))
    got, expected = torch.cat([merged1, merged2]), torch.cat([put(u1, kind, size), put(u2, kind, size)])
    upstream = torch.randn_like(got)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(got, inputs, upstream, **options)
    wanted = torch.autograd.grad(expected, exact, upstream.double(), **options)
    for i, (a, b) in enumerate(zip((got, *gradients), (expected, *wanted), strict=True)):
        tolerance = (1e-5 if i < 3 else 5e-5) * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_equals_the_plain_scans(kind, size, projection, by_channel, layout):
    omega = PROJECTIONS[projection]
    inputs = leaves(kind, size, torch.float64, by_channel, layout)
    current1, current2, tau1, tau2, theta = inputs
    assert can_fuse(kind, *size)
    merged1, first = merged_scan(current1, tau1, kind)
    merged2 = merged_coupled_scan(current2, first, tau2, theta, projection, kind)
    got = torch.cat([merged1, merged2])

    u1 = scan(cut(current1, kind), tau1)
    u2 = coupled_scan(cut(current2, kind), u1, tau2, lambda a, b: omega(a, b, theta))
    expected = torch.cat([put(u1, kind, size), put(u2, kind, size)])
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, inputs, upstream, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(got, inputs, upstream, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", ["dilated", "grid", BATCH])
def test_backward_twice(kind, projection):
    """A backward pass leaves what the forward pass saved as it was."""
    inputs = leaves(kind, (8, 8), torch.float64, True, torch.channels_last)
    merged, first = merged_scan(inputs[0], inputs[2], kind)
    out = merged + merged_coupled_scan(inputs[1], first, inputs[3], inputs[4], projection, kind)
    once, twice = (
        torch.autograd.grad(out.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for _ in range(2)
    )
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_other_types(kind, size, dtype):
    """In float32 to 1e-5; in bf16 the decay, a float32 parameter, does not widen the membranes."""
    current1, current2, tau, _, theta = leaves(kind, size, torch.float32, True, torch.channels_last)
    merged1, first = merged_scan(current1.to(dtype), tau, kind)
    merged2 = merged_coupled_scan(current2.to(dtype), first, tau, theta, "sine", kind)
    assert merged1.dtype == merged2.dtype == dtype
    u1 = scan(cut(current1, kind), tau)
    u2 = coupled_scan(cut(current2, kind), u1, tau, lambda a, b: PROJECTIONS["sine"](a, b, theta))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged1.float(), put(u1, kind, size), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merged2.float(), put(u2, kind, size), rtol=tolerance, atol=tolerance)
    (merged1.sum() + merged2.sum()).backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in (current1, current2, tau, theta))


def test_keeps_what_it_was_given():
    current = torch.randn(2, 3, 8, 8)
    before = current.clone()
    for kind in ("non_dilated", "dilated", "grid"):
        merged_scan(current, torch.tensor(0.4), kind)
        assert torch.equal(current, before)


@pytest.mark.parametrize(("kind", "size"), [("single", (8, 8)), ("grid", (7, 8)), ("dilated", (1, 8))])
def test_what_cannot_be_fused(kind, size):
    assert not can_fuse(kind, *size)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_membranes_of_some_channels_are_handed_on(kind, size, projection, layout):
    """Layer 2 on a batch of windows, with what two of layer 1's three channels hand on, equals the plain scans."""
    omega = PROJECTIONS[projection]
    inputs = leaves(kind, size, torch.float64, True, layout)
    current1, _, tau1, tau2, theta = inputs
    h, w = cut(current1, kind)[0].shape[2:]
    current2 = torch.randn(8 if kind == BATCH else 32, 2, h, w, dtype=torch.float64).to(memory_format=layout)
    current2.requires_grad_()
    inputs = [current1, current2, tau1, tau2, theta]
    merged1, handed = scan_and_hand_on(current1, tau1, kind, 2)
    second = merged_coupled_scan(current2, handed, tau2[-2:], theta, projection, BATCH)
    got = [merged1, second if kind == BATCH else join_windows(second, kind, *size)]

    u1 = scan(cut(current1, kind), tau1)
    values = [u[:, -2:] for u in u1]
    u2 = coupled_scan(list(current2.chunk(4)), values, tau2[-2:], lambda a, b: omega(a, b, theta))
    expected = [put(u1, kind, size), put(u2, kind, size)]
    torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(x) for x in got]
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(expected, inputs, upstream, **options)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, upstream, **options), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_recurrent_scan_equals_the_plain_one(projection, by_channel, layout):
    omega = PROJECTIONS[projection]
    current, before, tau, _, theta = inputs = leaves(BATCH, (3, 4), torch.float64, by_channel, layout)
    got = batched_recurrent_scan(current, before, tau, theta, projection)
    expected = torch.cat(
        recurrent_scan(list(current.chunk(4)), list(before.chunk(4)), tau, lambda a, b: omega(a, b, theta))
    )
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    wanted = torch.autograd.grad(expected, inputs, upstream, **options)
    for _ in range(2):  # a backward pass leaves what the forward pass saved as it was
        torch.testing.assert_close(torch.autograd.grad(got, inputs, upstream, **options), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kind", "size"), CASES[:-1])
def test_cut_and_join(kind, size, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    windows, plain = cut_windows(x, kind), torch.cat(split(x, kind))
    assert torch.equal(windows, plain)
    upstream = torch.randn_like(windows)
    torch.testing.assert_close(
        torch.autograd.grad(windows, x, upstream, retain_graph=True), torch.autograd.grad(plain, x, upstream)
    )
    y = torch.randn_like(plain).requires_grad_()
    joined, expected = join_windows(y, kind, *size), merge(list(y.chunk(4)), kind, *size)
    torch.testing.assert_close(joined, expected)
    upstream = torch.randn_like(joined)
    torch.testing.assert_close(torch.autograd.grad(joined, y, upstream), torch.autograd.grad(expected, y, upstream))
    torch.testing.assert_close(join_windows(windows, kind, *size), x)
