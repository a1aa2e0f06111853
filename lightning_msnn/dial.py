"""``lightning-msnn dial <zoo name or checkpoint> --energy 0.5``: a trained network that needs less energy.

The law of spike rates says by how much all thresholds must rise for the energy that is wanted; then the norms, and
nothing else, learn for an epoch with the network as it was as teacher.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_msnn import data, zoo
from lightning_msnn.energy import count_operations, energy, evenly
from lightning_msnn.energy.expected import EnergyLaw
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.imports import HELP, explained, import_files
from lightning_msnn.report import load_task
from lightning_msnn.tasks import SpikingClassifier

__all__ = ["dial", "main", "make_parser", "raise_thresholds"]

_FURTHEST = 4.0  # deviations
_NORMS = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def raise_thresholds(network: nn.Module, law: EnergyLaw, joules: float) -> float:
    """Lower the shift of all batch norms before neurons so far that the law expects an energy.

    The threshold rises by as many deviations of the current in each channel, so that rare spikes are lost first. It is
    the shift that moves, since a network may share one threshold, and folding makes thresholds of it.

    Args:
        network: The network; its norms change.
        law: Its law.
        joules: Energy that is wanted.

    Returns:
        By how many deviations of the current thresholds rise.

    Raises:
        ConfigurationError: If the energy cannot be reached so.
    """
    norms = law.rates.norms
    shifts = [norm.bias.clone() for norm in norms]

    def expected(deviations: float) -> float:
        for norm, shift in zip(norms, shifts, strict=True):
            norm.bias.copy_(shift - deviations * norm.weight.abs())
        return float(law.joules(law.rates()))

    low, high = -_FURTHEST, _FURTHEST
    least, most = expected(high), expected(low)
    if not least < joules < most:
        expected(0.0)
        raise ConfigurationError(
            f"the energy must be between {least:.3g} and {most:.3g} joules, which is as far as thresholds are moved, "
            f"not {joules:.3g}"
        )
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > joules else (low, middle)
    return (low + high) / 2


def _measured(network: nn.Module, datamodule: Any, samples: int) -> float:
    """Joules of a test image, by the counting engine."""
    joules, number = 0.0, 0
    for images in evenly(datamodule, samples):
        joules += float(energy(count_operations(network, images))) * len(images)
        number += len(images)
    return joules / number


def dial(
    name: str,
    share: float,
    output: str | Path,
    root: str | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    samples: int = 128,
    **trainer: Any,
) -> dict[str, Any]:
    """Bring the energy of a trained network to a share of what it is.

    Args:
        name: Name of a zoo entry, or path of a checkpoint of ``lightning-msnn fit``.
        share: Energy that is wanted, as a share of what is measured, in (0, 1).
        output: The checkpoint that is written; it must not exist.
        root: Folder of the data, by default that of the checkpoint or of the data set.
        epochs: Epochs in which the norms learn; with 0 thresholds are moved alone.
        lr: Learning rate of the norms.
        samples: Test images whose energy is measured.
        **trainer: Further arguments of the Trainer.

    Returns:
        Energy in joules and top-1 in percent, each ``before`` and ``after``; ``target`` in joules; ``deviations`` by
        which the law had thresholds rise; the ``checkpoint``.

    Raises:
        ConfigurationError: If an argument is not allowed, there is no such network or data, or the law of spike rates
            does not know the network.
    """
    if not (isinstance(share, int | float) and 0.0 < share < 1.0):
        raise ConfigurationError(f"energy must be a share of what the network needs, in (0, 1), not {share}")
    check_integer("epochs", epochs, 0)
    check_integer("samples", samples, 1)
    path = Path(output)
    if path.exists() or path.suffix != ".ckpt":
        raise ConfigurationError(f"output must be a .ckpt file that does not exist, not {str(path)!r}")
    task, kind, arguments = load_task(name)
    if not isinstance(task, SpikingClassifier):
        raise ConfigurationError(f"a dial is turned for a top-1, so {name!r} must be a classifier, not a forecaster")
    network = task.network
    datamodule = getattr(data, kind)(**arguments | ({} if root is None else {"root": root}))
    datamodule.check("fit")
    law = EnergyLaw(network, (datamodule.in_chans, datamodule.image_size, datamodule.image_size))
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    before = _measured(network, datamodule, samples)
    top1 = zoo.evaluate(task, datamodule)["top1"]
    target = share * before
    # What is measured differs from the law by a factor that thresholds hardly change.
    with torch.no_grad():
        ratio = before / float(law.joules(law.rates()))
    deviations = raise_thresholds(network, law, target / ratio)
    fixed = [
        module_name
        for module_name, module in network.named_modules()
        if module_name and not isinstance(module, _NORMS) and any(True for _ in module.parameters(recurse=False))
    ]
    hparams = dict(task.hparams) | {
        "freeze": fixed, "init_from": None, "lr": lr, "lr_base_size": None, "layer_decay": None,
        "schedule": "cosine", "warmup_epochs": 0.1, "mixup": 0.0, "cutmix": 0.0, "target_rate": None,
        "target_energy": target, "teacher": name, "teacher_weight": 0.9, "convert": False,
    }  # fmt: skip
    learner = SpikingClassifier(**hparams)
    learner.network.load_state_dict(network.state_dict())
    learner.class_names = task.class_names
    runner = pl.Trainer(
        max_epochs=max(1, epochs), limit_train_batches=1.0 if epochs else 0, logger=False,
        enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0, **trainer,
    )  # fmt: skip
    runner.fit(learner, datamodule=datamodule)
    path.parent.mkdir(parents=True, exist_ok=True)
    runner.save_checkpoint(path, weights_only=True)
    learner.eval()
    return {
        "before": before,
        "after": _measured(learner.network, datamodule, samples),
        "target": target,
        "deviations": deviations,
        "top1_before": top1,
        "top1_after": zoo.evaluate(learner, datamodule)["top1"],
        "checkpoint": str(path),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(prog="lightning-msnn dial", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="name of a zoo entry, or path of a checkpoint of lightning-msnn fit")
    parser.add_argument("--energy", type=float, required=True, help="share of the energy that is wanted, in (0, 1)")
    parser.add_argument("--output", default="dialled.ckpt", help="the checkpoint (default: dialled.ckpt)")
    parser.add_argument("--root", help="folder of the data (default: that of the checkpoint or of the data set)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs in which the norms learn (default: 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the norms (default: 0.001)")
    parser.add_argument("--precision", default="32-true", help="precision of the training (default: 32-true)")
    parser.add_argument("--imports", action="append", default=[], help=HELP)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the verb."""
    given = make_parser().parse_args(args)
    try:
        import_files(given.imports)
        found = dial(
            given.name, given.energy, given.output, given.root, given.epochs, given.lr, precision=given.precision
        )
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)
    sys.stdout.write(
        f"energy of an image {found['before']:.3g} J before, {found['after']:.3g} J after, "
        f"{found['target']:.3g} J wanted\n"
        f"top-1 {found['top1_before']:.2f} % before, {found['top1_after']:.2f} % after\n"
        f"thresholds rose by {found['deviations']:.2f} deviations of the current; written to {found['checkpoint']}\n"
    )
