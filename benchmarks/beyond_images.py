"""What windows are worth beyond still images: speech, series, forecasts, event cameras.

    python -m benchmarks.beyond_images run --fsdd data/spoken_digits
    python -m benchmarks.beyond_images run --only italy arrowhead --seeds 0
    python -m benchmarks.beyond_images report     # the table of docs/beyond-images.md

``run`` trains one network after another by the command that a user would give, with the shipped recipes (20 epochs in
the place of 60 for recordings), and appends a row to ``benchmarks/results/beyond_images.csv`` for each that ends; what
is there already is left out, so that it can be stopped and started again at any time. ``report`` writes the mean over
the seeds, and half of its 95 % interval (Student's t). The checkpoint is chosen by validation, of equally good ones the
last: on series, of which few validate, that is nearly the end of the training, and the end where none does. The test
part is read once, at the end.
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

from benchmarks.pages import fill
from benchmarks.trainings import append, lightning_msnn, read, with_interval
from lightning_msnn import __version__
from lightning_msnn.energy import NETWORK

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "beyond_images.csv"
PAGE = ROOT / "docs" / "beyond-images.md"
NETWORK_NAME = "msnn_resnet12_tiny"

FSDD, EVENTS = "data/spoken_digits", "data/events"
"""Folders of the spoken and of the saccaded digits, if no others are given."""

SHORT = "--trainer.max_epochs 20 --model.warmup_epochs 4"
"""Of recordings: a third of the recipe."""

ALL = "--data.val_fraction 0"
"""Where so few series train that none of them can be spared to validate: the network is that after the last step."""

ITALY = f"data/time_series recipe/series --data.problem ItalyPowerDemand {ALL}"
ARROWHEAD = f"data/time_series recipe/series --data.problem ArrowHead --data.noise 0.03 {ALL}"
CONSUMPTION = "--data.source Uschange --data.columns [Consumption] --data.season 4 --data.context 16 --data.horizon 4"
SETS: dict[str, tuple[str, str]] = {
    "speech": ("speech, own split", f"data/spoken_digits recipe/tiny --data.root {{fsdd}} {SHORT}"),
    "speakers": (
        "speech, unseen speakers",
        f"data/spoken_digits recipe/tiny --data.root {{fsdd}} --data.splits speakers {SHORT}",
    ),
    "vowels": ("JapaneseVowels", "data/time_series recipe/series --data.problem JapaneseVowels --data.noise 0.3"),
    "motions": ("BasicMotions", "data/time_series recipe/series --data.problem BasicMotions"),
    "italy": ("ItalyPowerDemand", ITALY),
    "italy-differences": ("ItalyPowerDemand, differences too", f"{ITALY} --data.differences true"),
    "arrowhead": ("ArrowHead", ARROWHEAD),
    "arrowhead-differences": ("ArrowHead, differences too", f"{ARROWHEAD} --data.differences true"),
    "airline": ("Airline (MASE)", "data/forecasting recipe/series"),
    "consumption": ("consumption (MASE)", f"data/forecasting recipe/series {CONSUMPTION}"),
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

SEEDS = 3
LEFT_OUT = dict.fromkeys(("italy-differences", "arrowhead-differences"), ("single", "isolated", "four steps"))
"""Variants that a data set is not trained with: of differences, windows stand beside the twin alone."""
OF_FRAMES = ("speech", "speakers", "events")
"""Data whose inputs are one frame for each time step."""


def command(name: str, variant: str, seed: int, folder: str, fsdd: str = FSDD, events: str = EVENTS) -> list[str]:
    """Return the command of one training."""
    data, recipe, *options = (word.format(fsdd=fsdd, events=events) for word in SETS[name][1].split())
    more = [word.replace(":", ": ") if word.startswith("{") else word for word in VARIANTS[variant].split()]
    if variant == "four steps" and name in OF_FRAMES:
        more += ["--data.time_steps", "4"]
    return [
        "fit", "--config", data, "--config", recipe, *options, *more, "--model.network", NETWORK_NAME,
        "--seed_everything", str(seed), "--run.folder", folder, "--run.name", "run",
    ]  # fmt: skip


def shown(name: str, variant: str, seed: int) -> str:
    """Return the command as the results have it, which says neither where data lies nor where a run goes."""
    words = command(name, variant, seed, "")
    return " ".join(words[: words.index("--run.folder")])


def train(name: str, variant: str, seed: int, fsdd: str, events: str) -> dict[str, object]:
    """Train one network, test it, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        words, begin = command(name, variant, seed, folder, fsdd, events), time.perf_counter()
        lightning_msnn(words)
        seconds, run = time.perf_counter() - begin, Path(folder) / "run" / "version_0"
        rows = read(run / "metrics.csv")
        columns = json.loads((run / "energy.json").read_text(encoding="utf-8"))["columns"]
    metric = "mase" if "data/forecasting" in words else "top1"
    validated = [float(row[f"val/{metric}"]) for row in rows if row.get(f"val/{metric}")]
    best = f"{(min if metric == 'mase' else max)(validated):.6f}" if validated else ""
    naive = [row["test/seasonal_naive_mase"] for row in rows if row.get("test/seasonal_naive_mase")]
    (test,) = [float(row[f"test/{metric}"]) for row in rows if row.get(f"test/{metric}")]
    return {
        "data": name, "variant": variant, "seed": seed, "metric": metric, "val": best, "test": f"{test:.6f}",
        "seasonal_naive": naive[0] if naive else "", "energy_uj": f"{1e6 * columns[NETWORK]['energy']['total']:.4f}",
        "seconds": f"{seconds:.0f}", "command": shown(name, variant, seed), "version": __version__,
        "date": date.today(),
    }  # fmt: skip


def run(only: list[str], seeds: list[int], fsdd: str, events: str) -> None:
    """Run what is not there yet."""
    there = {row["command"] for row in read(RESULTS)}
    for seed, name, variant in product(seeds, only, VARIANTS):
        if shown(name, variant, seed) in there or variant in LEFT_OUT.get(name, ()):
            continue
        sys.stdout.write(f"{name}, {variant}, seed {seed}: ")
        sys.stdout.flush()
        try:
            row = train(name, variant, seed, fsdd, events)
        except RuntimeError as error:
            sys.stdout.write(f"failed: {error}\n")
            continue
        append(RESULTS, row)
        sys.stdout.write(f"{row['metric']} {row['test']} (validation {row['val'] or 'none'}) in {row['seconds']} s\n")


def table(rows: list[dict[str, str]]) -> str:
    """Return the table in Markdown; accuracies in percent, energy of the first seed."""
    commands = {row["command"]: row for row in rows}
    lines = [["data", *VARIANTS, "seasonal-naive", "energy, its twin's"], ["---"] * (len(VARIANTS) + 3)]
    for name, (title, _) in SETS.items():
        mine = {
            variant: [row for seed in range(SEEDS) if (row := commands.get(shown(name, variant, seed)))]
            for variant in VARIANTS
        }
        if not any(mine.values()):
            continue
        cells = [title]
        for found in mine.values():
            percent = found and found[0]["metric"] == "top1"
            values = [float(row["test"]) * (100 if percent else 1) for row in found]
            cells.append(with_interval(values, 2 if percent else 3) if values else "-")
        naive = next((row["seasonal_naive"] for found in mine.values() for row in found if row["seasonal_naive"]), "")
        joules = [f"{float(mine[key][0]['energy_uj']):.2f}" for key in ("windows", "twin") if mine[key]]
        lines.append([*cells, naive and f"{float(naive):.3f}", ", ".join(joules) + " µJ"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    running = commands.add_parser("run")
    running.add_argument("--fsdd", default=FSDD, help="folder of the spoken digits")
    running.add_argument("--events", default=EVENTS, help="folder that the saccaded digits are written to")
    running.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="data sets (default: all)")
    running.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="(default: 0 1 2)")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.what == "run":
        run(given.only, given.seeds, given.fsdd, given.events)
    else:
        fill(PAGE, "sequences", table(read(RESULTS)))


if __name__ == "__main__":
    main()
