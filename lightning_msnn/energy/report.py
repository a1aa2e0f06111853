"""The report: what a network does and costs beside its twins, as one HTML page.

The page is one file: pictures are inside, nothing is loaded from elsewhere, and it needs no script.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_msnn.energy.counting import OperationCounter, Record
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, TRANSCENDENTAL, profile
from lightning_msnn.energy.sampling import SAMPLES
from lightning_msnn.energy.summary import NETWORK, comparison_rows, factor_sentence, summarize
from lightning_msnn.errors import ConfigurationError

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
    "Memory traffic: a value is a word, a spike one bit. Each layer reads its inputs and writes its outputs once, and "
    "each weight is read once for an image; a membrane is read and written at each update. Under cmos_45nm_event, each "
    "synaptic operation fetches its weight and reads and writes its accumulator instead.",
    "The ANN twin is the same topology with ReLU and without windows; the SNN twin has plain LIF neurons over four "
    "time steps. Both have this network's weights, with the statistics of their batch norms taken from the images "
    "counted; an accuracy is given of a twin that was trained by itself.",
    "The images are spread evenly over the classes, and are the same in every report, card and test.",
)

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: pre-wrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; margin: .5rem 0 } details { margin: 1rem 0 } .total td { font-weight: 600 }
"""


CALIBRATION = 256
"""Images, or up to twice as many, that set the statistics of the twins' batch norms."""

CHUNK = 64
"""Images of a batch, whatever those are that come in: spikes may depend on its size by rounding."""


def _gather(batches: Iterable[Any], samples: int) -> list[Any]:
    """Cut the first samples of batches, each one tensor or a pair of arguments and named arguments, into chunks."""
    leaves: list[list[Any]] = []
    found = 0
    for batch in batches:
        flat, spec = tree_flatten(batch if isinstance(batch, tuple) else ((batch,), {}))
        leaves.append(flat)
        found += len(next(x for x in flat if isinstance(x, Tensor)))
        if found >= samples:
            break
    if not found:
        raise ConfigurationError("operations are counted on samples, but the data has none")
    whole = [torch.cat(x)[:samples] if isinstance(x[0], Tensor) else x[0] for x in zip(*leaves, strict=True)]
    return [
        tree_unflatten([x[i : i + CHUNK] if isinstance(x, Tensor) else x for x in whole], spec)
        for i in range(0, min(found, samples), CHUNK)
    ]


@torch.no_grad()
def compare(
    network: nn.Module,
    twins: Callable[[Tensor], dict[str, nn.Module]],
    batches: Iterable[Any],
    samples: int = SAMPLES,
    operations: bool = True,
) -> tuple[dict[str, Record], dict[str, nn.Module]]:
    """Count what a network and its twins do for the same images.

    Args:
        network: The network, in eval mode.
        twins: Returns its twins by name, given images of all classes.
        batches: Batches of images as the network takes them, or pairs of its arguments and named arguments; the first
            axis of each tensor counts the samples.
        samples: Images to count, the first ones.
        operations: Whether to count operations; without, only what neurons do.

    Returns:
        Records and networks by the title of their column, the network's own first.

    Raises:
        ConfigurationError: If there are no samples.
    """
    chunks = _gather(batches, samples)
    images = torch.cat([next(x for x in tree_leaves(chunk) if isinstance(x, Tensor)) for chunk in chunks])
    networks = {NETWORK: network, **twins(images[:: max(1, len(images) // CALIBRATION)])}
    records = {}
    for name, each in networks.items():
        with OperationCounter(each, operations) as counter:
            for args, kwargs in chunks:
                each(*args, **kwargs)
        records[name] = counter.record()
    return records, networks


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


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n{content}</details>\n"


def _picture(content: bytes, title: str) -> str:
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">\n'


def page(
    name: str,
    data_set: str,
    records: dict[str, Record],
    network: nn.Module,
    on: str = DEFAULT_PROFILE,
    top1: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
    configuration: str = "",
    curves: bytes = b"",
    lead: str = "",
    inputs: Mapping[str, bytes] | None = None,
    samples: str = "images",
) -> str:
    """Compose the page.

    Args:
        name: Name of the network.
        data_set: Name of the data set that the images are from.
        records: What the network and its twins did, by the title of their column, the network's own first.
        network: The network.
        on: Energy profile.
        top1: Test accuracies in percent of what was trained, by the title of the column.
        facts: What else is to be said of the network and the page, such as date and version.
        configuration: Configuration that the network was trained with.
        curves: PNG file of the training curves.
        lead: What the network achieves, where it does not classify.
        inputs: PNG files of test inputs by their titles.
        samples: What test inputs are called, in the plural.

    Returns:
        HTML.
    """
    top1 = top1 or {}
    columns = {column: summarize(record, on, top1.get(column)) for column, record in records.items()}
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
    accuracy = "an unknown share" if summary["top1"] is None else f"{summary['top1']:.2f} %"
    joules = f"{summary['energy']['total'] * 1e6:.4g} µJ"
    lead = lead or f"{name} classifies {accuracy} of the test {samples} of {data_set}"
    lead = f"{lead} and takes {joules} for one."
    parts = [
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(name)}: accuracy and energy</title>"
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(name)}</h1>\n<p><b>{escape(lead)}</b> ",
        escape(factor_sentence(columns)) if "ANN twin" in columns else "",
        f"</p>\n<p>Counted on {record.samples} test {samples} of {escape(data_set)}, spread evenly over the classes. "
        f"All numbers are means for one {'image' if samples == 'images' else 'of them'}.</p>\n",
        _table([("", ""), *(facts or {}).items()], "What this is") if facts else "",
        _picture(curves, "training curves") if curves else "",
        *(_picture(content, title) for title, content in (inputs or {}).items()),
        _table(comparison, f"This network beside its twins. Energies: {hardware.source}", "energy"),
        "<h2>Energy</h2>\n",
        _picture(png(draw_energy(summary)), "energy by part"),
        _table(profiles, "The same counts under every energy profile"),
        *(
            ["<h2>Spikes</h2>\n", _picture(png(draw_spike_rates(summary)), "spike rate by part")]
            if record.fired
            else []
        ),
        _picture(png(draw_windows(maps)), "spike rates of the windows") if maps else "",
        "<h2>What is counted</h2>\n<ul>",
        *(f"<li>{escape(rule)}</li>\n" for rule in _RULES),
        "</ul>\n",
        f"<p>Operations that could not be counted: {escape('; '.join(every) or 'none')}.</p>\n",
        _table(prices, f"Prices. {hardware.source}"),
        "<h2>Sources of the profiles</h2>\n<ul>",
        *(f"<li>{escape(n)}: {escape(p.source)}</li>\n" for n, p in PROFILES.items()),
        "</ul>\n",
        _details("Configuration", f"<pre>{escape(configuration)}</pre>\n") if configuration else "",
        _details("Every layer", _table(layers, "Energy and operations of each layer, for one image")),
        _details(
            "Every count",
            _table(
                [("count", *columns)]
                + [(text, *(f"{c['counts'][field]:,.1f}" for c in columns.values())) for field, text in FIELDS.items()],
                "Counts for one image",
            ),
        ),
        "</body></html>\n",
    ]
    return "".join(parts)
