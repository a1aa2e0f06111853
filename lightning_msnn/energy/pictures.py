"""Pictures of what a network does: energy by layer, spike rate by layer, spike rates of the windows.

They are drawn from the plain values of :func:`lightning_msnn.energy.summarize`. A figure is made without matplotlib's
global state, so that it needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_msnn.energy.profiles import KINDS
from lightning_msnn.functional.windows import WINDOWS, side, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_energy", "draw_spike_rates", "draw_windows", "png", "window_maps"]

MAX_BARS = 70
"""Bars that a picture of layers can hold and still be read."""

COLOURS = dict(zip(KINDS, ("#4477aa", "#cc6677", "#ddcc77", "#117733", "#999999", "#aa4499"), strict=True))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # takes a second to import, which only pictures need

    return Figure(figsize=(width, height), layout="constrained")


def _scale(largest: float) -> tuple[float, str]:
    """A unit of energy in which a value has digits before its point, and what to multiply joules by."""
    for factor, unit in ((1e3, "mJ"), (1e6, "µJ"), (1e9, "nJ")):
        if largest * factor >= 1.0:
            return factor, unit
    return 1e12, "pJ"


def draw_energy(summary: Mapping[str, Any]) -> Figure:
    """Draw the energy of each layer as a bar, stacked by kind of operation; of many layers, that of their parents.

    Args:
        summary: Summary of a network.
    """
    layers = _grouped({name: layer["energy"] for name, layer in summary["layers"].items() if layer["energy"]})
    figure = _figure(9.0, max(3.0, 0.17 * len(layers) + 1.4))
    axes = figure.subplots()
    factor, unit = _scale(max((sum(e.values()) for e in layers.values()), default=0.0))
    rows = range(len(layers))
    left = [0.0] * len(layers)
    for kind in KINDS:
        values = [factor * energy.get(kind, 0.0) for energy in layers.values()]
        if any(values):
            axes.barh(rows, values, left=left, label=kind, color=COLOURS[kind])
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(rows, list(layers), fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.set_xlabel(f"energy for one image ({unit})")
    axes.set_ylabel("layer, from input to output")
    factor, unit = _scale(summary["energy"]["total"])
    source = summary["profile"]["source"].split(",")[0]
    axes.set_title(f"Energy by layer: {factor * summary['energy']['total']:.3g} {unit} in all (figures: {source})")
    axes.grid(axis="x", alpha=0.3)
    if layers:
        figure.legend(title="kind of operation", loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _grouped(layers: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """Add up the energies of layers under one parent, at the finest level that leaves at most ``MAX_BARS``."""
    depth = max((name.count(".") + 1 for name in layers), default=1)
    while len(layers) > MAX_BARS and depth > 1:
        depth -= 1
        groups: dict[str, dict[str, float]] = {}
        for name, energy in layers.items():
            group = groups.setdefault(".".join(name.split(".")[:depth]), {})
            for kind, joules in energy.items():
                group[kind] = group.get(kind, 0.0) + joules
        layers = groups
    return layers


def draw_spike_rates(summary: Mapping[str, Any]) -> Figure:
    """Draw the spike rate of each layer of neurons as a bar, with the overall rate as a line.

    Args:
        summary: Summary of a network.
    """
    rates = {n: 100.0 * v["spike_rate"] for n, v in summary["layers"].items() if v["spike_rate"] is not None}
    figure = _figure(9.0, max(3.0, 0.17 * len(rates) + 1.4))
    axes = figure.subplots()
    axes.barh(range(len(rates)), list(rates.values()), color=COLOURS["accumulates"], label="layer")
    axes.set_yticks(range(len(rates)), list(rates), fontsize=7)
    axes.set_ylim(len(rates) - 0.4, -0.6)
    axes.set_xlabel("spike rate (% of the layer's neurons that fire)")
    axes.set_ylabel("layer of neurons, from input to output")
    if summary["spike_rate"] is not None:
        overall = 100.0 * summary["spike_rate"]
        axes.axvline(overall, color="black", linestyle="--", label=f"all layers: {overall:.1f} %")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.set_title(f"Spike rate by layer, over {summary['samples']} images")
    axes.grid(axis="x", alpha=0.3)
    return figure


def window_maps(model: nn.Module, fired: Mapping[str, Tensor], visits: Mapping[str, int]) -> dict[str, Any]:
    """Find the maps of spike rates of the neurons that visit windows, averaged over channels.

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
        if layer is not None:
            rate = fired[layer].double().mean(0) / max(1, visits[layer])
            maps[layer] = {"kind": kind, "isolated": bool(getattr(module, "isolated", False)), "rate": rate.cpu()}
    return maps


def draw_windows(maps: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the spike rate at each place of the map of each block, with the windows' borders and mean rates.

    Args:
        maps: What :func:`window_maps` returns.
    """
    columns = 4
    rows = max(1, -(-len(maps) // columns))
    figure = _figure(2.6 * columns, 2.9 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    largest = 100.0 * max((float(m["rate"].max()) for m in maps.values()), default=0.0) or 1.0
    image = None
    for axes, (layer, one) in zip(grid.flat, maps.items(), strict=False):
        rate, kind = 100.0 * one["rate"], one["kind"]
        image = axes.imshow(rate.numpy(), vmin=0.0, vmax=largest, cmap="viridis")
        height, width = rate.shape
        parts = split(rate[None, None], kind) if not one["isolated"] else [rate[None, None]]
        if len(parts) == 4:
            _mark_windows(axes, kind, height, width, [float(p.mean()) for p in parts])
        what = "mean of its windows" if one["isolated"] and kind != "single" else f"{kind} windows"
        axes.set_title(f"{layer.rsplit('.mixer', 1)[0]}\n{what}", fontsize=7)
        axes.set_xlabel("column (pixel of the map)", fontsize=6)
        axes.set_ylabel("row", fontsize=6)
        axes.tick_params(labelsize=6)
        axes.locator_params(integer=True)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=grid, label="spike rate (%), mean over channels and images", shrink=0.7)
    figure.suptitle("Where neurons fire: first layer of each block, with the mean rate (%) of each window")
    return figure


def _mark_windows(axes: Any, kind: str, height: int, width: int, rates: list[float]) -> None:
    """Draw the borders of four windows and write their mean rates into them; grid windows are all over the map."""
    if kind == "grid":
        _write(axes, (0.5, 0.93), " ".join(f"{r:.1f}" for r in rates))
        return
    h, w = side(kind, height), side(kind, width)
    for k, rate in enumerate(rates):
        top, left = (height - h) * (k // 2), (width - w) * (k % 2)
        for y in (top, top + h):
            axes.plot([left - 0.5, left + w - 0.5], [y - 0.5] * 2, color="white", linewidth=0.7, alpha=0.7)
        for x in (left, left + w):
            axes.plot([x - 0.5] * 2, [top - 0.5, top + h - 0.5], color="white", linewidth=0.7, alpha=0.7)
        place = (0.25, 0.75)[k % 2], (0.75, 0.25)[k // 2]
        _write(axes, place, f"{rate:.1f}")
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _write(axes: Any, place: tuple[float, float], text: str) -> None:
    """Write on a picture, readable on any colour; the place is in units of the axes."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=1.5, foreground="black")]
    axes.text(*place, text, transform=axes.transAxes, color="white", fontsize=7, ha="center", va="center",
              path_effects=outline)  # fmt: skip


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
