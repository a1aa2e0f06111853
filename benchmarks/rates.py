"""The law of spike rates beside the rates that are measured, for entries of the zoo.

    python -m benchmarks.rates measure msnn_resnet12_tiny.digits            # a file of results/ for each entry
    python -m benchmarks.rates measure msnn_resnet12.c100 --data <folder>   # 100 test images, a minute
    python -m benchmarks.rates report                                       # tables and picture of docs/rates.md

Each entry is measured as it is, and for each theta with the statistics of batch norms left as they are and renewed on
other images than those that are measured. A row of ``results/rates_<entry>.csv`` is a layer of neurons.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import trainings
from benchmarks.pages import fill
from lightning_msnn import zoo
from lightning_msnn.energy import evenly
from lightning_msnn.energy.rates import RateLaw, gaussian_tail
from lightning_msnn.models.twins import calibrate
from lightning_msnn.nn import Projection
from lightning_msnn.nn.layer import watched
from lightning_msnn.zoo.verification import test_data

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "rates.md"
THETAS = (0.0, 0.1, 0.25, 0.5, 0.7, 0.9)


def by_channel(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(C, values)``."""
    return x.transpose(0, 1).flatten(1)


def distribution(current: Tensor, norm: Any) -> dict[str, float]:
    """How a current, less the running mean and by the running deviation, is distributed: means over the channels."""
    mean, var = (x.view(-1, 1, 1) for x in (norm.running_mean, norm.running_var))
    z = (current - mean) / (var + norm.eps).sqrt()
    values = by_channel(z).double()
    centred = values - values.mean(1, keepdim=True)
    spread = centred.square().mean(1).clamp(min=1e-12)
    places = z.shape[2] * z.shape[3]
    together = z.double().mean((2, 3)).var(0, correction=0) / spread
    return {
        "mean": float(values.mean(1).abs().mean()),
        "deviation": float(spread.sqrt().mean()),
        "skewness": float((centred.pow(3).mean(1) / spread.pow(1.5)).abs().mean()),
        "excess": float((centred.square().square().mean(1) / spread.square()).mean() - 3.0),
        "correlation": float((together.mean() * places - 1) / (places - 1)) if places > 1 else 0.0,
    }


@torch.no_grad()
def measure(network: nn.Module, law: RateLaw, images: Tensor, looks: bool = False) -> list[dict[str, Any]]:
    """Run a network on images; return a row for each layer of neurons.

    Args:
        network: The network.
        law: Its law.
        images: Images.
        looks: Whether the distributions of currents are looked at.
    """
    names = {module: name for name, module in network.named_modules()}
    predicted = law()
    rows: list[dict[str, Any]] = []

    def watch(what: str, given: dict[str, Any], out: Any) -> None:
        if what != "fire":
            return
        name, norm, membrane = names[given["spike"]], given["norm"], given["membrane"]
        rate, said = by_channel(out[0]).mean(1).double(), predicted[name]
        alone = gaussian_tail((given["spike"].threshold - norm.bias.double()) / norm.weight.double().abs())
        rows.append(
            {
                "layer": name,
                "form": "encoder or MLP" if membrane is None else membrane.form,
                "measured": float(rate.mean()),
                "predicted": float(said.mean()),
                "channels": float((said - rate).abs().mean()),
                "alone": float(alone.mean()),
                "alone_channels": float((alone - rate).abs().mean()),
                **(distribution(given["current"], norm) if looks else {}),
            }
        )

    with watched(watch):
        network(images)
    return rows


def set_theta(network: nn.Module, theta: float) -> None:
    """Set theta of every layer."""
    for module in network.modules():
        if isinstance(module, Projection):
            module.theta.fill_(theta)


def measure_entry(name: str, data: str | None, samples: int) -> None:
    """Measure an entry in all ways and write its file."""
    network = zoo.load(name)
    images = torch.cat(list(evenly(test_data(zoo.info(name), data, 64), 2 * samples)))
    renewing, measuring = images[::2], images[1::2]
    law = RateLaw(network)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    rows = [{"theta": "", "renewed": 0, **row} for row in measure(network, law, measuring, looks=True)]
    for theta in THETAS:
        network.load_state_dict(state)
        set_theta(network, theta)
        rows += [{"theta": theta, "renewed": 0, **row} for row in measure(network, law, measuring)]
        calibrate(network, renewing)
        rows += [{"theta": theta, "renewed": 1, **row} for row in measure(network, law, measuring)]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"rates_{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read() -> dict[str, list[dict[str, Any]]]:
    """Rows of all files by entry."""
    paths = sorted(RESULTS.glob("rates_*.csv"))
    return {path.stem.removeprefix("rates_"): trainings.read(path) for path in paths}


def error(rows: list[dict[str, Any]], law: str = "predicted") -> tuple[float, float]:
    """Mean absolute error over layers, and over channels by layer."""
    channels = "channels" if law == "predicted" else "alone_channels"
    return (
        fmean(abs(float(r[law]) - float(r["measured"])) for r in rows),
        fmean(float(r[channels]) for r in rows),
    )


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """Tables of errors, and of the reasons for them."""
    lines = ["| Entry | theta | layers, as it is | channels | layers, renewed | channels |", "| --- " * 6 + "|"]
    for name, rows in found.items():
        groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            groups[row["theta"], row["renewed"]].append(row)
        for theta in ["", *(f"{t:g}" for t in THETAS)]:
            cells = [theta or "its own"]
            for renewed in "01":
                cells += [f"{x:.3f}" for x in error(groups[theta, renewed])] if groups[theta, renewed] else ["", ""]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| Entry | layers | law | `Q` alone | drift of mean | deviation | skewness | excess | correlation |"]
    lines += ["| --- " * 9 + "|"]
    for name, rows in found.items():
        own = [row for row in rows if row["theta"] == ""]
        for form in dict.fromkeys(row["form"] for row in own):
            chosen = [row for row in own if row["form"] == form]
            numbers = [error(chosen)[1], error(chosen, "alone")[1]]
            numbers += [fmean(float(r[k]) for r in chosen) for k in ("mean", "deviation", "skewness", "excess")]
            numbers += [fmean(float(r["correlation"]) for r in chosen)]
            lines.append(f"| {name} | {form} | {' | '.join(f'{x:.3f}' for x in numbers)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw predicted against measured rates, a point for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True, layout="constrained")
    chosen = (("", "0", "as the entries are"), ("0.9", "1", "theta 0.9, statistics renewed"))
    for axis, (theta, renewed, title) in zip(axes, chosen, strict=True):
        for name, rows in found.items():
            mine = [r for r in rows if (r["theta"], r["renewed"]) == (theta, renewed)]
            x, y, bar = ([float(r[k]) for r in mine] for k in ("predicted", "measured", "channels"))
            axis.errorbar(x, y, bar, fmt="o", markersize=3, elinewidth=0.6, alpha=0.7, label=name)
        axis.plot([0, 0.5], [0, 0.5], color="black", linewidth=0.8)
        axis.set(title=title, xlabel="rate that the law predicts", xlim=(0, 0.5), ylim=(0, 0.5))
    axes[0].set_ylabel("rate that is measured")
    axes[1].legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "rates.png", dpi=120)
    plt.close(figure)


def report() -> None:
    """Write tables into the page, and the picture."""
    found = read()
    fill(PAGE, "tables", tables(found))
    draw(found)


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
        report()
        return
    for name in given.entries:
        measure_entry(name, given.data, given.samples)


if __name__ == "__main__":
    main()
