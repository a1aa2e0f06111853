"""The report: what a network does and costs beside its baselines, as one HTML page.

The page is one file: pictures are inside, nothing is loaded from elsewhere, and it needs no script.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_msnn.energy.counting import OperationCounter
from lightning_msnn.energy.measures import Record
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, png, window_maps
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, TRANSCENDENTAL, profile
from lightning_msnn.energy.sampling import SAMPLES
from lightning_msnn.energy.summary import NETWORK, TITLES, comparison_rows, factor_sentence, summarize
from lightning_msnn.errors import ConfigurationError

__all__ = ["compare", "page"]

CALIBRATION = 256  # images, or up to twice as many, that set the statistics of the baselines' batch norms
CHUNK = 64  # images of a batch, whatever batches come in: spikes may depend on its size by rounding


def _gather(batches: Iterable[Any], samples: int) -> list[Any]:
    """Cut the first samples of batches, each one tensor or a pair of arguments and named arguments, into chunks."""
    parts = [tree_flatten(batch if isinstance(batch, tuple) else ((batch,), {})) for batch in batches]
    columns = zip(*(leaves for leaves, _ in parts), strict=True)
    whole = [torch.cat(x)[:samples] if isinstance(x[0], Tensor) else x[0] for x in columns]
    found = next((len(x) for x in whole if isinstance(x, Tensor)), 0)
    if not found:
        raise ConfigurationError("operations are counted on samples, but the data has none")
    chunks = ([x[i : i + CHUNK] if isinstance(x, Tensor) else x for x in whole] for i in range(0, found, CHUNK))
    return [tree_unflatten(chunk, parts[0][1]) for chunk in chunks]


@torch.no_grad()
def compare(
    network: nn.Module,
    twins: Callable[[Tensor], dict[str, nn.Module]],
    batches: Iterable[Any],
    samples: int = SAMPLES,
    operations: bool = True,
) -> dict[str, Record]:
    """Count what a network and its baselines do for the same images.

    Args:
        network: The network, in eval mode.
        twins: Returns its baselines by key, given images of all classes.
        batches: Batches of images as the network takes them, or pairs of its arguments and named arguments; the first
            axis of each tensor counts the samples.
        samples: Images to count, the first ones.
        operations: Whether to count operations; without, only what neurons do.

    Returns:
        Records by the key of their column, the network's own first.

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
    return records


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
        records: What the network and its baselines did, by the key of their column, the network's own first.
        network: The network.
        on: Energy profile.
        top1: Test accuracies in percent of the networks that were trained, by the key of the column.
        facts: More to say about the network and the page, such as date and version.
        configuration: Configuration that the network was trained with.
        curves: PNG file of the training curves.
        samples: What test inputs are called, in the plural.

    Returns:
        HTML.
    """
    columns = {column: summarize(record, on, (top1 or {}).get(column)) for column, record in records.items()}
    titles = [TITLES.get(column, column) for column in columns]
    summary, maps = columns[NETWORK], window_maps(network, records[NETWORK])
    pictures = {
        "training curves": curves,
        "energy by part": png(draw_energy(summary)),
        "spike rate by part": png(draw_spike_rates(summary)) if records[NETWORK].fired else b"",
        "spike rates of the windows": png(draw_windows(maps)) if maps else b"",
    }
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=name,
        data_set=data_set,
        samples=samples,
        summary=summary,
        columns=columns,
        titles=titles,
        hardware=profile(on),
        factors=factor_sentence(columns) if "ANN twin" in columns else "",
        facts=facts or {},
        pictures={title: base64.b64encode(content).decode() for title, content in pictures.items()},
        comparison=comparison_rows(columns),
        profiles=PROFILES,
        missing={p: {f for c in columns.values() for f in c["profiles"][p]["without_figure"]} for p in PROFILES},
        uncounted=[f"{TITLES.get(c, c)}: {what}" for c, column in columns.items() for what in column["uncounted"]],
        transcendental=TRANSCENDENTAL,
        configuration=configuration,
        kinds=list(KINDS),
        fields=FIELDS,
    )
