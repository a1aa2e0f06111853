import numpy as np
import pytest
import torch

from lightning_msnn.functional.windows_1d import TIME_WINDOWS

WIDTHS = [*range(4, 20), 63, 64, 65, 251]


def expected(kind, width):
    """Columns of each piece, by a plain count; None for a column of the padding."""
    quarter = int(np.ceil(width / 4))
    if kind == "time_grid":
        return [[c if c < width else None for c in range(k, 4 * quarter, 4)] for k in range(4)]
    side = quarter if kind == "time" else max(int(np.floor(width * 3 / 8)), quarter)
    return [list(range(start, start + side)) for start in (round(k * (width - side) / 3) for k in range(4))]


@pytest.mark.parametrize("kind", TIME_WINDOWS)
@pytest.mark.parametrize("height", [1, 5])
def test_pieces_are_plain_slices(kind, height):
    for width in WIDTHS:
        x = torch.randn(2, 3, height, width)
        windows = TIME_WINDOWS[kind].split(x)
        columns = expected(kind, width)
        assert TIME_WINDOWS[kind].count(height, width) == len(windows) == len(columns)
        assert {window.shape[3] for window in windows} == {TIME_WINDOWS[kind].side(width)}
        zeros = torch.zeros(2, 3, height)
        for window, seen in zip(windows, columns, strict=True):
            plain = torch.stack([zeros if c is None else x[..., c] for c in seen], 3)
            assert torch.equal(window, plain)
        assert {c for seen in columns for c in seen} - {None} == set(range(width)), "the pieces must cover the map"


@pytest.mark.parametrize("kind", TIME_WINDOWS)
def test_merge_is_the_mean_of_what_lies_on_a_column(kind):
    for width in WIDTHS:
        shape = (2, 3, 2, TIME_WINDOWS[kind].side(width))
        windows = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
        lying = [[] for _ in range(width)]
        for window, columns in zip(windows, expected(kind, width), strict=True):
            for place, column in enumerate(columns):
                if column is not None:
                    lying[column].append(window[..., place].numpy())
        plain = np.stack([np.mean(values, 0) for values in lying], 3)
        np.testing.assert_allclose(TIME_WINDOWS[kind].merge(windows, 2, width), plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", TIME_WINDOWS)
def test_short_maps_are_one_window(kind):
    assert [TIME_WINDOWS[kind].count(1, width) for width in range(1, 6)] == [1, 1, 1, 4, 4]
