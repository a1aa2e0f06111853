"""The report: what a network does and costs beside its baselines, as one HTML page.

The page is one file: pictures are inside, nothing is loaded from elsewhere, and it needs no script.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
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

TEMPLATE = Path(__file__).with_name("report.html")

CALIBRATION = 256
"""Images, or up to twice as many, that set the statistics of the baselines' batch norms."""

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
    """Count what a network and its baselines do for the same images.

    Args:
        network: The network, in eval mode.
        twins: Returns its baselines by name, given images of all classes.
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


def _joules(cell: Mapping[str, Any]) -> str:
    """An energy under a profile; a sum without operations for which the profile has no figure is a lower bound."""
    if not cell["without_figure"]:
        return f"{cell['joules'] * 1e6:.4g} µJ"
    return f"> {cell['joules'] * 1e6:.4g} µJ" if cell["joules"] > 0 else "no figure"


def _profile_rows(columns: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("profile", *columns, "without a figure, and not in the sum")]
    for name in PROFILES:
        cells = [column["profiles"][name] for column in columns.values()]
        missing = sorted({field.replace("_", " ") for cell in cells for field in cell["without_figure"]})
        rows.append((name, *map(_joules, cells), ", ".join(missing) or "-"))
    return rows


def _layer_rows(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    synaptic = ("accumulates", "multiply_accumulates")
    rows: list[Sequence[str]] = [("layer", "parameters", *KINDS, "spike rate", "accumulates", "multiply-accumulates")]
    for name, layer in summary["layers"].items():
        energies = (f"{layer['energy'].get(kind, 0.0) * 1e9:.4g} nJ" for kind in KINDS)
        rate = "-" if layer["spike_rate"] is None else f"{100 * layer['spike_rate']:.1f} %"
        operations = (f"{layer['counts'].get(field, 0.0):,.0f}" for field in synaptic)
        rows.append((name, f"{layer['parameters']:,}", *energies, rate, *operations))
    return rows


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


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
    samples: str = "images",
) -> str:
    """Compose the page.

    Args:
        name: Name of the network.
        data_set: Name of the data set that the images are from.
        records: What the network and its baselines did, by the title of their column, the network's own first.
        network: The network.
        on: Energy profile.
        top1: Test accuracies in percent of what was trained, by the title of the column.
        facts: What else is to be said of the network and the page, such as date and version.
        configuration: Configuration that the network was trained with.
        curves: PNG file of the training curves.
        samples: What test inputs are called, in the plural.

    Returns:
        HTML.
    """
    columns = {column: summarize(record, on, (top1 or {}).get(column)) for column, record in records.items()}
    record, summary, hardware = records[NETWORK], columns[NETWORK], profile(on)
    maps = window_maps(network, record.fired, record.visits)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        name=name,
        data_set=data_set,
        samples=samples,
        record=record,
        hardware=hardware,
        accuracy="an unknown share" if summary["top1"] is None else f"{summary['top1']:.2f} %",
        joules=f"{summary['energy']['total'] * 1e6:.4g} µJ",
        factors=factor_sentence(columns) if "ANN twin" in columns else "",
        facts=list((facts or {}).items()),
        curves=_encoded(curves),
        comparison=[[cell.replace("uJ", "µJ") for cell in row] for row in comparison_rows(columns)],
        energy=_encoded(png(draw_energy(summary))),
        spike_rates=_encoded(png(draw_spike_rates(summary))) if record.fired else "",
        windows=_encoded(png(draw_windows(maps))) if maps else "",
        profiles=_profile_rows(columns),
        prices=[
            ("operation", "price", "where in the source"),
            *((k, f"{v:.4g} pJ", hardware.sources.get(k, "")) for k, v in hardware.prices.items()),
        ],
        uncounted=[f"{c}: {o} ({n} calls)" for c, column in columns.items() for o, n in column["uncounted"].items()],
        all_profiles=PROFILES,
        transcendental=TRANSCENDENTAL,
        configuration=configuration,
        layers=_layer_rows(summary),
        counts=[
            ("count", *columns),
            *((text, *(f"{c['counts'][field]:,.1f}" for c in columns.values())) for field, text in FIELDS.items()),
        ],
    )
