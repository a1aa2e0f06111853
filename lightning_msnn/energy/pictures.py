"""Pictures of what a network does: energy by layer, spike rate by layer, spike rates of the windows.

They are drawn from the plain values of :func:`lightning_msnn.energy.summarize`. A figure is made without matplotlib's
global state, so that it needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_msnn.energy.profiles import KINDS
from lightning_msnn.functional.windows import WINDOWS, Corners, Grid, cut_by, side, split
from lightning_msnn.functional.windows_1d import Interleaved, Pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_energy", "draw_spike_rates", "draw_windows", "new_figure", "png", "window_maps"]

MAX_BARS = 20
"""Bars that a picture of layers can hold and still be read."""

COLOURS = dict(zip(KINDS, ("#4477aa", "#cc6677", "#ddcc77", "#117733", "#999999", "#aa4499"), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a width and a height in inches, outside of matplotlib's global state."""
    from matplotlib.figure import Figure  # takes a second to import, which only pictures need

    return Figure(figsize=(width, height), layout="constrained")


def _bars(names: Sequence[str], label: str) -> tuple[Figure, Any]:
    """A figure for a horizontal bar for each name, the first on top, and its axes."""
    figure = new_figure(9.0, 0.24 * len(names) + 1.6)
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.set_ylabel("part, from input to output")
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _scale(largest: float) -> tuple[float, str]:
    """A unit of energy in which a value has digits before its point, and what to multiply joules by."""
    for factor, unit in ((1e3, "mJ"), (1e6, "µJ"), (1e9, "nJ")):
        if largest * factor >= 1.0:
            return factor, unit
    return 1e12, "pJ"


def _parts(layers: Sequence[str]) -> dict[str, list[str]]:
    """Put layers together under their parents, at the finest level that leaves at most ``MAX_BARS`` parts."""
    depth = max((name.count(".") + 1 for name in layers), default=1)
    while True:
        parts: dict[str, list[str]] = {}
        for name in layers:
            parts.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(parts) <= MAX_BARS or depth == 1:
            return parts
        depth -= 1


def draw_energy(summary: Mapping[str, Any]) -> Figure:
    """Draw which part of a network takes how much energy: a bar for each, stacked by kind of operation.

    Args:
        summary: Summary of a network.
    """
    layers = {name: layer["energy"] for name, layer in summary["layers"].items() if layer["energy"]}
    parts = {
        part: {kind: sum(layers[name].get(kind, 0.0) for name in names) for kind in KINDS}
        for part, names in _parts(list(layers)).items()
    }
    factor, unit = _scale(max((sum(energy.values()) for energy in parts.values()), default=0.0))
    figure, axes = _bars(list(parts), f"energy for one image ({unit})")
    left = [0.0] * len(parts)
    for kind in KINDS:
        values = [factor * energy[kind] for energy in parts.values()]
        if any(values):
            axes.barh(range(len(parts)), values, left=left, label=kind, color=COLOURS[kind])
            left = [a + b for a, b in zip(left, values, strict=True)]
    factor, unit = _scale(summary["energy"]["total"])
    source = summary["profile"]["source"].split(",")[0]
    axes.set_title(
        f"Where the energy goes: {factor * summary['energy']['total']:.3g} {unit} in all (figures: {source})"
    )
    if parts:
        figure.legend(title="kind of operation", loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_spike_rates(summary: Mapping[str, Any]) -> Figure:
    """Draw which layers fire more than others: in a row for each part of the network, its layers' rates and its own.

    Args:
        summary: Summary of a network.
    """
    layers = {n: layer for n, layer in summary["layers"].items() if layer["spike_rate"] is not None}
    parts = _parts(list(layers))
    figure, axes = _bars(list(parts), "spike rate (% of the neurons that fire)")
    means, points = [], []
    for row, names in enumerate(parts.values()):
        spikes, neurons = (sum(layers[n]["counts"].get(field, 0.0) for n in names) for field in ("spikes", "neurons"))
        means.append(100.0 * spikes / neurons)
        points += [(100.0 * layers[name]["spike_rate"], row) for name in names]
    if parts:
        axes.plot(*zip(*points, strict=True), "o", color=COLOURS["accumulates"], markersize=4, label="layer")
        axes.plot(means, range(len(parts)), "|", color="black", markersize=14, markeredgewidth=2, label="part")
        overall = 100.0 * summary["spike_rate"]
        axes.axvline(overall, color="black", linestyle="--", linewidth=1, label=f"all layers: {overall:.1f} %")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    axes.set_title(f"Which layers fire more than others, over {summary['samples']} images")
    return figure


def window_maps(model: nn.Module, fired: Mapping[str, Tensor], visits: Mapping[str, int]) -> dict[str, Any]:
    """Find the maps of spike rates of the neurons that visit windows, averaged over channels, if larger than a pixel.

    Args:
        model: The network.
        fired: How often each neuron fired, by layer.
        visits: How often each could have fired, by layer.

    Returns:
        By the name of the first layer of neurons in each module that has ``windows``: ``kind`` of the windows, whether
        they are ``isolated`` (the map is then the mean of the windows), and the ``rate``, float64 ``(H, W)``.
    """
    maps: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind = getattr(module, "windows", None)
        if not isinstance(kind, str) or kind not in WINDOWS:
            continue
        layers = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        layer = next((x for x in layers if x in fired and fired[x].dim() == 3), None)
        if layer is not None and max(fired[layer].shape[1:]) > 1:
            rate = fired[layer].double().mean(0) / max(1, visits[layer])
            maps[layer] = {"kind": kind, "isolated": bool(getattr(module, "isolated", False)), "rate": rate.cpu()}
    return maps


def draw_windows(maps: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw where on its map each block fires, with the windows' borders and mean rates.

    Args:
        maps: What :func:`window_maps` returns, at least one.
    """
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = new_figure(max(2.5 * columns + 0.9, 7.0), 2.7 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    largest = 100.0 * max(float(m["rate"].max()) for m in maps.values()) or 1.0
    for axes in grid.flat[len(maps) :]:
        axes.remove()
    for axes, (layer, one) in zip(grid.flat, maps.items(), strict=False):
        rate, kind = 100.0 * one["rate"], one["kind"]
        shape = "auto" if rate.shape[0] == 1 else "equal"  # a row would be too thin to see
        image = axes.imshow(rate.numpy(), vmin=0.0, vmax=largest, cmap="viridis", aspect=shape)
        height, width = rate.shape
        what = "mean of its windows" if one["isolated"] and kind != "single" else f"{kind} windows"
        parts = [] if one["isolated"] else split(rate[None, None], kind)
        if len(parts) > 1:
            _draw_borders(axes, kind, height, width)
            what += ": " + " ".join(f"{float(part.mean()):.0f}" for part in parts)
        axes.set_title(f"{layer.rsplit('.mixer', 1)[0]}, {height}x{width}\n{what}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(
        image, ax=list(grid.flat)[: len(maps)], label="spike rate (%), mean over channels and images", shrink=0.7
    )
    figure.suptitle("Where blocks fire: their first layers, and the mean rate (%) of each window")
    return figure


def _draw_borders(axes: Any, kind: str, height: int, width: int) -> None:
    """Draw the borders of windows that lie in the corners of a map or are pieces of a row."""
    cut = cut_by(kind, height)
    if isinstance(cut, Pieces) and not isinstance(cut, Interleaved):
        corners = [(0, start, height, cut.side(width)) for start in cut.starts(width)]
    elif isinstance(cut, Corners) and not isinstance(cut, Grid):
        h, w = side(kind, height), side(kind, width)
        corners = [(top, left, h, w) for top in (0, height - h) for left in (0, width - w)]
    else:
        return
    from matplotlib.patches import Rectangle

    for top, left, h, w in corners:
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), w, h, fill=False, color="white", linewidth=0.7, alpha=0.7))


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
