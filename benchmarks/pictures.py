"""Measure what the pages show, and draw it.

    python -m benchmarks.pictures measure --cifar100 DATA/cifar100 --cifar10 DATA/cifar10 --spoken-digits DATA/digits
    python -m benchmarks.pictures draw    # docs/*.png and docs/pictures/*.png, needs no data

``measure`` counts spikes of every entry of the zoo on test samples, evenly of all classes, and operations of one entry
beside its baselines. What docs/measured.json has already is left out: delete the file to measure anew. ``draw`` takes
those counts, the cards' figures, and membranes of an entry for a photograph that scikit-learn ships. Neither draws a
random number.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.common import ROOT, fill, markdown
from lightning_msnn import zoo
from lightning_msnn.energy import FACTORS, evenly, spike_rate, summarize
from lightning_msnn.energy.report import compare
from lightning_msnn.functional import PROJECTIONS, WINDOWS, heaviside
from lightning_msnn.tasks import SpikingClassifier

DOCS = ROOT / "docs"
MEASURED = DOCS / "measured.json"
TRAININGS = DOCS / "trainings.jsonl"
ENTRY = "msnn_resnet12.c100"
"""Entry whose operations are counted beside its baselines, and whose membranes are drawn."""

SAMPLES = {"Digits": 359, "CIFAR100": 256, "CIFAR10": 256, "SpokenDigits": 300}
COLOURS = ["#3b6fb6", "#d9822b", "#3f9b5f", "#a4508b"]
"""Those of the four windows."""

KINDS = {
    "non_dilated": "non-dilated: a partition into quarters",
    "dilated": "dilated: enlarged quarters that overlap",
    "grid": "grid: every second row and column",
}
VISITS = (
    "One neuron, one time step: it visits windows 1, 2, 3, 4 in turn, and its membrane carries what it saw.\n"
    r"layer 1: $u^1_k = \tau\,u^1_{k-1} + I^1_k$          "
    r"layer 2: $u^2_k = \tau\,\Omega(u^1_{k-1},\,u^2_{k-1}) + I^2_k$          "
    r"$\Omega(a, b) = 2\,\sin(\pi\theta\,a\,\cos(\pi\theta\,b))$"
)
FAMILIES = {"msnn_resnet12": "#3b6fb6", "msnn_vit12": "#d9822b", "msnn_rnn12": "#3f9b5f"}
FAMILIES |= {"msnn_resnet9": "#b03a48", "resnet18_cifar": "#8a5fb0"}
GRADED = {"msnn_resnet12.c100_whitened": "1", "msnn_resnet12.c100_d4": "4", "msnn_resnet12.c100_relu_whitened": ""}
"""From binary spikes to the ReLU baseline: entries and their levels."""

DATA = {
    "CIFAR100": "CIFAR-100, 10,000 test images",
    "CIFAR10": "CIFAR-10, 10,000 test images",
    "Digits": "digits, 359 test images",
    "SpokenDigits": "spoken digits, 300 recordings",
}


def family(name: str) -> str:
    """The family of an entry: its network's name without size and tag, of a converted one that of its source."""
    return str(zoo.info(name)["model_args"].get("source", name.partition(".")[0].removesuffix("_tiny")))


def data_of(name: str) -> str:
    """The data set of an entry."""
    return str(zoo.info(name)["data"]["class_path"].rpartition(".")[2])


def measure(roots: dict[str, str]) -> None:
    """Count, and write ``measured.json``; folders of data sets by the name of the class."""
    found: dict[str, Any] = {"entry": ENTRY, "rates": {}}
    if MEASURED.is_file():
        found = json.loads(MEASURED.read_text(encoding="utf-8"))
    for name in (name for name in zoo.list_models() if "spike_rate" in zoo.info(name)):
        if name in found["rates"]:
            continue
        config, kind = zoo.info(name), data_of(name)
        data = zoo.test_data(name, roots.get(kind), 64)
        samples = SAMPLES[kind]
        task = SpikingClassifier(
            name, num_classes=config["num_classes"], in_chans=config["input_size"][0], pretrained=True
        ).eval()
        twins = task.twins if name == ENTRY else lambda images: {}
        records = compare(task.network, twins, evenly(data, samples), samples, operations=name == ENTRY)
        if name == ENTRY:
            kept = ("samples", "counts", "energy", "energies", "spike_rate")
            summaries = {column: summarize(record) for column, record in records.items()}
            found["columns"] = {column: {key: one[key] for key in kept} for column, one in summaries.items()}
        rates = spike_rate(records["network"], by="layer")
        found["rates"][name] = {
            "images": samples,
            "all": round(float(spike_rate(records["network"])), 4),
            "layers": {layer: round(float(rate), 4) for layer, rate in rates.items()},
        }
        MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def membranes() -> dict[str, Any]:
    """Membranes of layer 1 in the first two blocks of the entry, for a photograph of a flower.

    Maps are ``(C, H, W)``, those of windows ``(C, h, w)``; the decay ``tau`` is by channel.
    """
    photograph = Image.fromarray(load_sample_image("flower.jpg")).crop((130, 0, 557, 427))
    model = zoo.load(ENTRY)
    image = zoo.transforms(ENTRY)(photograph).unsqueeze(0)
    blocks = list(model.stages[0].blocks)[:2]
    kept: list[dict[str, Any]] = []
    for block in blocks:
        mixer, one = block.mixer, {"kind": block.mixer.windows, "threshold": block.mixer.spike1.threshold}
        mixer.membrane1.register_forward_hook(
            lambda module, args, out, one=one: one.update(
                currents=[x[0] for x in args[0]], u=[x[0] for x in out], tau=module.decay().flatten()
            )
        )
        mixer.spike1.register_forward_hook(
            lambda module, args, out, one=one: one.update(merged=args[0][0], spikes=out[0])
        )
        kept.append(one)
    with torch.no_grad():
        model(image)
    return {"image": photograph.resize((96, 96)), "blocks": kept}


def corners(kind: str, size: int) -> list[tuple[int, int]]:
    """Top-left pixel of each window that lies in a corner."""
    far = size - WINDOWS[kind].side(size)
    return [(0, 0), (0, far), (far, 0), (far, far)]


def draw_visits() -> Figure:
    """The three ways to cut a map into windows, and the order in which a neuron visits them."""
    figure, size = Figure(figsize=(9.0, 3.8), layout="constrained"), 8
    for panel, (kind, title) in zip(figure.subplots(1, 3), KINDS.items(), strict=True):
        grid, spots, s = kind == "grid", [], WINDOWS[kind].side(size)
        for k, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)] if grid else corners(kind, size)):
            if grid:
                cells = [(x + column, y + row) for row in range(0, size, 2) for column in range(0, size, 2)]
                panel.add_patch(Rectangle((0, 0), size, size, facecolor="none", edgecolor="#cccccc", lw=0.6))
                for place in cells:
                    panel.add_patch(Rectangle(place, 1, 1, facecolor=COLOURS[k], alpha=0.55, edgecolor="white"))
                    panel.text(place[0] + 0.5, place[1] + 0.5, str(k + 1), ha="center", va="center", fontsize=8)
                spots.append((2.5 + x, 2.5 + y))
                continue
            inset, alpha = (0.07 * k, 0.16) if kind == "dilated" else (0.06, 0.35)
            style = {"facecolor": COLOURS[k], "alpha": alpha, "edgecolor": COLOURS[k], "lw": 2}
            panel.add_patch(Rectangle((x + inset, y + inset), s - 2 * inset, s - 2 * inset, **style))
            spots.append((1.2 if x == 0 else size - 1.2, 1.2 if y == 0 else size - 1.2))
            label = {"ha": "center", "va": "center", "fontsize": 17, "color": COLOURS[k], "weight": "bold"}
            panel.text(*spots[-1], str(k + 1), **label)
        for a, b in pairwise(spots):
            shrink = 6 if grid else 12
            arrow = {"arrowstyle": "-|>", "lw": 1.4, "shrinkA": shrink, "shrinkB": shrink}
            panel.add_patch(FancyArrowPatch(a, b, color="black", mutation_scale=9 if grid else 13, **arrow))
        panel.set_title(title, fontsize=10)
        panel.set(xlim=(-0.1, size + 0.1), ylim=(size + 0.1, -0.1), aspect="equal")
        panel.axis("off")
    figure.supxlabel(VISITS, fontsize=10)
    return figure


def draw_projections() -> Figure:
    """Each projection over both membranes, at the authors' theta."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    grid = torch.linspace(-4, 4, 161)
    a, b = torch.meshgrid(grid, grid, indexing="xy")
    for ax, (name, omega) in zip(axes.flat, PROJECTIONS.items(), strict=False):
        value = omega(a, b, torch.tensor(0.25))
        image = ax.imshow(value, origin="lower", extent=(-4, 4, -4, 4), cmap="RdBu_r", vmin=-2, vmax=2)
        ax.contour(grid, grid, value, levels=[-1.5, -1, -0.5, 0, 0.5, 1, 1.5], colors="black", linewidths=0.5)
        ax.set(title=name, xticks=range(-4, 5, 2), yticks=range(-4, 5, 2))
    axes[0, 3].xaxis.set_tick_params(labelbottom=True)
    axes.flat[-1].axis("off")
    figure.colorbar(image, cax=axes.flat[-1].inset_axes((0.3, 0, 0.1, 1)), label="Omega(a, b)", extend="both")
    figure.suptitle("The projections at theta = 0.25 (in units of pi)")
    figure.supxlabel("a, the membrane of layer 1")
    figure.supylabel("b, the membrane of layer 2")
    return figure


def draw_levels() -> Figure:
    """What a neuron of several levels returns, and the slope that a training uses, beside a rectifier."""
    figure, threshold = Figure(figsize=(9.0, 3.4), layout="constrained"), 0.5
    left, right = figure.subplots(1, 2)
    u = torch.linspace(-0.5, 3.0, 1401, requires_grad=True)
    x = u.detach() / threshold
    for levels, colour in zip((4, 2, 1), COLOURS, strict=False):
        spikes = heaviside(u, threshold=threshold, levels=levels)
        left.plot(x, spikes.detach(), color=colour, lw=2, label=f"D = {levels}")
        right.plot(x, torch.autograd.grad(spikes.sum(), u)[0], color=colour, lw=2)
    left.plot(x, x.clamp(min=0.0), "k--", lw=1, label="rectifier, u / V")
    right.plot(x, (x > 0) / threshold, "k--", lw=1)
    left.set(title="what the neuron returns", ylabel="spike", ylim=(-0.2, 5.2))
    right.set(title="the slope that training uses", ylabel="slope")
    figure.supxlabel("membrane u / threshold V", fontsize=10)
    left.legend()
    return figure


def draw_windows(found: dict[str, Any]) -> Figure:
    """The windows of a map visited in turn: a row for each block, a column for each visit."""
    figure = Figure(figsize=(9.5, 3.5), layout="constrained")
    axes = figure.subplots(2, 7)
    for row, one in zip(axes, found["blocks"], strict=True):
        size = one["merged"].shape[1]
        channel = int((torch.stack(one["u"]).std((0, 2, 3)) * one["tau"].abs()).argmax())
        limit = float(torch.stack(one["u"])[:, channel].abs().quantile(0.99))
        style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        row[0].imshow(found["image"])
        row[0].set_title("image" if row is axes[0] else "", fontsize=10)
        for k, (u, (y, x)) in enumerate(zip(one["u"], corners(one["kind"], size), strict=True)):
            s = u.shape[1]
            shown = np.full((size, size), np.nan)
            shown[y : y + s, x : x + s] = u[channel].numpy()
            row[k + 1].set_facecolor("#eeeeee")
            row[k + 1].imshow(shown, **style)
            frame = Rectangle((x - 0.5, y - 0.5), s, s, fill=False, edgecolor=COLOURS[k], lw=3, clip_on=False)
            row[k + 1].add_patch(frame)
            row[k + 1].set_title(f"visit {k + 1}", fontsize=10, color=COLOURS[k])
        picture = row[5].imshow(one["merged"][channel].numpy(), **style)
        row[5].set_title("merged", fontsize=10)
        row[6].imshow(one["spikes"][channel].numpy(), cmap="Greys", vmin=0, vmax=1)
        row[6].set_title("spikes", fontsize=10)
        decay = f"tau {float(one['tau'][channel]):.2f}"
        row[0].set_ylabel(f"{one['kind'].replace('_', '-')}\nchannel {channel}, {decay}", fontsize=9)
        figure.colorbar(picture, ax=row[6], shrink=0.8)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    figure.suptitle(f"One neuron map of {ENTRY}, one time step: membranes as windows are visited in turn", fontsize=11)
    return figure


def draw_neuron(found: dict[str, Any]) -> Figure:
    """Three neurons over the four windows: current, what the membrane carried, threshold, spike."""
    one = found["blocks"][0]
    currents, u = torch.stack(one["currents"]), torch.stack(one["u"])
    carried = u - currents
    threshold = float(one["threshold"])
    # Places where carrying decides, in either direction or most: the same rule on any image.
    decides = ((u > threshold) != (currents > threshold)).sum(0).float() + carried.abs().amax(0) / 10
    most, places = decides.flatten(1).max(1)
    chosen = [(int(c), *divmod(int(places[c]), decides.shape[2])) for c in most.argsort(descending=True)[:3]]
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for panel, (c, y, x) in zip(axes, chosen, strict=True):
        now, before, whole = (t[:, c, y, x].numpy() for t in (currents, carried, u))
        visits = np.arange(1, 5)
        panel.bar(visits - 0.17, now, 0.3, color=COLOURS, label="current from this window")
        panel.bar(visits + 0.17, before, 0.3, color="#bbbbbb", label="carried from the window before")
        panel.plot(visits, whole, "k.-", label="membrane")
        panel.axhline(threshold, color="#c0392b", ls="--", lw=1, label="threshold")
        fired = whole > threshold
        panel.plot(visits[fired], whole[fired], "k*", ms=13, label="spike")
        panel.axhline(0, color="black", lw=0.6)
        panel.set(xticks=visits, xlabel="window")
        panel.set_title(f"channel {c}, tau {float(one['tau'][c]):.2f}", fontsize=10)
    axes[0].set_ylabel("membrane")
    handles: dict[str, Any] = {}
    for panel in axes:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def panels(height: float, **shared: bool) -> tuple[Figure, dict[str, Any]]:
    """A figure with a panel for each data set."""
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = dict(zip(DATA, figure.subplots(2, 2, **shared).flat, strict=True))
    for data, panel in axes.items():
        panel.set_title(DATA[data], fontsize=11)
        panel.grid(alpha=0.3)
    return figure, axes


def draw_energy() -> Figure:
    """Accuracy against energy for all entries and trained ReLU baselines, from their cards."""
    names = [name for name in zoo.list_models() if {"top1", "energy_joules"} <= zoo.info(name).keys()]
    figure, axes = panels(7.6)
    for name in names:
        config, panel, colour = zoo.info(name), axes[data_of(name)], FAMILIES[family(name)]
        for end in ("_ann_twin", "") if "top1_ann_twin" in config else ("",):  # of the entry itself at last
            x = [1e6 * config[f"energy_joules{memory}{end}"] for memory in ("", "_memory")]
            top1, marker = config[f"top1{end}"], "o" if "spike_rate" in config and not end else "s"
            panel.plot(x, [top1] * 2, "-", color=colour, lw=1, alpha=0.6)
            panel.plot(x[0], top1, marker, color=colour, ms=8)
            panel.plot(x[1], top1, marker, color=colour, ms=8, mfc="white", mew=2)
    curve = [(1e6 * config["energy_joules"], config["top1"]) for config in map(zoo.info, GRADED)]
    axes["CIFAR100"].plot(*zip(*curve, strict=True), "--", color="grey", lw=1, zorder=0)
    for levels, place in zip(GRADED.values(), curve, strict=True):
        axes["CIFAR100"].annotate(levels, place, (0, 7), textcoords="offset points", ha="center", fontsize=9)
    for data, panel in axes.items():
        what = "recording" if data == "SpokenDigits" else "image"
        panel.set(xscale="log", xlabel=f"energy of one {what} (µJ, 45 nm CMOS)")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.margins(0.12, 0.15)
    figure.supylabel("test top-1 (%)", fontsize=11)
    line: dict[str, Any] = {"ls": "", "ms": 8, "mew": 2}
    kinds = {"spiking": "o", "trained ReLU baseline": "s"}
    handles = [Line2D([], [], marker="D", color=colour, label=name, **line) for name, colour in FAMILIES.items()]
    handles += [Line2D([], [], marker=m, color="black", label=kind, **line) for kind, m in kinds.items()]
    for label, fill_ in (("filled: arithmetic alone", "grey"), ("open: with memory traffic", "white")):
        handles.append(Line2D([], [], marker="o", color="grey", mfc=fill_, label=label, **line))
    handles.append(Line2D([], [], ls="--", color="grey", lw=1, label="1, 4 levels, baseline"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_rates(measured: dict[str, Any]) -> Figure:
    """Spike rate by layer of neurons, from input to output."""
    figure, axes = panels(7.0, sharex=True, sharey=True)
    for name, one in measured["rates"].items():
        if not name.startswith("msnn") or "_" in name.partition(".")[2]:  # variants have the colour of the first
            continue
        blocks: dict[str, list[float]] = {}
        for layer, rate in one["layers"].items():
            if found := re.match(r"stages\.\d+\.blocks\.\d+", layer):
                blocks.setdefault(found[0], []).append(100 * rate)
        shift, colour = 0.2 * (list(FAMILIES).index(family(name)) - 1), FAMILIES[family(name)]
        places = [block + shift for block, rates in enumerate(blocks.values(), 1) for _ in rates]
        panel, means = axes[data_of(name)], [statistics.mean(rates) for rates in blocks.values()]
        panel.plot(places, [r for rates in blocks.values() for r in rates], ".", color=colour, alpha=0.45, ms=6)
        label = f"{name.partition('.')[0]}: {100 * one['all']:.1f} % in all"
        panel.plot(np.arange(1, len(means) + 1) + shift, means, "-", color=colour, label=label, lw=2)
    for panel in axes.values():
        panel.set(xticks=range(1, 13), yticks=range(0, 50, 10), ylim=(-1, 49))
        panel.tick_params(labelbottom=True)
        panel.legend(fontsize=9, loc="upper right")
    figure.supxlabel("block (dots: its layers of neurons; line: their mean)", fontsize=11)
    figure.supylabel("spike rate (% of the neurons that fire)", fontsize=11)
    return figure


def draw_curves() -> Figure:
    """Accuracy on held-out images by epoch of the long trainings of ``trainings.jsonl``, as validated: exact spikes.

    A training that goes on from another of its kind is drawn behind that one.
    """
    lines = [json.loads(line) for line in TRAININGS.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8.5, 7.6), layout="constrained")
    places = dict(zip(("cifar10", "cifar100"), figure.subplots(2, 1), strict=True))
    for line in (line for line in lines if "curve" in line):
        axes, before, legend = places[line["data"].partition(",")[0]], line.get("epochs_before", 0), line["legend"]
        epochs, top1 = zip(*line["curve"], strict=True)
        epochs = [before + epoch for epoch in epochs]
        style = ":" if "Muon" in legend else "--" if "ReLU" in legend else "-"
        look = {"color": FAMILIES[legend.partition(",")[0]], "lw": 3.0 if "recipe" in legend else 1.6}
        axes.plot(epochs, top1, style, label=None if before else legend, **look)
        axes.plot(epochs[top1.index(max(top1))], max(top1), "*", ms=11, mec="black", mew=0.6, **look)
    for (name, axes), lowest in zip(places.items(), (50, 30), strict=True):
        axes.set(title=f"CIFAR-{name.removeprefix('cifar')}", xlim=(0, None), ylim=(lowest, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.2)
    figure.suptitle("Long trainings, with exact spikes at each validation (star: best epoch of each)", fontsize=12)
    figure.supxlabel("epoch", fontsize=11)
    figure.supylabel("top-1 on 2,500 held-out images (%)", fontsize=11)
    return figure


def energy_table(measured: dict[str, Any]) -> str:
    """Return operations and energy of one image, of the entry and its baselines, as a Markdown table."""
    columns = measured["columns"]
    own = columns["network"]

    def millions(field: str) -> list[str]:
        found = (one["counts"][field] for one in columns.values())
        return [f"{value / 1e6:.3g} M" if value else "0" for value in found]

    def joules(values: dict[str, float]) -> list[str]:
        ours = values["network"]
        return [
            f"{1e6 * value:.0f} µJ" + (f" ({value / ours:.1f} times)" if name != "network" else "")
            for name, value in values.items()
        ]

    head = ["under `cmos_45nm`", "this network", "ReLU baseline, same weights", "LIF neurons, T = 4"]
    rows = [
        ["accumulates", *millions("accumulates")],
        ["multiply-accumulates", *millions("multiply_accumulates")],
        ["membrane updates", *millions("membrane_updates")],
        ["evaluations of Omega", *millions("omega")],
        [
            "spike rate of a time step",
            *(f"{100 * r:.1f} %" if (r := one["spike_rate"]) else "-" for one in columns.values()),
        ],
    ]
    for way, title in FACTORS.items():
        rows.append([f"energy, {title}", *joules({name: one["energies"][way] for name, one in columns.items()})])
    parts = {kind: joule for kind, joule in own["energy"].items() if joule and kind not in ("total", "skipping_zeros")}
    named = ", ".join(f"{kind} {1e6 * joule:.0f}" for kind, joule in parts.items())
    total = f"Of the network's {1e6 * own['energy']['total']:.0f} µJ of arithmetic: {named}."
    return f"{markdown(head, rows)}\n\n{total}"


def draw() -> None:
    """Write the pictures, and the table of ``energy.md``."""
    measured, found = json.loads(MEASURED.read_text(encoding="utf-8")), membranes()
    fill(DOCS / "energy.md", "energy", energy_table(measured))
    figures = {
        "windows": draw_visits(),
        "omega_surfaces": draw_projections(),
        "pictures/levels": draw_levels(),
        "pictures/membranes": draw_windows(found),
        "pictures/neuron": draw_neuron(found),
        "pictures/accuracy_energy": draw_energy(),
        "pictures/spike_rates": draw_rates(measured),
        "pictures/curves": draw_curves(),
    }
    for name, figure in figures.items():
        figure.savefig(DOCS / f"{name}.png", dpi=90 if name == "omega_surfaces" else 150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure")
    for data in ("--cifar100", "--cifar10", "--spoken-digits"):
        measuring.add_argument(data, required=True, help="its folder")
    verbs.add_parser("draw")
    given = parser.parse_args()
    if given.verb == "measure":
        measure({"CIFAR100": given.cifar100, "CIFAR10": given.cifar10, "SpokenDigits": given.spoken_digits})
    else:
        draw()
