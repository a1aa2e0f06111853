r"""Trainings by the command line, the files that keep their results, and the tables and pictures made of these.

    python -m benchmarks.trainings run experiments cifar100 "threshold 1.0" --seeds 0 1 2 -- \
        --config data/cifar100 --config recipe/paper --model.network_kwargs "{threshold: 1.0}" --run.test false
    python -m benchmarks.trainings run frontier cifar100 "trained towards 50 %, 5 epochs" -- \
        --config data/cifar100 --config recipe/dial --trainer.max_epochs 5
    python -m benchmarks.trainings report

``run`` calls ``lightning-msnn fit`` with the options behind ``--`` for each seed, and adds a row to
``benchmarks/results/<file>.csv``: the last accuracy on held-out images (``val``), that of the test where there is one,
and what a test image costs. What is there already is left out, so that it can be stopped and started again at any time.
Rows keep the command, or the settings, that they were trained by, and the version that took it. ``report`` writes
docs/experiments.md, docs/beyond-images.md, docs/dial.md and their pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import ROOT, fill, markdown, read, with_interval, write
from lightning_msnn import __version__

DOCS = ROOT / "docs"
Rows = list[dict[str, str]]


def train(words: Sequence[str], seed: int, folder: str | Path) -> dict[str, Any]:
    """Train by the command line into a folder, and return what the run's files say of it.

    Raises:
        RuntimeError: If the training fails, with the last line that it wrote.
    """
    command = [sys.executable, "-m", "lightning_msnn", "fit", *words, "--seed_everything", str(seed)]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    command += ["--ckpt_path", "last"]  # of a training that was stopped, in a folder that is kept
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    row: dict[str, Any] = {"seconds": f"{time.perf_counter() - begin:.0f}"}
    (metrics,) = Path(folder).rglob("metrics.csv")
    last: dict[str, str] = {}
    for line in csv.DictReader(metrics.open(newline="", encoding="utf-8")):
        last |= {key: value for key, value in line.items() if value}
    row["metric"] = "mase" if "val/mase" in last or "test/mase" in last else "top1"
    row |= {part: last[f"{part}/{row['metric']}"] for part in ("val", "test") if f"{part}/{row['metric']}" in last}
    row["spike_rate"] = last.get("spike_rate/all", "")
    for energy in Path(folder).rglob("energy.json"):
        network = json.loads(energy.read_text(encoding="utf-8"))["columns"]["network"]
        row["accumulates"] = f"{network['counts']['accumulates']:.0f}"
        row["energy_uj"] = f"{1e6 * network['energy']['total']:.3f}"
    return row


def run(file: str, data: str, name: str, seeds: Iterable[int], words: list[str], keep: str | None = None) -> None:
    """Train with each seed, and add the rows of those that are not there yet; ``keep/<seed>`` has a run's files."""
    for seed in seeds:
        rows: list[dict[str, Any]] = list(read(f"{file}.csv"))
        there = any((row["data"], row["name"], row["seed"]) == (data, name, str(seed)) for row in rows)
        if there and (keep is None or [*Path(keep, str(seed)).rglob("best.ckpt")]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            of_run = train(words, seed, Path(keep, str(seed)) if keep else folder)
        if there:  # what is kept was gone
            continue
        row = {"data": data, "name": name, "seed": seed, **of_run}
        row |= {"command": shlex.join(["lightning-msnn", "fit", *words]), "version": __version__, "date": date.today()}
        known = rows[0].keys() if rows else row.keys()
        write(f"{file}.csv", [*rows, {key: row.get(key, "") for key in known}])
        print(*row.values(), sep=" | ", flush=True)


# Tables


def percent(row: dict[str, str], part: str = "val") -> float:
    """Return an accuracy in percent."""
    return 100 * float(row[part])


def mean(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation over the seeds, as far as there are any."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def rate(rows: Rows) -> str:
    """Return the mean of the spike rates; a network without spikes has none."""
    rates = [float(row["spike_rate"]) for row in rows if row["spike_rate"]]
    return f"{statistics.mean(rates):.3f}" if rates else "-"


SECTIONS = {
    "Families": ("family", "msnn_resnet12"),
    "Windows": ("windows", "alternate (default)"),
    "Context": ("context", "shared (default)"),
    "Decay tau": ("tau", "learnt by channel from 0.1 (default)"),
    "Recurrent cell": ("cell", ""),
}
"""Tables of the tiny networks, how names of their settings begin, and what the default setting is called in each."""

WHOLE = (
    ("cifar100", "msnn_resnet12 on all of CIFAR-100", 2, "epochs"),
    ("recipe", "Recipes for msnn_resnet12", 1, "seeds"),
    ("whitened_recipe", "recipe/baseline and recipe/student, each part taken away", 1, "seeds"),
    ("equal_operations", "Depth and width at equal operations, CIFAR-100 at 16x16", 1, "epochs"),
)
"""Tables of CIFAR-100: data, title, digits, last column."""


def experiments(rows: Rows) -> str:
    """Return the tables of docs/experiments.md."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        found.setdefault((row["data"], row["name"]), []).append(row)
    names = list(dict.fromkeys(name for data, name in found if data in ("digits", "cifar100_tenth")))
    text = []
    for title, (prefix, default) in SECTIONS.items():
        lines = []
        for name in names:
            if name.startswith(f"{prefix} ") or (default and name == "default"):
                label = default if name == "default" else name.removeprefix(prefix).strip()
                both = [found.get((data, name), []) for data in ("digits", "cifar100_tenth")]
                lines.append([label, *(cell for one in both for cell in (mean([percent(r) for r in one]), rate(one)))])
        head = ["setting", "digits, top-1", "spike rate", "a tenth of CIFAR-100, top-1", "spike rate"]
        text += [f"**{title}**", "", markdown(head, lines), ""]
    for data, title in {"digits": "digits", "cifar100_tenth": "a tenth of CIFAR-100"}.items():
        by_theta: dict[str, dict[str, str]] = {}
        for (of, name), one in found.items():
            if of == data and name.startswith("projection "):
                _, projection, *theta = name.split(maxsplit=2)
                by_theta.setdefault(projection, {})[theta[0] if theta else "no theta"] = mean(
                    [percent(r) for r in one]
                ).split()[0]
        thetas = list(dict.fromkeys(theta for row in by_theta.values() for theta in row))
        lines = [[p, *(row.get(theta, "") for theta in thetas)] for p, row in by_theta.items()]
        text += [f"**Projections on {title}, top-1**", "", markdown(["projection", *thetas], lines), ""]
    for data, title, digits, last in WHOLE:
        if not (mine := {name: one for (of, name), one in found.items() if of == data}):
            continue
        ends = [one[0]["epochs"] if last == "epochs" else len(one) for one in mine.values()]
        tops = [mean([percent(r) for r in one], digits) for one in mine.values()]
        lines = [list(line) for line in zip(mine, tops, map(rate, mine.values()), ends, strict=True)]
        text += [f"**{title}**", "", markdown(["setting", "top-1", "spike rate", last], lines), ""]
    text += ["**Shapes of msnn_resnet9, CIFAR-100**", "", shapes(rows), ""]
    return "\n".join(text)


def shapes(rows: Rows) -> str:
    """Return the table of the shapes of msnn_resnet9: a line has the ReLU baseline and the spiking network from it."""
    found: dict[str, dict[str, Rows]] = {}
    for row in (row for row in rows if row["data"] == "shapes"):
        name, _, kind = row["name"].rpartition(", ")
        found.setdefault(name, {}).setdefault(kind, []).append(row)
    lines = []
    for name, kinds in found.items():
        relu, spiking = kinds.get("ReLU", []), kinds["spiking"]
        cells = [mean([percent(r) for r in one], 2) for one in (relu, spiking)]
        lines.append([name, *cells, rate(spiking), len(spiking)])
    return markdown(["blocks and channels by stage", "ReLU", "spiking", "spike rate", "seeds"], lines)


def beyond_images(rows: Rows) -> str:
    """Return the table of docs/beyond-images.md; accuracies in percent, energy of the first seed."""
    variants = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        cells, joules = [data], []
        for variant in variants:
            values = [
                percent(r, "test") if r["metric"] == "top1" else float(r["test"]) for r in mine if r["name"] == variant
            ]
            cells.append(with_interval(values, 2 if mine[0]["metric"] == "top1" else 3) if values else "-")
        for variant in ("windows", "ReLU baseline"):
            joules += [f"{float(row['energy_uj']):.2f}" for row in mine if (row["name"], row["seed"]) == (variant, "0")]
        lines.append([*cells, f"{', '.join(joules)} µJ"])
    return markdown(["data", *variants, "energy, its baseline's"], lines)


def frontier(rows: Rows) -> str:
    """Return the table of docs/dial.md."""
    (entry,) = [row for row in rows if row["name"] == "entry"]
    lines = []
    for row in sorted(rows, key=lambda row: -float(row["energy_uj"])):
        share = 100 * float(row["accumulates"]) / float(entry["accumulates"])
        joules = f"{float(row['energy_uj']):.1f} µJ"
        lines.append([row["name"], f"{share:.1f} %" if share else "", joules, f"{percent(row, 'test'):.2f} %"])
    return markdown(["network", "accumulates", "energy", "top-1"], lines)


TABLES = {
    "experiments": ("experiments.md", "tables", experiments),
    "beyond_images": ("beyond-images.md", "sequences", beyond_images),
    "frontier": ("dial.md", "frontier", frontier),
}
"""File of results, page, marks, and what makes the table."""


# Pictures


def draw_theta(rows: Rows) -> Figure:
    """Draw accuracy and spike rate against theta, mean and spread over the seeds."""
    figure = Figure(figsize=(8.5, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    fields = {"val": ("top-1, held-out images (%)", 100), "spike_rate": ("spikes per neuron and image", 1)}
    titles = {"digits": "digits", "cifar100_tenth": "a tenth of CIFAR-100"}
    for column, (data, title) in zip(axes.T, titles.items(), strict=True):
        points: dict[str, dict[float, Rows]] = {}
        for row in rows:
            words = row["name"].split()  # projection <name> theta <value>
            if row["data"] == data and len(words) == 4 and words[0] == "projection" and words[3] != "learnt":
                points.setdefault(words[1], {}).setdefault(float(words[3]), []).append(row)
        for ax, (field, (label, scale)) in zip(column, fields.items(), strict=True):
            for i, (projection, by_theta) in enumerate(sorted(points.items())):
                values = [[scale * float(row[field]) for row in found] for found in by_theta.values()]
                spreads = [statistics.stdev(v) if v[1:] else 0.0 for v in values]
                beside = [theta + 0.008 * (i - 2) for theta in by_theta]  # so that no bar hides another
                means = [*map(statistics.mean, values)]
                ax.errorbar(beside, means, spreads, marker="o", ms=4, lw=1.2, capsize=2, label=projection)
            ax.set(ylabel=label, xticks=(0.1, 0.3, 0.5, 0.7, 0.9))
        column[0].set(title=title)
        column[1].set(xlabel="theta in units of pi")
    figure.suptitle("Mean and standard deviation over three seeds", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def draw_frontier(rows: Rows) -> Figure:
    """Draw accuracy over energy."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        joules, top1 = float(row["energy_uj"]), percent(row, "test")
        if "baseline" in row["name"]:  # far to the right
            axes.axhline(top1, color="#d9822b", ls="--")
            label: dict[str, Any] = {"xy": (0.99, top1), "xycoords": ("axes fraction", "data"), "ha": "right"}
            axes.annotate(
                f"{row['name']} in 32 bits, {joules:.0f} µJ", xytext=(0, 4), textcoords="offset points", **label
            )
            continue
        axes.plot(joules, top1, "o", color="#3b6fb6")
        label = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 9}
        axes.annotate(row["name"].removeprefix("trained ").replace(", ", "\n"), (joules, top1), **label)
    axes.set(xlabel="energy of one image, arithmetic alone (µJ, 45 nm CMOS)", ylabel="test top-1 (%)")
    axes.set(xlim=(24, 46), ylim=(42, 73), xticks=range(25, 46, 5))
    axes.grid(alpha=0.3)
    return figure


def report() -> None:
    """Write tables and pictures into ``docs``; the words around the tables stay."""
    for file, (page, mark, table) in TABLES.items():
        fill(DOCS / page, mark, table(read(f"{file}.csv")))
    draw_theta(read("experiments.csv")).savefig(DOCS / "theta.png", dpi=150)
    draw_frontier(read("frontier.csv")).savefig(DOCS / "frontier.png", dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what has not been trained yet")
    runner.add_argument("file", choices=TABLES, help="file of results")
    runner.add_argument("data", help="what the row is of: the first column of the table")
    runner.add_argument("name", help="name of the setting")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0])
    runner.add_argument("--keep", help="folder for the files of the trainings")
    commands.add_parser("report", help="write tables and pictures")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # behind it: options of lightning-msnn fit
    given = parser.parse_args(sys.argv[1:end])
    if given.command == "run":
        run(given.file, given.data, given.name, given.seeds, sys.argv[end + 1 :], given.keep)
    else:
        report()


if __name__ == "__main__":
    main()
