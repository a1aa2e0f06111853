"""Accuracy against energy: the entry of CIFAR-100, dialled to less, in 8 bits, and its twin.

    python -m benchmarks.frontier run --root data/cifar100
    python -m benchmarks.frontier run --root data/cifar100 --shares 0.5 --epochs 2
    python -m benchmarks.frontier draw       # the table and the picture of docs/dial.md

``run`` measures the entry and what is made of it, and dials it (``recipe/dial``) to each share of its synaptic
operations; the network is that after the last step, whether it is at its target or not. Operations are counted on
``SAMPLES`` test images, accuracy is that of all of them. In 8 bits accumulates alone are cheaper: all that does not
meet spikes is computed as before. Rows go to ``benchmarks/results/frontier_cifar100.csv``; what is there is left out,
so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.pages import fill
from benchmarks.trainings import append, lightning_msnn, read
from lightning_msnn import __version__, zoo
from lightning_msnn.energy import NETWORK, energy, evenly, synaptic_operations
from lightning_msnn.energy.report import compare
from lightning_msnn.export import export, load_weights
from lightning_msnn.runs import network_of, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "frontier_cifar100.csv"
PAGE, PICTURE = ROOT / "docs" / "dial.md", ROOT / "docs" / "frontier.png"
ENTRY, TWIN = "msnn_resnet12.c100", "msnn_resnet12.c100_relu"
SHARES = (0.75, 0.5, 0.35, 0.25)
"""Shares of the entry's synaptic operations."""

EPOCHS = 5
SAMPLES = 512
INT8 = "cmos_45nm_int8"
"""Energy profile of accumulates of 8-bit weights."""


def words(share: float, epochs: int, root: str) -> list[str]:
    """Return the arguments of a training towards a share of the operations."""
    return [
        "dial", ENTRY, "--operations", str(share), "--root", root, "--config", "recipe/dial",
        "--trainer.max_epochs", str(epochs),
    ]  # fmt: skip


@torch.inference_mode()
def measure(network: nn.Module, data: Any, in_8_bits: bool = False) -> dict[str, float]:
    """Return accumulates and joules of an image, and top-1 in percent."""
    record = compare(network, lambda images: {}, evenly(data, SAMPLES), SAMPLES)[0][NETWORK]
    kinds = energy(record, by="kind")
    if in_8_bits:
        kinds["accumulates"] = energy(record, INT8, by="kind")["accumulates"]
    return {
        "accumulates": float(synaptic_operations(record)["accumulates"]),
        "joules": float(sum(kinds.values())),
        "top1": zoo.evaluate(network, data)["top1"],
    }


def add(point: str, command: str, network: nn.Module, data: Any, in_8_bits: bool = False) -> None:
    """Measure a network, and append its row."""
    found = measure(network, data, in_8_bits)
    append(
        RESULTS,
        {
            "point": point, "accumulates": f"{found['accumulates']:.0f}",
            "energy_uj": f"{1e6 * found['joules']:.3f}", "top1": f"{found['top1']:.2f}", "command": command,
            "version": __version__, "date": date.today(),
        },
    )  # fmt: skip
    sys.stdout.write(f"{point}: {found}\n")
    sys.stdout.flush()


def dialled(share: float, epochs: int) -> str:
    """Name of a point."""
    return f"dialled towards {100 * share:.0f} %, {epochs} epoch{'s' * (epochs > 1)}"


def checkpoint(path: Path, share: float, epochs: int, data: Any) -> None:
    """Measure the checkpoint of a training that :func:`words` has."""
    command = " ".join(["lightning-msnn", *words(share, epochs, "data/cifar100")])
    add(dialled(share, epochs), command, network_of(read_checkpoint(path), path).eval(), data)


def run(root: str, shares: list[float], epochs: int) -> None:
    """Measure and train what is not there yet."""

    def there(point: str) -> bool:
        return any(row["point"] == point for row in read(RESULTS))

    data = zoo.test_data(zoo.info(ENTRY), root, 250)
    for point, name in (("entry", ENTRY), ("rectifier twin", TWIN)):
        if not there(point):
            add(point, f"python -m lightning_msnn.zoo verify {name} --data data/cifar100", zoo.load(name), data)
    if not there("entry in 8 bits"):
        with tempfile.TemporaryDirectory() as folder:
            path = export(ENTRY, to="weights", dtype="int8", out=Path(folder) / "x.safetensors").path
            command = f"lightning-msnn export {ENTRY} --to weights --dtype int8 --out x.safetensors"
            add("entry in 8 bits", command, load_weights(path).eval(), data, in_8_bits=True)
    for share in shares:
        if there(dialled(share, epochs)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            where = ["--run.folder", folder, "--run.name", "run", "--run.test", "false"]
            lightning_msnn([*words(share, epochs, root), *where])
            checkpoint(Path(folder) / "run" / "version_0" / "checkpoints" / "last.ckpt", share, epochs, data)


def table(rows: list[dict[str, str]]) -> str:
    """Return the table in Markdown."""
    (entry,) = [row for row in rows if row["point"] == "entry"]
    rows = sorted(rows, key=lambda row: -float(row["energy_uj"]))
    lines = ["| network | operations | energy | top-1 |", "|" + "---|" * 4]
    for row in rows:
        operations = float(row["accumulates"]) / float(entry["accumulates"])
        share = "" if not operations else f"{100 * operations:.1f} %"
        lines.append(f"| {row['point']} | {share} | {float(row['energy_uj']):.1f} µJ | {row['top1']} % |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]]) -> None:
    """Draw accuracy over energy."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        joules, top1 = float(row["energy_uj"]), float(row["top1"])
        spikes = "twin" not in row["point"]
        axes.plot(joules, top1, "o" if spikes else "s", color="#3b6fb6" if spikes else "#d9822b")
        axes.annotate(row["point"], (joules, top1), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="energy of one image, arithmetic alone (µJ, 45 nm CMOS)", ylabel="test top-1 (%)")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    running = commands.add_parser("run")
    running.add_argument("--root", default="data/cifar100", help="folder of CIFAR-100")
    running.add_argument("--shares", type=float, nargs="+", default=SHARES)
    running.add_argument("--epochs", type=int, default=EPOCHS)
    commands.add_parser("draw")
    given = parser.parse_args()
    if given.what == "run":
        run(given.root, given.shares, given.epochs)
    else:
        rows = read(RESULTS)
        draw(rows)
        fill(PAGE, "frontier", table(rows))


if __name__ == "__main__":
    main()
