"""Spike rates that the formula predicts beside the rates that are measured, for entries of the zoo.

    python -m benchmarks.rates measure msnn_resnet12_tiny.digits            # a file of results/ for each entry
    python -m benchmarks.rates measure msnn_resnet12.c100 --data <folder>   # 100 test images, a minute
    python -m benchmarks.rates report                                       # table and picture of docs/rates.md

Each entry is measured as it is, and with the statistics of its batch norms renewed on other images than those that are
measured. A row of ``results/rates_<entry>.csv`` is a layer of neurons.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import RESULTS, ROOT, fill, markdown
from lightning_msnn import zoo
from lightning_msnn.energy import OperationCounter, evenly, predict_rates
from lightning_msnn.models.baselines import calibrate
from lightning_msnn.zoo.verification import test_data

PAGE = ROOT / "docs" / "rates.md"

Rows = list[dict[str, Any]]


@torch.no_grad()
def measure(network: nn.Module, images: Tensor) -> Rows:
    """Run a network on images; return a row for each layer of neurons."""
    with OperationCounter(network, operations=False) as counter:
        network(images)
    record, rows = counter.record(), []
    for layer, predicted in predict_rates(network).items():
        rate = record.fired[layer].flatten(1).double().mean(1) / record.visits[layer]
        channels = float((predicted - rate).abs().mean())
        said = {"layer": layer, "measured": float(rate.mean()), "predicted": float(predicted.mean())}
        rows.append({**said, "channels": channels})
    return rows


def measure_entry(name: str, data: str | None, samples: int) -> None:
    """Measure an entry in both ways and write its file."""
    network = zoo.load(name)
    images = torch.cat(list(evenly(test_data(name, data, 64), 2 * samples)))
    renewing, measuring = images[::2], images[1::2]
    rows = [{"renewed": 0, **row} for row in measure(network, measuring)]
    rows += [{"renewed": 1, **row} for row in measure(calibrate(network, renewing), measuring)]
    common.write(f"rates_{name}.csv", rows)


def read() -> dict[str, Rows]:
    """Rows of all files by entry."""
    paths = sorted(RESULTS.glob("rates_*.csv"))
    return {path.stem.removeprefix("rates_"): common.read(path.name) for path in paths}


def errors(rows: Rows) -> tuple[float, float]:
    """Mean absolute error over layers, and over channels by layer."""
    layers = (abs(float(row["predicted"]) - float(row["measured"])) for row in rows)
    return fmean(layers), fmean(float(row["channels"]) for row in rows)


def tables(found: dict[str, Rows]) -> str:
    """Table of errors."""
    lines = []
    for name, rows in found.items():
        cells = [f"{x:.4f}" for renewed in "01" for x in errors([row for row in rows if row["renewed"] == renewed])]
        lines.append([name, *cells])
    return markdown(["Entry", "layers, as it is", "channels", "layers, renewed", "channels"], lines)


def draw(found: dict[str, Rows]) -> None:
    """Draw predicted against measured rates, a point for each layer."""
    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, renewed, title in zip(axes, "01", ("as the entries are", "statistics renewed"), strict=True):
        for name, rows in found.items():
            mine = [row for row in rows if row["renewed"] == renewed]
            x, y, bar = ([float(row[key]) for row in mine] for key in ("predicted", "measured", "channels"))
            axis.errorbar(x, y, bar, fmt="o", markersize=3, elinewidth=0.6, alpha=0.7, label=name)
        axis.plot([0, 0.5], [0, 0.5], color="black", linewidth=0.8)
        axis.set(title=title, xlabel="predicted rate", xlim=(0, 0.5), ylim=(0, 0.5))
    axes[0].set_ylabel("measured rate")
    figure.suptitle("A point for each layer of neurons; bars: the mean error over its channels", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(ROOT / "docs" / "rates.png", dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("entries", nargs="+")
    measuring.add_argument("--data")
    measuring.add_argument("--samples", type=int, default=100)
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "report":
        fill(PAGE, "tables", tables(read()))
        draw(read())
        return
    for name in given.entries:
        measure_entry(name, given.data, given.samples)


if __name__ == "__main__":
    main()
