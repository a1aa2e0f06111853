"""Pictures of what a network does: energy by layer, spike rate by layer, spike rates of the windows.

They show the plain values of :func:`lightning_msnn.energy.summarize`, outside of matplotlib's global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_msnn.energy.measures import Record, parts_of
from lightning_msnn.energy.profiles import KINDS
from lightning_msnn.functional.windows import WINDOWS, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_energy", "draw_spike_rates", "draw_windows", "new_figure", "png", "window_maps"]

COLOURS = dict(zip(KINDS, ("#4477aa", "#cc6677", "#ddcc77", "#117733", "#999999", "#aa4499"), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a width and a height in inches."""
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


def draw_energy(summary: Mapping[str, Any]) -> Figure:
    """Draw which part of a network takes how much energy, from its summary: a bar for each, stacked by kind."""
    layers = {name: layer["energy"] for name, layer in summary["layers"].items() if layer["energy"]}
    parts = {
        part: {kind: sum(layers[name].get(kind, 0.0) for name in names) for kind in KINDS}
        for part, names in parts_of(layers).items()
    }
    figure, axes = _bars(list(parts), "energy for one image (µJ)")
    left = [0.0] * len(parts)
    for kind in KINDS:
        values = [1e6 * energy[kind] for energy in parts.values()]
        if any(values):
            axes.barh(range(len(parts)), values, left=left, label=kind, color=COLOURS[kind])
            left = [a + b for a, b in zip(left, values, strict=True)]
    source = summary["profile"]["source"].split(",")[0]
    axes.set_title(f"Where the energy goes: {1e6 * summary['energy']['total']:.3g} µJ in all (figures: {source})")
    if parts:
        figure.legend(title="kind of operation", loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_spike_rates(summary: Mapping[str, Any]) -> Figure:
    """Draw which layers fire more than others, from a summary: its layers' rates and the mean of each part."""
    layers = {n: layer for n, layer in summary["layers"].items() if layer["spike_rate"] is not None}
    parts = parts_of(layers)
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


def window_maps(model: nn.Module, record: Record) -> dict[str, Any]:
    """Find the maps of spike rates of the neurons that visit windows, averaged over channels, if larger than a pixel.

    Args:
        model: The network.
        record: What it did.

    Returns:
        By the name of the first layer of neurons in each module that has ``windows``: ``kind`` of the windows, whether
        they are ``isolated`` (the map is then the mean of the windows), and the ``rate``, float64 ``(H, W)``.
    """
    maps: dict[str, Any] = {}
    fired = record.fired
    for name, module in model.named_modules():
        kind = getattr(module, "windows", None)
        if not isinstance(kind, str) or kind not in WINDOWS:
            continue
        layers = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        layer = next((x for x in layers if x in fired and fired[x].dim() == 3), None)
        if layer is not None and max(fired[layer].shape[1:]) > 1:
            rate = fired[layer].double().mean(0) / max(1, record.visits[layer])
            maps[layer] = {"kind": kind, "isolated": bool(getattr(module, "isolated", False)), "rate": rate.cpu()}
    return maps


def draw_windows(maps: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw :func:`window_maps`, at least one: where each block fires, and the mean rate of each window."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = new_figure(max(2.5 * columns + 0.9, 7.0), 2.7 * rows + 0.5)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    largest = 100.0 * max(float(m["rate"].max()) for m in maps.values()) or 1.0
    for axes in grid[len(maps) :]:
        axes.remove()
    for axes, (layer, one) in zip(grid, maps.items(), strict=False):
        rate, kind = 100.0 * one["rate"], one["kind"]
        height, width = rate.shape
        aspect = "auto" if height == 1 else "equal"  # a row would be too thin to see
        image = axes.imshow(rate.numpy(), vmin=0.0, vmax=largest, cmap="viridis", aspect=aspect)
        means = " ".join(f"{float(window.mean()):.0f}" for window in split(rate[None, None], kind))
        what = "mean of its windows" if one["isolated"] else f"{kind} windows: {means}"
        axes.set_title(f"{layer.rsplit('.mixer', 1)[0]}, {height}x{width}\n{what}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    label = "spike rate (%), mean over channels and images"
    figure.colorbar(image, ax=grid[: len(maps)], label=label, shrink=0.7)
    figure.suptitle("Where blocks fire: their first layers, and the mean rate (%) of each window")
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
