"""``lightning-msnn zoo``: entries by name, verified by hash, and their export from a Lightning checkpoint."""

import argparse
import json
import shutil
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import lightning_msnn_cli as command
from lightning_msnn.entries import find, read_config
from lightning_msnn.errors import ConfigurationError, check_device
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.zoo.card import data_set, ranked, results, table, write_card
from lightning_msnn.zoo.exporting import export, measure
from lightning_msnn.zoo.loading import info, list_models
from lightning_msnn.zoo.verification import verify

__all__ = ["run"]


def _list(given: argparse.Namespace) -> str:
    rows = []
    for name in ranked(list_models(given.filter)):
        config = info(name)
        rows.append(f"{name:32s} {data_set(config):14s} {config.get('top1', '-')!s:>6} % top-1")
    return "\n".join(rows) or "no entry matches"


def _export(given: argparse.Namespace) -> str:
    try:
        fields = json.loads(Path(given.fields).read_text(encoding="utf-8")) if given.fields else {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the fields {given.fields!r}: {error}") from error
    if own := sorted(signature(export).parameters.keys() & fields):
        raise ConfigurationError(f"{own[0]!r} must not be in {given.fields!r}: it is an option of the command")
    folder = export(given.checkpoint, given.name, given.out, given.dtype, **fields)
    try:
        found = measure(folder, given.root, given.device)
    except BaseException:  # also where it is interrupted: an entry without figures is none
        shutil.rmtree(folder)
        raise
    return f"{folder} made ({read_config(folder)['weights']} weights): {_accuracy(found)}"


def _table(given: argparse.Namespace) -> str:
    if given.out is None:
        return table(list_models())
    write_whole(results(list_models()).encode(), given.out)
    return f"results written to {given.out}"


def _verify(given: argparse.Namespace) -> str:
    found = verify(given.name, given.root, given.batch_size, given.device)
    return f"{find(given.name).name} is what its card says: {_accuracy(found)}"


def _measure(given: argparse.Namespace) -> str:
    return f"{find(given.name).name} measured anew: {_accuracy(measure(given.name, given.root, given.device))}"


def _card(given: argparse.Namespace) -> str:
    folder = find(given.name)
    write_card(folder)
    return f"card of {folder.name} written"


def _accuracy(found: dict[str, Any]) -> str:
    return f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on {found['top1_images']} test samples"


_COMMANDS = {
    "list": _list,
    "table": _table,
    "info": lambda given: json.dumps(info(given.name), indent=2),
    "verify": _verify,
    "measure": _measure,
    "card": _card,
    "export": _export,
}


def run(options: argparse.Namespace) -> str:
    """Run a command of the zoo as the command line says, and return what is printed."""
    if getattr(options, "device", None):
        check_device(options.device)
    return _COMMANDS[options.command](options)


if __name__ == "__main__":
    command.main(["zoo", *sys.argv[1:]])
