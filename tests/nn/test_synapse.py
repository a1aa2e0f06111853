"""Synapses' convolutions against torch's own, where they are matrix products and where they are not."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_msnn.kernels.convolution import small_convolution
from lightning_msnn.nn.synapse import CentredConv2d, PatchConv2d

KINDS = {
    "pointwise": lambda bias=True: CentredConv2d(6, 10, 1, bias),
    "patch": lambda bias=True: PatchConv2d(6, 10, bias),
    "centred": lambda bias=True: CentredConv2d(6, 10, 3, bias),
    "five": lambda bias=True: CentredConv2d(6, 10, 5, bias),
    "depthwise": lambda bias=True: CentredConv2d(6, 6, 3, bias, groups=6),
    "grouped": lambda bias=True: CentredConv2d(6, 10, 3, bias, groups=2),
    "grouped pointwise": lambda bias=True: CentredConv2d(6, 10, 1, bias, groups=2),
}
SIZES = [(1, 1), (1, 4), (5, 1), (2, 2), (2, 5), (3, 3), (4, 6), (7, 9)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # rounds sums on the way on AVX2


def twin(conv):
    """Torch's own convolution with the same parameters."""
    fresh = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    fresh.load_state_dict(conv.state_dict())
    return fresh.to(conv.weight.dtype)


def maps(*shape, dtype=torch.float32, order=torch.channels_last):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=order).requires_grad_()


def results(conv, x, upstream=None):
    """Output, and gradients of input and parameters."""
    out = conv(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, [x, *conv.parameters()], upstream)


def is_product(out):
    return out.grad_fn.name() != "ConvolutionBackward0"


def assert_close(got, wanted, tolerance):
    """All but a rounding of the largest value."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if b.numel():
            assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_convolution(kind, dtype):
    for i, size in enumerate(SIZES):
        ours = KINDS[kind](i % 2 == 0).to(dtype)
        exact = twin(ours).double()
        height, width = (side + side % 2 if kind == "patch" else side for side in size)
        for batch in (1, 33):
            x = maps(batch, 6, height, width, dtype=dtype)
            wanted = [each.to(dtype) for each in results(exact, x.detach().double().requires_grad_())]
            for order in (torch.channels_last, torch.contiguous_format):
                got = results(ours, x.detach().contiguous(memory_format=order).requires_grad_())
                assert_close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("kind", "batch", "size", "dtype", "expected"),
    [
        ("pointwise", 1, (8, 8), torch.bfloat16, True),
        ("pointwise", 1, (16, 16), torch.bfloat16, False),
        ("pointwise", 1, (2, 2), torch.float16, False),
        ("grouped pointwise", 33, (2, 2), torch.bfloat16, False),
        ("patch", 1, (24, 24), torch.bfloat16, True),
        ("patch", 1, (32, 32), torch.bfloat16, False),
        ("patch", 1, (3, 4), torch.float32, False),
        ("centred", 32, (6, 6), torch.bfloat16, True),
        ("centred", 31, (6, 6), torch.bfloat16, False),
        ("centred", 32, (1, 5), torch.float32, False),
        ("centred", 1, (1, 1), torch.float32, True),
        ("five", 32, (2, 2), torch.float32, False),
        ("depthwise", 32, (2, 3), torch.float32, True),
        ("depthwise", 32, (3, 3), torch.float32, False),
        ("grouped", 32, (2, 2), torch.float32, False),
    ],
)
def test_what_is_a_product_in_training(kind, batch, size, dtype, expected):
    conv = KINDS[kind]().to(dtype)
    x = maps(batch, 6, *size, dtype=dtype)
    assert is_product(conv(x)) == expected
    assert not is_product(conv(x.detach().contiguous().requires_grad_())) or size == (1, 1)  # any order of one pixel
    with FlopCounterMode(display=False):  # what watches operations sees a convolution
        assert not is_product(conv(x))
    assert not is_product(conv.eval()(x)), "evaluation does not depend on the number of images"


@pytest.mark.parametrize("size", [(2, 2), (20, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16_and_returns_gradients_in_float32(kind, size):
    ours = KINDS[kind]()
    theirs = twin(ours)
    x = maps(64, 6, *size)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = results(ours, x), results(theirs, x)
    assert [each.dtype for each in got] == [torch.bfloat16, *[torch.float32] * (len(got) - 1)]
    assert_close(got, wanted, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("size", [(2, 2), (3, 4)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_derivatives_of_a_small_convolution(size, depthwise):
    """The first and the second."""
    x = maps(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(3, 1 if depthwise else 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small_convolution, (x, weight, bias))
    assert torch.autograd.gradgradcheck(small_convolution, (x, weight, bias))
