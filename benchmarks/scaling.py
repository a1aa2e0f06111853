"""Depth and width at equal compute: accuracy of networks after as many operations of training, on CIFAR-100.

    python -m benchmarks.scaling run --root data/cifar100
    python -m benchmarks.scaling report     # the table of docs/rates.md

Each network sees as many batches as the operations of ``msnn_resnet12`` in ``EPOCHS`` epochs allow: operations are
those of a pass if every neuron fired, counted by the engine of energy. Images of 16x16, so that this is an hour on one
core. Accuracy is that of training images held out, after the last step; no test image is read. ``run`` appends a row to
``benchmarks/results/scaling_cifar100.csv`` for each training that ends, and leaves out what is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import date
from functools import cache
from pathlib import Path

import timm
import torch
import yaml

from benchmarks.pages import fill
from benchmarks.trainings import append, lightning_msnn, read, with_interval
from lightning_msnn import __version__
from lightning_msnn.energy import count_operations, synaptic_operations

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling_cifar100.csv"
PAGE = ROOT / "docs" / "rates.md"
SIZE, BATCH, EPOCHS = 16, 128, 2
HELD_OUT = 0.1
"""Share of the 50,000 training images that is held out."""

NETWORKS = {
    "12 blocks, half as wide": ("msnn_resnet12", "{widths: [24, 48, 96, 192]}"),
    "12 blocks": ("msnn_resnet12", ""),
    "20 blocks": ("msnn_resnet20", ""),
    "32 blocks": ("msnn_resnet32", ""),
    "12 blocks, twice as wide": ("msnn_resnet12_w2", ""),
}
"""Titles, registered names and arguments, the smallest network first."""

SEEDS = {"12 blocks, half as wide": (0, 1, 2)}
"""Where there is more than one."""


@cache
def cost(title: str) -> tuple[float, float]:
    """Return operations of an image if every neuron fired, and parameters."""
    name, given = NETWORKS[title]
    network = timm.create_model(name, num_classes=100, **(yaml.safe_load(given) or {})).eval()
    with torch.no_grad():
        record = count_operations(network, torch.zeros(1, 3, SIZE, SIZE))
    return float(synaptic_operations(record)["dense"]), sum(p.numel() for p in network.parameters())


def steps(title: str) -> int:
    """Return how many batches a network sees."""
    whole = EPOCHS * (round(50_000 * (1 - HELD_OUT)) // BATCH)
    return round(whole * cost("12 blocks")[0] / cost(title)[0])


def command(title: str, seed: int, root: str, folder: str) -> list[str]:
    """Return the arguments of one training."""
    (name, given), number = NETWORKS[title], steps(title)
    return [
        "fit", "--config", "data/cifar100", "--config", "recipe/fast", "--data.root", root,
        "--data.image_size", str(SIZE), "--data.crop_padding", "2", "--data.val_fraction", str(HELD_OUT),
        "--model.network", name, *(["--model.network_kwargs", given] if given else []),
        "--model.warmup_epochs", f"{0.2 * number * BATCH / (50_000 * (1 - HELD_OUT)):.2f}",
        "--trainer.max_epochs", "-1", "--trainer.max_steps", str(number),
        "--trainer.val_check_interval", str(number), "--trainer.check_val_every_n_epoch", "null",
        "--run.ema", "0.99", "--run.monitors", "false", "--run.test", "false", "--seed_everything", str(seed),
        "--run.folder", folder, "--run.name", "run",
    ]  # fmt: skip


def shown(title: str, seed: int) -> str:
    """Return the command as the results have it."""
    words = command(title, seed, "data/cifar100", "")
    return " ".join(["lightning-msnn", *words[: words.index("--run.folder")]])


def run(root: str) -> None:
    """Run what is not there yet."""
    for seed in (0, 1, 2):
        for title in NETWORKS:
            if seed not in SEEDS.get(title, (0,)) or shown(title, seed) in {row["command"] for row in read(RESULTS)}:
                continue
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                lightning_msnn(command(title, seed, root, folder))
                seconds = time.perf_counter() - begin
                rows = read(Path(folder) / "run" / "version_0" / "metrics.csv")
            (top1,) = [100 * float(row["val/top1"]) for row in rows if row.get("val/top1")]
            operations, parameters = cost(title)
            append(
                RESULTS,
                {
                    "network": title, "seed": seed, "operations": f"{operations:.0f}",
                    "parameters": f"{parameters:.0f}", "steps": steps(title), "top1": f"{top1:.2f}",
                    "seconds": f"{seconds:.0f}", "command": shown(title, seed), "version": __version__,
                    "date": date.today(),
                },
            )  # fmt: skip
            sys.stdout.write(f"{title}, seed {seed}: {top1:.2f} in {seconds:.0f} s\n")
            sys.stdout.flush()


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| network | parameters | operations | epochs | top-1, held out |", "|" + "---|" * 5]
    rows = read(RESULTS)
    for title in NETWORKS:
        asked = {shown(title, seed) for seed in SEEDS.get(title, (0,))}
        mine = [row for row in rows if row["command"] in asked]
        if not mine:
            continue
        epochs = int(mine[0]["steps"]) * BATCH / (50_000 * (1 - HELD_OUT))
        parameters, operations = (float(mine[0][key]) / 1e6 for key in ("parameters", "operations"))
        top1 = with_interval([float(row["top1"]) for row in mine], 1)
        lines.append(f"| {title} | {parameters:.1f} M | {operations:.0f} M | {epochs:.1f} | {top1} % |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--root", default="data/cifar100", help="folder of CIFAR-100")
    given = parser.parse_args()
    if given.what == "run":
        run(given.root)
    else:
        fill(PAGE, "scaling", table())


if __name__ == "__main__":
    main()
