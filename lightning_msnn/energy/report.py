"""The report: what a network does and costs beside its twins, as one HTML page.

The page is one file: pictures are inside, nothing is loaded from elsewhere, and it needs no script.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn.energy.counting import OperationCounter, Record
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, TRANSCENDENTAL, profile
from lightning_msnn.energy.summary import NETWORK, comparison_rows, summarize

__all__ = ["compare", "page"]

_RULES = (
    "A synaptic operation is an input that meets a weight; borders, stride, dilation and groups are exact, and padding "
    "counts nothing.",
    "If a sample's whole input of a layer is 0 or 1, each of its spikes that meets a weight is an accumulate (AC). "
    "Else each of its values, zero or not, that meets a weight is a multiply-accumulate (MAC); those that are not zero "
    "are given beside it, for hardware that skips zeros.",
    "A product of two activations, as in attention, is an accumulate if one of them is all 0 or 1: where two spikes "
    "meet if both are, else once for each spike and each value that it meets.",
    "Batch norm is folded into what is beside it, and a bias is where an accumulator starts: neither counts.",
    "A membrane update is tau u + I and costs a MAC; a comparison with a threshold costs an addition; Omega costs a "
    f"MAC for each elementary operation of its function, of which a sine has {TRANSCENDENTAL}.",
    "The ANN twin is the same topology with ReLU and without windows; the SNN twin has plain LIF neurons over four "
    "time steps. Both have this network's weights, with the statistics of their batch norms taken from the first batch "
    "of images; neither was trained by itself.",
)

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: pre-wrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; margin: .5rem 0 } details { margin: 1rem 0 } .total td { font-weight: 600 }
"""


def compare(
    network: nn.Module, twins: Callable[[Tensor], dict[str, nn.Module]], batches: Iterable[Tensor], samples: int
) -> tuple[dict[str, Record], dict[str, nn.Module]]:
    """Count what a network and its twins do for the same images.

    Args:
        network: The network, in eval mode.
        twins: Returns its twins by name, given the first batch.
        batches: Batches of images as the network takes them.
        samples: Images to count; more are counted if a batch has more.

    Returns:
        Records and networks by the title of their column, the network's own first.
    """
    counters: dict[str, OperationCounter] = {}
    with torch.no_grad():
        for images in batches:
            if not counters:
                networks = {NETWORK: network, **twins(images)}
                counters = {name: OperationCounter(each).__enter__() for name, each in networks.items()}
            for counter in counters.values():
                counter.model(images)
            if counters[NETWORK].samples >= samples:
                break
    for counter in counters.values():
        counter.__exit__(None, None, None)
    return {name: c.record() for name, c in counters.items()}, {name: c.model for name, c in counters.items()}


def _table(rows: Sequence[Sequence[str]], caption: str, total: str = "") -> str:
    """An HTML table whose first row is its head; rows that begin with ``total`` are set in bold."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr{' class=total' if total and row[0] == total else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for row in rows[1:]
    )
    caption = f"<caption>{escape(caption)}</caption>"
    return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"


def _joules(cell: dict[str, Any]) -> str:
    """An energy under a profile; a sum without operations for which the profile has no figure is a lower bound."""
    if not cell["without_figure"]:
        return f"{cell['joules'] * 1e6:.4g} µJ"
    return f"> {cell['joules'] * 1e6:.4g} µJ" if cell["joules"] > 0 else "no figure"


def _picture(content: bytes, title: str) -> str:
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">\n'


def page(name: str, data_set: str, records: dict[str, Record], network: nn.Module, on: str = DEFAULT_PROFILE) -> str:
    """Compose the page.

    Args:
        name: Name of the network.
        data_set: Name of the data set that the images are from.
        records: What the network and its twins did, by the title of their column, the network's own first.
        network: The network.
        on: Energy profile.

    Returns:
        HTML.
    """
    columns = {column: summarize(record, on) for column, record in records.items()}
    record, summary, hardware = records[NETWORK], columns[NETWORK], profile(on)
    comparison = [tuple(cell.replace("uJ", "µJ") for cell in row) for row in comparison_rows(columns)]
    profiles: list[Sequence[str]] = [("profile", *columns, "without a figure, and not in the sum")]
    for other in PROFILES:
        cells = [c["profiles"][other] for c in columns.values()]
        missing = sorted({field.replace("_", " ") for cell in cells for field in cell["without_figure"]})
        profiles.append((other, *(_joules(cell) for cell in cells), ", ".join(missing) or "-"))
    prices = [("operation", "price", "where in the source")]
    prices += [(k, f"{v:.4g} pJ", hardware.sources.get(k, "")) for k, v in hardware.prices.items()]
    layers: list[Sequence[str]] = [("layer", "parameters", *KINDS, "spike rate", "accumulates", "multiply-accumulates")]
    for layer, row in summary["layers"].items():
        rate = row["spike_rate"]
        layers.append(
            (
                layer,
                f"{row['parameters']:,}",
                *(f"{row['energy'].get(kind, 0.0) * 1e9:.4g} nJ" for kind in KINDS),
                "-" if rate is None else f"{100 * rate:.1f} %",
                *(f"{row['counts'].get(n, 0.0):,.0f}" for n in ("accumulates", "multiply_accumulates")),
            )
        )
    maps = window_maps(network, record.fired, record.visits)
    every = [
        f"{column}: {operation} ({n} calls)" for column, c in columns.items() for operation, n in c["uncounted"].items()
    ]
    parts = [
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(name)}: operations and energy</title>"
        f"<style>{_STYLE}</style></head><body>\n",
        f"<h1>{escape(name)}: operations and energy</h1>\n"
        f"<p>Counted on {record.samples} test images of {escape(data_set)}. All numbers are means for one image.</p>\n",
        _table(comparison, f"This network beside its twins. Energies: {hardware.source}", "energy"),
        "<h2>Energy</h2>\n",
        _picture(png(draw_energy(summary)), "energy by layer"),
        _table(profiles, "The same counts under every energy profile"),
        "<h2>Spikes</h2>\n",
        _picture(png(draw_spike_rates(summary)), "spike rate by layer"),
        _picture(png(draw_windows(maps)), "spike rates of the windows") if maps else "",
        "<h2>What is counted</h2>\n<ul>",
        *(f"<li>{escape(rule)}</li>\n" for rule in _RULES),
        "</ul>\n",
        f"<p>Operations that could not be counted: {escape('; '.join(every) or 'none')}.</p>\n",
        _table(prices, f"Prices. {hardware.source}"),
        "<h2>Sources of the profiles</h2>\n<ul>",
        *(f"<li>{escape(n)}: {escape(p.source)}</li>\n" for n, p in PROFILES.items()),
        "</ul>\n<details><summary>Every layer</summary>\n",
        _table(layers, "Energy and operations of each layer, for one image"),
        "</details>\n<details><summary>Every count</summary>\n",
        _table(
            [("count", *columns)]
            + [(text, *(f"{c['counts'][field]:,.1f}" for c in columns.values())) for field, text in FIELDS.items()],
            "Counts for one image",
        ),
        "</details>\n</body></html>\n",
    ]
    return "".join(parts)
