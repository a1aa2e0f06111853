"""The zoo: trained networks by name, verified by hash, and their export from a Lightning checkpoint."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_msnn.entries import find, read_config
from lightning_msnn.errors import ConfigurationError, check_device
from lightning_msnn.imports import HELP, explained, import_files
from lightning_msnn.zoo.card import table, write_card
from lightning_msnn.zoo.exporting import export, measure
from lightning_msnn.zoo.loading import info, list_models
from lightning_msnn.zoo.storing import DTYPES
from lightning_msnn.zoo.verification import BATCH, verify

__all__ = ["main"]


def _list(given: argparse.Namespace) -> str:
    known = list_models(given.filter)
    rows = [f"{name:32s} {info(name).get('top1', '-')!s:>6} % top-1" for name in known]
    if given.all:
        rows += [name for name in list_models(given.filter, pretrained=False) if name not in known]
    return "\n".join(rows) or "no entry matches"


def _export(given: argparse.Namespace) -> str:
    try:
        fields = json.loads(Path(given.fields).read_text(encoding="utf-8")) if given.fields else {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the fields {given.fields!r}: {error}") from error
    if own := sorted(signature(export).parameters.keys() & fields):
        raise ConfigurationError(f"{own[0]!r} must not be in {given.fields!r}: it is an option of the command")
    folder = export(given.checkpoint, given.name, given.folder, given.dtype, **fields)
    try:
        found = measure(folder, given.data)
    except BaseException:  # also where it is interrupted: an entry without figures is none
        shutil.rmtree(folder)
        raise
    return f"{folder} made ({read_config(folder)['weights']} weights): {_accuracy(found)}"


def _verify(given: argparse.Namespace) -> str:
    found = verify(given.name, given.data, given.batch_size, given.device, given.fuse)
    return f"{find(given.name).name} is what its card says: {_accuracy(found)}"


def _measure(given: argparse.Namespace) -> str:
    return f"{find(given.name).name} measured anew: {_accuracy(measure(given.name, given.data, given.device))}"


def _card(given: argparse.Namespace) -> str:
    folder = find(given.name)
    write_card(folder)
    return f"card of {folder.name} written"


def _accuracy(found: dict[str, Any]) -> str:
    return f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on {found['top1_images']} test samples"


_COMMANDS = {
    "list": (_list, "entries and their accuracy"),
    "table": (lambda _: table(list_models()), "accuracy, spike rate and energy of all entries, in Markdown"),
    "info": (lambda given: json.dumps(info(given.name), indent=2), "config.json of an entry"),
    "verify": (_verify, "measure an entry on its test set; fails if any figure of its card is wrong"),
    "measure": (_measure, "measure an entry on its test set, and write figures, picture and card anew"),
    "card": (_card, "write the model card of an entry anew from its config.json"),
    "export": (_export, "make an entry of a checkpoint, measure it and write its card"),
}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_msnn.zoo", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, help=text) for name, (_, text) in _COMMANDS.items()}
    made["list"].add_argument("filter", nargs="?", default="*", help="pattern of shell wildcards")
    made["list"].add_argument("--all", action="store_true", help="untrained architectures too")
    made["export"].add_argument("checkpoint", help="checkpoint of lightning-msnn fit")
    for name in ("info", "verify", "measure", "card", "export"):
        made[name].add_argument("name", help="name of the entry, <architecture>.<tag>")
    for name in ("verify", "measure", "export"):
        made[name].add_argument("--data", "--root", help="folder of the data set (digits need none)")
    for name in ("verify", "measure"):
        made[name].add_argument("--device", help="device to evaluate on")
    made["verify"].add_argument("--batch_size", type=int, default=BATCH)
    made["verify"].add_argument("--fuse", action="store_true", help="accuracy with batch norm folded")
    made["export"].add_argument("--folder", default="zoo", help="folder of the zoo (default: zoo)")
    made["export"].add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights in the file; the figures are theirs"
    )
    made["export"].add_argument("--fields", help="JSON file of further fields: command, recipe, hardware, ...")
    for command in made.values():
        command.add_argument("--imports", action="append", default=[], help=HELP)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the zoo.

    Args:
        args: Arguments, those of the process if None.
    """
    try:
        given = _make_parser().parse_args(args)
        import_files(given.imports)
        if getattr(given, "device", None):
            check_device(given.device)
        sys.stdout.write(f"{_COMMANDS[given.command][0](given)}\n")
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
