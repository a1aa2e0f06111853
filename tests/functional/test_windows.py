import itertools

import pytest
import torch
from torch.autograd import gradcheck

from lightning_msnn.functional import WINDOWS, count, merge, split
from lightning_msnn.functional.windows_1d import OF_ONE_ROW, TIME_WINDOWS

SIZES = list(itertools.product([1, 2, 3, 4, 5, 7, 8, 11], repeat=2))


@pytest.mark.parametrize("kind", WINDOWS)
def test_split_then_merge_is_the_identity(kind):
    for h, w in SIZES:
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        windows = split(x, kind)
        assert len(windows) == count(kind, h, w)
        assert len({tuple(part.shape) for part in windows}) == 1
        torch.testing.assert_close(merge(windows, kind, h, w), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", [k for k in WINDOWS if k != "single" and k not in TIME_WINDOWS])
def test_sides(kind):
    for h, w in SIZES:
        windows = split(torch.zeros(1, 1, h, w), kind)
        if h == 1 and w >= 4:
            assert len(windows) == 4
            assert windows[0].shape[2:] == (1, TIME_WINDOWS[OF_ONE_ROW[kind]].side(w))
        elif min(h, w) == 1:
            assert len(windows) == 1
            assert windows[0].shape[2:] == (h, w)
        else:
            assert windows[0].shape[2:] == (WINDOWS[kind].side(h), WINDOWS[kind].side(w))
    assert WINDOWS["dilated"].side(8) == 6
    assert WINDOWS["dilated"].side(10) == 7  # rounded down
    assert WINDOWS["dilated"].side(2) == 1
    assert WINDOWS["non_dilated"].side(8) == 4
    assert all(2 * WINDOWS[kind].side(n) >= n for n in range(2, 200)), "the windows must cover the map"


@pytest.mark.parametrize("kind", WINDOWS)
def test_merge_is_the_mean_where_windows_overlap(kind):
    """Against a count of windows per pixel, by brute force."""
    for h, w in [(8, 8), (7, 10), (5, 5), (6, 9)]:
        parts = [torch.randn_like(part) for part in split(torch.zeros(1, 2, h, w, dtype=torch.float64), kind)]
        index = split(torch.arange(1.0, h * w + 1).view(1, 1, h, w), kind)
        total, n = torch.zeros(2, h * w + 1, dtype=torch.float64), torch.zeros(h * w + 1, dtype=torch.float64)
        for part, where in zip(parts, index, strict=True):
            total.index_add_(1, where.flatten().long(), part.flatten(2)[0])
            n.index_add_(0, where.flatten().long(), torch.ones(where.numel(), dtype=torch.float64))
        expected = (total / n)[:, 1:].view(1, 2, h, w)
        torch.testing.assert_close(merge(parts, kind, h, w), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_gradcheck_of_merge(kind, size):
    parts = [torch.randn_like(p, requires_grad=True) for p in split(torch.zeros(1, 1, *size).double(), kind)]
    assert gradcheck(lambda *p: merge(list(p), kind, *size), parts)


@pytest.mark.parametrize("kind", OF_ONE_ROW)
def test_a_map_of_one_row_is_cut_along_it(kind):
    x = torch.randn(2, 3, 1, 21)
    windows = split(x, kind)
    assert all(torch.equal(a, b) for a, b in zip(windows, TIME_WINDOWS[OF_ONE_ROW[kind]].split(x), strict=True))
    assert count(kind, 1, 21) == 4
    assert count(kind, 21, 1) == 1
    torch.testing.assert_close(merge(windows, kind, 1, 21), x)
