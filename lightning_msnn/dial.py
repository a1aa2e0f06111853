"""``lightning-msnn dial <zoo name or checkpoint> --operations 0.5``: a trained network that needs less, by ``fit``.

What the network costs is counted on test images; the arguments of a training towards a share of that are put before
those that are given. The network starts as it is, and is its own teacher.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_msnn import data, zoo
from lightning_msnn.energy import NETWORK, energy, evenly, synaptic_operations
from lightning_msnn.energy.expected import CostOfRates
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError, VerbParser, check_integer
from lightning_msnn.imports import HELP, import_files
from lightning_msnn.report import load_task, make_test_data
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier

__all__ = ["SETTINGS", "fit_arguments", "make_parser"]

SETTINGS: dict[str, Any] = {
    "run.name": "dial",
    "run.ema": 0.99,
    "run.monitors": False,
    "model.teacher_weight": 0.9,
    "model.label_smoothing": 0.0,
    "model.lr": 0.002,
    "model.schedule": "cosine",
    "model.warmup_epochs": 0.5,
    "data.batch_size": 128,
    "trainer.max_epochs": 5,
    "trainer.log_every_n_steps": 20,
}
"""Options of the training, in whose place others can be given."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb, whose errors are configuration errors."""
    settings = ", ".join(f"{name} {value}" for name, value in SETTINGS.items())
    parser = VerbParser(
        prog="lightning-msnn dial",
        allow_abbrev=False,
        description="Train a trained network towards a share of its energy or of its synaptic operations. All other "
        f"options are those of lightning-msnn fit; unless they are given: {settings}.",
    )
    parser.add_argument("source", help="name of a zoo entry, or checkpoint (.ckpt) of lightning-msnn fit")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--energy", type=float, metavar="SHARE", help="share of its joules, in (0, 1)")
    target.add_argument("--operations", type=float, metavar="SHARE", help="share of its accumulates, in (0, 1)")
    parser.add_argument("--root", metavar="FOLDER", help="folder of the data (default: that of the data set)")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="test images to count (default: 256)")
    parser.add_argument("--imports", action="append", default=[], metavar="FILE", help=HELP)
    return parser


def _target(task: SpikingClassifier, datamodule: Any, share: float, of_energy: bool, samples: int) -> float:
    """Joules of an image, or its rate weighted by operations, that a training is to reach."""
    seen = [task.seen(inputs) for inputs in evenly(datamodule, samples)]
    cost = CostOfRates(task.network, seen[0][:1])
    record = compare(task.network, lambda images: {}, seen, samples)[0][NETWORK]
    if not of_energy:
        return share * float(synaptic_operations(record)["accumulates"]) / cost.most
    joules = float(energy(record))
    if share * joules <= cost.least:
        raise ConfigurationError(
            f"energy must be above {cost.least / joules:.3f}, the share that is left if no neuron fires, not {share}"
        )
    return share * joules


def fit_arguments(args: Sequence[str]) -> list[str]:
    """Return the arguments of ``lightning-msnn fit`` that turn the dial.

    Args:
        args: Arguments of the verb.

    Raises:
        ConfigurationError: If an argument is not allowed, there is no such network or data, or the network has no
            neurons.
    """
    given, rest = make_parser().parse_known_args(args)
    of_energy = given.energy is not None
    share = given.energy if of_energy else given.operations
    if not 0.0 < share < 1.0:
        name = "energy" if of_energy else "operations"
        raise ConfigurationError(f"{name} must be a share of what the network needs now, in (0, 1), not {share}")
    check_integer("samples", given.samples, 1)
    imports = import_files(given.imports)
    of_checkpoint = given.source.endswith(".ckpt")
    if not of_checkpoint and Path(given.source).is_file():
        raise ConfigurationError(f"a checkpoint must be a file .ckpt, as teachers are, not {given.source!r}")
    task, kind, of_data = load_task(given.source, given.root)
    if not of_checkpoint:  # images that the entry has seen must not choose what is kept
        settings = zoo.info(given.source).get("settings", {})
        if "val_fraction" in settings:
            of_data["val_fraction"] = settings["val_fraction"]
    if not isinstance(task, SpikingClassifier):
        raise ConfigurationError(f"dial is for classifiers, whose teacher they are, and {given.source!r} is none")
    datamodule = make_test_data(task, kind, of_data)
    target = _target(task, datamodule, share, of_energy, given.samples)
    network = str(task.hparams["network"])
    if of_checkpoint:  # a fixed theta may be another than the one that the training began with
        trained = network_of(read_checkpoint(given.source), given.source, network)
        made = dict(getattr(trained, "arguments", {})) or dict(task.hparams["network_kwargs"] or {})
        made = {name: value for name, value in made.items() if name not in ("num_classes", "in_chans")}
        start = {"network": network.partition(".")[0], "network_kwargs": made, "init_from": given.source}
    else:
        start = {"network": network, "pretrained": True}
    start |= {"teacher": given.source, "target_energy" if of_energy else "target_rate": float(f"{target:.4g}")}
    return [
        "fit",
        *(["--run.imports", json.dumps(imports)] if imports else []),
        *(f"--{name}={_text(value)}" for name, value in SETTINGS.items()),
        "--data",
        f"{data.__name__}.{kind}",
        *(f"--data.{name}={_text(value)}" for name, value in of_data.items()),
        *(f"--model.{name}={_text(value)}" for name, value in start.items()),
        *rest,
    ]


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
