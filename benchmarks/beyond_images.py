"""What windows are worth beyond still images: speech, series, forecasts, event cameras.

    python -m benchmarks.beyond_images run --fsdd data/spoken_digits
    python -m benchmarks.beyond_images run --only italy,arrowhead --seeds 0
    python -m benchmarks.beyond_images report

``run`` trains one network after another by the command that a user would give, with the shipped recipes, and appends a
row to ``benchmarks/results/beyond_images.csv`` for each that ends; what is there already is left out, so that it can be
stopped and started again at any time. ``report`` prints a table in Markdown: the mean over the seeds, and half of its
95 % interval (Student's t). The checkpoint is chosen by validation, of equally good ones the last: on series, of which
few validate, that is nearly the end of the training. The test part is read once, at the end. With four time steps a
network hears recordings as they come, so that these are not aligned: another task than that of the other columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path

from benchmarks.trainings import append, lightning_msnn, read, with_interval
from lightning_msnn import __version__
from lightning_msnn.energy import NETWORK

RESULTS = Path(__file__).parent / "results" / "beyond_images.csv"

FSDD, EVENTS = "data/spoken_digits", "data/events"
"""Folders of the spoken and of the saccaded digits, if no others are given."""

SOLAR = "--data.source solar --data.season 48 --data.context 96 --data.horizon 48"
SETS: dict[str, tuple[str, str]] = {
    "speech": ("speech, own split", "data/spoken_digits recipe/tiny --data.root {fsdd}"),
    "speakers": ("speech, unseen speakers", "data/spoken_digits recipe/tiny --data.root {fsdd} --data.splits speakers"),
    "vowels": ("JapaneseVowels", "data/time_series recipe/series --data.problem JapaneseVowels --data.noise 0.3"),
    "motions": ("BasicMotions", "data/time_series recipe/series --data.problem BasicMotions"),
    "italy": ("ItalyPowerDemand", "data/time_series recipe/series --data.problem ItalyPowerDemand"),
    "arrowhead": ("ArrowHead", "data/time_series recipe/series --data.problem ArrowHead --data.noise 0.03"),
    "airline": ("Airline (MASE)", "data/forecasting recipe/series"),
    "solar": ("solar (MASE)", f"data/forecasting recipe/series {SOLAR}"),
    "events": ("saccaded digits", "data/events recipe/tiny --data.root {events}"),
}
"""Titles of the data sets, and what the command line says of them: two configurations, then options."""

VARIANTS = {
    "windows": "",
    "single": "--model.network_kwargs {windows:single}",
    "isolated": "--model.network_kwargs {context:isolated}",
    "four steps": "--model.network_kwargs {time_steps:4}",
    "twin": "--model.twin relu",
}
"""What is compared: shared windows as shipped, none, isolated ones, four time steps, and the twin with rectifiers."""

OF_FRAMES = ("speech", "speakers", "events")
"""Data whose inputs are one frame for each time step."""


def command(name: str, variant: str, seed: int, folder: str, given: argparse.Namespace) -> list[str]:
    """Return the command of one training."""
    data, recipe, *options = (word.format(fsdd=given.fsdd, events=given.events) for word in SETS[name][1].split())
    more = [word.replace(":", ": ") if word.startswith("{") else word for word in VARIANTS[variant].split()]
    if variant == "four steps" and name in OF_FRAMES:
        more += ["--data.time_steps", "4"]
    if given.epochs is not None:
        more += ["--trainer.max_epochs", str(given.epochs)]
    return [
        "fit", "--config", data, "--config", recipe, *options, *more, "--model.network", given.network,
        "--seed_everything", str(seed), "--run.folder", folder, "--run.name", "run",
    ]  # fmt: skip


def shown(name: str, variant: str, seed: int, given: argparse.Namespace) -> str:
    """Return the command as the results have it, which says neither where data lies nor where a run goes."""
    known = {"fsdd": FSDD, "events": EVENTS, "network": given.network, "epochs": given.epochs}
    words = command(name, variant, seed, "", argparse.Namespace(**known))
    return " ".join(words[: words.index("--run.folder")])


def train(name: str, variant: str, seed: int, given: argparse.Namespace) -> dict[str, object]:
    """Train one network, test it, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        words, begin = command(name, variant, seed, folder, given), time.perf_counter()
        lightning_msnn(words)
        seconds, run = time.perf_counter() - begin, Path(folder) / "run" / "version_0"
        rows = read(run / "metrics.csv")
        columns = json.loads((run / "energy.json").read_text(encoding="utf-8"))["columns"]
    metric = "mase" if "data/forecasting" in words else "top1"
    best = (min if metric == "mase" else max)(float(row[f"val/{metric}"]) for row in rows if row.get(f"val/{metric}"))
    naive = [row["test/seasonal_naive_mase"] for row in rows if row.get("test/seasonal_naive_mase")]
    (test,) = [float(row[f"test/{metric}"]) for row in rows if row.get(f"test/{metric}")]
    return {
        "data": name, "variant": variant, "seed": seed, "metric": metric, "val": f"{best:.6f}", "test": f"{test:.6f}",
        "seasonal_naive": naive[0] if naive else "", "energy_uj": f"{1e6 * columns[NETWORK]['energy']['total']:.4f}",
        "seconds": f"{seconds:.0f}", "command": shown(name, variant, seed, given), "version": __version__,
        "date": date.today(),
    }  # fmt: skip


def run(given: argparse.Namespace) -> None:
    """Run what is not there yet."""
    there = {row["command"] for row in read(RESULTS)}
    chosen = given.only.split(",") if given.only else list(SETS)
    if unknown := [name for name in chosen if name not in SETS]:
        raise SystemExit(f"unknown data {unknown[0]!r}: allowed are {', '.join(SETS)}")
    for seed, name, variant in product(map(int, given.seeds.split(",")), chosen, VARIANTS):
        if shown(name, variant, seed, given) in there:
            continue
        sys.stdout.write(f"{name}, {variant}, seed {seed}: ")
        sys.stdout.flush()
        try:
            row = train(name, variant, seed, given)
        except RuntimeError as error:
            sys.stdout.write(f"failed: {error}\n")
            continue
        append(RESULTS, row)
        sys.stdout.write(f"{row['metric']} {row['test']} (validation {row['val']}) in {row['seconds']} s\n")


def table(rows: list[dict[str, str]], given: argparse.Namespace) -> str:
    """Return the table in Markdown, of trainings of the network and the epochs asked for; accuracies in percent."""
    seeds = {int(row["seed"]) for row in rows}
    asked = {shown(name, variant, seed, given) for name, variant, seed in product(SETS, VARIANTS, seeds)}
    lines = [["data", *VARIANTS, "seasonal-naive"], ["---"] * (len(VARIANTS) + 2)]
    for name, (title, _) in SETS.items():
        mine = [row for row in rows if row["data"] == name and row["command"] in asked]
        if not mine:
            continue
        percent, cells = mine[0]["metric"] == "top1", [title]
        for variant in VARIANTS:
            values = [float(r["test"]) * (100 if percent else 1) for r in mine if r["variant"] == variant]
            cells.append(with_interval(values, 2 if percent else 3) if values else "-")
        naive = next((float(row["seasonal_naive"]) for row in mine if row["seasonal_naive"]), None)
        lines.append([*cells, "" if naive is None else f"{naive:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--fsdd", default=FSDD, help="folder of the spoken digits")
    parser.add_argument("--events", default=EVENTS, help="folder that the saccaded digits are written to")
    parser.add_argument("--only", help=f"data by comma: {','.join(SETS)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="by comma (default: 0,1,2)")
    parser.add_argument("--network", default="msnn_resnet12_tiny")
    parser.add_argument("--epochs", type=int, help="epochs in the place of the recipe's")
    given = parser.parse_args()
    if given.what == "run":
        run(given)
    sys.stdout.write(table(read(RESULTS), given))


if __name__ == "__main__":
    main()
