"""What the parts of the method and of its training are worth.

    python -m benchmarks.experiments run digits
    python -m benchmarks.experiments run cifar100_tenth --root data/cifar100
    python -m benchmarks.experiments run cifar100 --root data/cifar100
    python -m benchmarks.experiments run recipe --root data/cifar100
    python -m benchmarks.experiments report

``run`` appends a line of JSON to ``docs/experiments.jsonl`` for each training that ends, and leaves out those that are
there: it can be stopped and started again at any time. ``--share 1/2`` runs every second one, for two processes side
by side. ``report`` turns the lines into ``docs/experiments.md`` and its pictures.

Accuracy is that of images held out of the training set; no test image is read. One recipe for all but ``recipe``, whose
settings are what it asks about: AdamW, one-cycle learning rate with a peak of 0.004, weight decay 0.05, label smoothing
0.1, flips and crops (CIFAR) or crops (digits).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from benchmarks.pages import fill
from lightning_msnn.callbacks import SpikeAnnealing
from lightning_msnn.data import CIFAR100, Digits
from lightning_msnn.data.datasets import Loader, collate
from lightning_msnn.energy import OperationCounter, spike_rate
from lightning_msnn.functional import PROJECTIONS
from lightning_msnn.functional.projection import WITHOUT_THETA
from lightning_msnn.models.msnn import WINDOW_SCHEDULES
from lightning_msnn.nn import CONTEXTS
from lightning_msnn.runs import LastCheckpoint, RandomState
from lightning_msnn.tasks import SpikingClassifier

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "experiments.jsonl"
THETAS = (0.1, 0.25, 0.3, 0.5, 0.7, 0.9, "learnt")
TAUS = (0.1, 0.2, 0.4, "learnt")
SEEDS = (0, 1, 2)
EPOCHS = {"digits": 3, "cifar100_tenth": 6, "cifar100": 10, "recipe": 5}
FAMILIES = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
RECURRENT = ("lstm", "spiking_lstm", "gru", "spiking_gru")
RECIPE = {"lr": 0.004, "weight_decay": 0.05, "label_smoothing": 0.1, "schedule": "one_cycle", "warmup_epochs": 2}


def small_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of the tiny networks by name: the network and its arguments; the defaults come once."""
    resnet = {"network": "msnn_resnet12_tiny"}
    settings: dict[str, dict[str, Any]] = {"default": resnet}
    for name in FAMILIES[1:]:
        settings[f"family {name}"] = {"network": f"{name}_tiny"}
    settings |= {f"cell {cell}": {"network": "msnn_rnn12_tiny", "cell": cell} for cell in RECURRENT}
    settings |= {f"windows {w}": {**resnet, "windows": w} for w in WINDOW_SCHEDULES if w != "alternate"}
    settings |= {f"context {c}": {**resnet, "context": c} for c in CONTEXTS if c != "shared"}
    for tau in TAUS[:-1]:
        settings[f"tau {tau}"] = {**resnet, "tau": tau, "learn_tau": False}
    # The decay multiplies the projection: at the paper's 0.4 it counts for more than at the default.
    omega = {**resnet, "tau": 0.4, "learn_tau": False}
    for projection in PROJECTIONS:
        if projection in WITHOUT_THETA:
            settings[f"projection {projection}"] = {**omega, "projection": projection}
            continue
        for theta in THETAS:
            more = {"theta": 0.25, "learn_theta": True} if theta == "learnt" else {"theta": theta}
            settings[f"projection {projection} theta {theta}"] = {**omega, "projection": projection, **more}
    return settings


LARGE: dict[str, dict[str, Any]] = {
    f"windows {windows}": {"network": "msnn_resnet12", "windows": windows}
    for windows in ("single", "alternate_grid", "alternate", "grid")
}
"""Settings of the large network: those that did best with the tiny ones, and the plain one-step network."""


ANNEALED: dict[str, Any] = {"kind": "rectifier", "until": 0.6}
BASE: dict[str, Any] = {
    "task": {"weight_decay": 0.1},
    "annealing": ANNEALED,
    "network": {"widths": (24, 48, 96, 192)},
    "data": {"batch_size": 128, "image_size": 24},
}
"""What recipes are compared on: half the channels and small images, so that so many trainings are a matter of hours."""
TWIN = "the ReLU twin"
"""The setting whose checkpoint is the teacher, and the start, of those that have one."""
STRONGER = "the ReLU twin with twice the channels"
"""The setting whose checkpoint is a stronger teacher."""
MUON_TWIN = f"{TWIN}, Muon, lr 0.02, batch 512"
"""The setting whose checkpoint is the teacher, and the start, where Muon trains both."""


def recipes() -> dict[str, dict[str, Any]]:
    """Return what recipes are compared for ``msnn_resnet12``; each but the first changes one thing of the first.

    ``task`` holds arguments of :class:`SpikingClassifier`, ``annealing`` those of :class:`SpikeAnnealing`, ``data``
    those of :class:`CIFAR100`, ``network`` those of the network. A value of ``TWIN``, ``STRONGER`` or
    ``MUON_TWIN`` is the checkpoint of that setting.
    """
    taught = {"teacher": TWIN}
    sgd = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
    muon, large = {"optimizer": "muon", "lr": 0.02}, {"batch_size": 512}
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, without: str = "", **parts: Any) -> None:
        found[name] = {part: {**value, **parts.get(part, {})} for part, value in BASE.items() if part != without}

    add("annealed from a rectifier over 60 %")
    add("steps from the start", without="annealing")
    add(TWIN, without="annealing", task={"twin": "relu"})
    add(STRONGER, without="annealing", task={"twin": "relu"}, network={"widths": (48, 96, 192, 384)})
    add("taught by the twin, weight 0.5, temperature 2", task=taught)
    add("taught by the stronger twin, weight 0.5, temperature 2", task={"teacher": STRONGER})
    add("from the twin", task={"init_from": TWIN})
    add("from the twin and taught by it", task={"init_from": TWIN, **taught})
    add("from the twin and taught by it, its blocks too", task={"init_from": TWIN, **taught, "teacher_features": 1.0})
    add("from the twin and taught by it, steps from the start", without="annealing", task={"init_from": TWIN, **taught})
    add("before: SGD, lr 0.1, decay 5e-4, steps from the start", without="annealing", task=sgd)
    for kind in ("ramp", "graded"):
        add(f"annealed from {kind}", annealing={"kind": kind})
    for until in (0.3, 0.9):
        add(f"annealed over {until:.0%}", annealing={"until": until})
    add("annealed along a cosine", annealing={"shape": "cosine"})
    for weight, temperature in ((0.8, 2.0), (1.0, 2.0), (0.5, 1.0), (0.5, 4.0)):
        more = {"teacher_weight": weight, "teacher_temperature": temperature}
        add(f"taught by the twin, weight {weight}, temperature {temperature:g}", task={**taught, **more})
    for surrogate in ("rectangular", "arctan", "sigmoid"):
        add(f"surrogate {surrogate}", network={"surrogate": surrogate})
    for threshold in (0.25, 1.0):
        add(f"threshold {threshold}", network={"threshold": threshold})
    for lr in (0.002, 0.008):
        add(f"lr {lr}", task={"lr": lr})
    for decay in (0.02, 0.3):
        add(f"weight decay {decay}", task={"weight_decay": decay})
    for batch in (64, 256, 512):
        add(f"batch {batch}", data={"batch_size": batch})
    add("SGD, lr 0.1, decay 5e-4", task=sgd)
    for lr in (0.004, 0.02, 0.05):
        add(f"Muon, lr {lr}, batch 512", task={**muon, "lr": lr}, data=large)
    add("Muon, lr 0.02", task=muon)
    add(MUON_TWIN, without="annealing", task={"twin": "relu", **muon}, data=large)
    for twin, name in ((TWIN, "the twin"), (MUON_TWIN, "Muon's twin")):
        task = {"init_from": twin, "teacher": twin, "teacher_features": 1.0, **muon}
        add(f"from {name} and taught by it, its blocks too, Muon, lr 0.02, batch 512", task=task, data=large)
    add("label smoothing 0", task={"label_smoothing": 0.0})
    add("cutmix on half of the batches", task={"cutmix": 1.0, "mix_prob": 0.5})
    add("mixup on half of the batches", task={"mixup": 0.2, "mix_prob": 0.5})
    add("AutoAugment", data={"policy": "autoaugment"})
    add("erasing 0.25", data={"erasing": 0.25})
    add("sizes 16, 20 and 24 by epoch", data={"train_sizes": {0: 16, 2: 20, 4: 24}})
    add("32 pixels", data={"image_size": 32})
    for windows in ("single", "alternate_grid"):
        add(f"windows {windows}", network={"windows": windows})
    add("theta learnt", network={"learn_theta": True})
    return found


class Tenth(CIFAR100):
    """A fixed tenth of CIFAR-100's training images, 50 a class, and 5,000 others to judge by."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(val_fraction=0.9, **kwargs)

    def val_dataloader(self) -> Loader:
        """Every ninth of the images held out."""
        held_out = super().val_dataloader().dataset
        return Loader(held_out.select(torch.arange(0, len(held_out), 9)), batch_size=250, collate_fn=collate)


class Judge(pl.Callback):
    """Accuracy and spike rate of the last validation, and whether the training went on from a checkpoint."""

    def __init__(self) -> None:
        self.top1 = self.rate = float("nan")
        self.resumed = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to watch the neurons."""
        self.counter = OperationCounter(pl_module.network, operations=False)
        self.counter.__enter__()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Read what they did."""
        self.counter.__exit__(None, None, None)
        self.rate = float(spike_rate(self.counter.record()))
        self.top1 = 100 * float(trainer.callback_metrics["val/top1"])


def train(data: pl.LightningDataModule, settings: dict[str, Any], seed: int, epochs: int, **options: Any) -> Judge:
    """Train one network; return what its last validation said.

    Args:
        data: Images.
        settings: ``network`` and its arguments; in ``task`` and ``annealing`` what differs in the training.
        seed: Seed of weights, order and augmentation.
        epochs: Length of the training.
        **options: Options of the Trainer; ``folder`` keeps a checkpoint of each epoch there, from which to go on.
    """
    arguments = dict(settings)
    network, folder = arguments.pop("network"), options.pop("folder", None)
    recipe, annealing = RECIPE | arguments.pop("task", {}), arguments.pop("annealing", None)
    pl.seed_everything(seed, verbose=False)
    task = SpikingClassifier(network, data.num_classes, data.in_chans, arguments, **recipe)
    judge = Judge()
    callbacks: list[pl.Callback] = [judge, *([] if annealing is None else [SpikeAnnealing(**annealing)])]
    if folder is not None:
        callbacks += [RandomState(), LastCheckpoint()]
        options["default_root_dir"] = folder
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    last = folder / "checkpoints" / "last.ckpt" if folder else None
    judge.resumed = last is not None and last.exists()
    trainer.fit(task, datamodule=data, ckpt_path=last if judge.resumed else None)
    if math.isnan(judge.top1):  # stopped after the last epoch, before its validation
        trainer.validate(task, datamodule=data, verbose=False)
    return judge


SECTIONS = {"families": "family", "windows": "windows", "context": "context", "decay tau": "tau"}
"""Tables, and how the names of their settings begin."""

DEFAULTS = {
    "families": "msnn_resnet12",
    "windows": "alternate (default)",
    "context": "shared (default)",
    "decay tau": "learnt by channel from 0.1 (default)",
}
"""What the default setting is in each of these tables."""


def lines() -> list[dict[str, Any]]:
    """Return the trainings done so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def resolved(settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Return a recipe's settings as :func:`train` takes them: the network flat, the twins by their checkpoints."""
    twins = {name: str(place(folder, name, seed) / "checkpoints" / "last.ckpt") for name in (TWIN, STRONGER, MUON_TWIN)}
    task = {key: twins.get(value, value) for key, value in settings["task"].items()}
    given = {"network": "msnn_resnet12", **settings["network"], "task": task}
    return given | {key: settings[key] for key in ("annealing",) if key in settings}


def place(folder: Path, name: str, seed: int) -> Path:
    """Return the folder of one training's checkpoint."""
    return folder / f"{name} {seed}".translate(str.maketrans(" ", "_", "%:"))


def run(arguments: argparse.Namespace) -> None:
    """Run what is still to do of one data set."""
    kept = {"cache_dir": arguments.cache, "root": arguments.root, "num_workers": 0}
    options: dict[str, Any] = {"check_val_every_n_epoch": arguments.epochs}
    data: pl.LightningDataModule
    if arguments.data == "digits":
        data = Digits(batch_size=64, image_size=16, val_fraction=0.3, num_workers=0)
    elif arguments.data == "cifar100_tenth":
        data = Tenth(batch_size=64, **kept)
    else:
        data = CIFAR100(batch_size=128, val_fraction=0.1, **kept)
        options |= {"precision": "bf16-mixed"}
    large, recipe = arguments.data == "cifar100", arguments.data == "recipe"
    settings = recipes() if recipe else LARGE if large else small_settings()
    seeds = arguments.seeds or (SEEDS[:1] if large or recipe else SEEDS)
    share, shares = (int(n) for n in arguments.share.split("/"))
    todo = [(name, seed) for seed in seeds for name in settings if arguments.only in name]
    for name, seed in todo[share % shares :: shares]:
        if any(line["data"] == arguments.data and line["name"] == name and line["seed"] == seed for line in lines()):
            continue
        start = time.perf_counter()
        given = settings[name]
        if large or recipe:
            options["folder"] = place(arguments.folder, name, seed)
        if recipe:
            data = CIFAR100(val_fraction=0.1, **kept, **given["data"])
            given = resolved(given, seed, arguments.folder)
        judge = train(data, given, seed, arguments.epochs, **options)
        line = {
            "data": arguments.data,
            "name": name,
            "seed": seed,
            "settings": settings[name],
            "epochs": arguments.epochs,
            "top1": round(judge.top1, 2),
            "spike_rate": None if math.isnan(judge.rate) else round(judge.rate, 4),  # a twin has none
            "seconds": None if judge.resumed else round(time.perf_counter() - start, 1),  # of the whole training
            "threads": torch.get_num_threads(),
            "date": date.today().isoformat(),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{name}, seed {seed}: top-1 {judge.top1:.2f} %, spike rate {judge.rate:.3f}, {line['seconds'] or '?'} s",
            flush=True,
        )


def _mean(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _rate(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" if values else "-"


def tables(done: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in done:
        results[line["data"], line["name"]].append(line)
    text = []
    groups = {title: f"default|{prefix}" for title, prefix in SECTIONS.items()}
    groups |= {"recurrent cell": "cell"} | {f"projection {name}": f"projection {name}" for name in PROJECTIONS}
    for title, prefixes in groups.items():
        head = "| setting | digits, top-1 | spike rate | a tenth of CIFAR-100, top-1 | spike rate |"
        text += [f"**{title[0].upper()}{title[1:]}**", "", head, "|---|---|---|---|---|"]
        for name in small_settings():
            if any(name == p or name.startswith(f"{p} ") for p in prefixes.split("|")):
                cells = []
                for data in ("digits", "cifar100_tenth"):
                    found = results[data, name]
                    cells += [_mean([r["top1"] for r in found]), _rate([r["spike_rate"] for r in found])]
                label = DEFAULTS[title] if name == "default" else name.removeprefix(prefixes.split("|")[-1]).strip()
                text.append(f"| {label or 'no theta'} | {' | '.join(cells)} |")
        text.append("")
    text += [
        "**msnn_resnet12 on all of CIFAR-100**",
        "",
        "| setting | top-1 | spike rate | epochs |",
        "|---|---|---|---|",
    ]
    for name in LARGE:
        for r in results["cifar100", name]:
            text.append(f"| {name} | {r['top1']:.2f} | {r['spike_rate']:.3f} | {r['epochs']} |")
    if any(line["data"] == "recipe" for line in done):
        text += [
            "",
            "**Recipes for msnn_resnet12**",
            "",
            "| setting | top-1 | spike rate | seeds |",
            "|---|---|---|---|",
        ]
    for name in recipes():
        if found := results["recipe", name]:
            rates = [r["spike_rate"] for r in found if r["spike_rate"] is not None]
            text.append(f"| {name} | {_mean([r['top1'] for r in found])} | {_rate(rates)} | {len(found)} |")
    return "\n".join(text)


def draw_surfaces(file: Path) -> None:
    """Draw each projection as a surface over both membranes, at the authors' theta."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), layout="constrained")
    grid = torch.linspace(-4, 4, 161)
    a, b = torch.meshgrid(grid, grid, indexing="xy")
    for ax, (name, omega) in zip(axes.flat, PROJECTIONS.items(), strict=False):
        value = omega(a, b, torch.tensor(0.25))
        image = ax.imshow(value, origin="lower", extent=(-4, 4, -4, 4), cmap="RdBu_r", vmin=-2, vmax=2)
        ax.contour(grid, grid, value, levels=[-1.5, -1, -0.5, 0, 0.5, 1, 1.5], colors="black", linewidths=0.5)
        ax.set(title=name, xlabel="membrane of layer 1, a", ylabel="membrane of layer 2, b")
    axes.flat[-1].axis("off")
    figure.colorbar(image, ax=axes.flat[-1], label="Omega(a, b)", extend="both", fraction=0.9)
    figure.suptitle("The projections at theta = 0.25 (in units of pi)")
    figure.savefig(file, dpi=72)


def draw_theta(done: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy and spike rate against theta, mean and spread over the seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    titles = {"digits": "digits", "cifar100_tenth": "a tenth of CIFAR-100"}
    for column, (data, title) in zip(axes.T, titles.items(), strict=True):
        for projection in sorted(set(PROJECTIONS) - WITHOUT_THETA):
            for ax, key in zip(column, ("top1", "spike_rate"), strict=True):
                points = {}
                for theta in THETAS[:-1]:
                    name = f"projection {projection} theta {theta}"
                    values = [r[key] for r in done if r["data"] == data and r["name"] == name]
                    if values:
                        points[theta] = (statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0)
                means, spreads = [p[0] for p in points.values()], [p[1] for p in points.values()]
                ax.errorbar(list(points), means, spreads, marker="o", capsize=3, label=projection)
        column[0].set(title=title, ylabel="top-1 on held-out images in %")
        column[1].set(xlabel="theta in units of pi", ylabel="spikes per neuron and image")
    axes[0, 0].legend(title="projection")
    figure.savefig(file, dpi=110)


def report() -> None:
    """Write tables and pictures into ``docs``; the words around the tables stay."""
    done = lines()
    draw_surfaces(DOCS / "omega_surfaces.png")
    draw_theta(done, DOCS / "theta.png")
    fill(DOCS / "experiments.md", "tables", tables(done))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what has not been trained yet")
    runner.add_argument("data", choices=tuple(EPOCHS))
    runner.add_argument("--root", type=Path, help="folder of CIFAR-100")
    runner.add_argument("--cache", type=Path, help="folder of the decoded images")
    runner.add_argument("--folder", type=Path, default=Path("runs/experiments"), help="checkpoints of large networks")
    runner.add_argument("--epochs", type=int, help=f"by default {EPOCHS}")
    runner.add_argument("--seeds", type=int, nargs="+", help="by default 0, 1 and 2, of large networks 0")
    runner.add_argument("--share", default="0/1", help="part/parts")
    runner.add_argument("--only", default="", help="settings whose name contains this")
    commands.add_parser("report", help="write the tables and pictures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.command == "run":
        arguments.epochs = arguments.epochs or EPOCHS[arguments.data]
        run(arguments)
    else:
        report()


if __name__ == "__main__":
    main()
