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
from lightning_msnn.zoo.verification import verify

__all__ = ["main"]


def _run(given: argparse.Namespace) -> str:
    """Do what the command line asks for; return what it prints."""
    import_files(given.imports)
    if given.command == "list":
        known = list_models(given.filter)
        rows = [f"{name:32s} {info(name).get('top1', '-')!s:>6} % top-1" for name in known]
        if given.all:
            rows += [name for name in list_models(given.filter, pretrained=False) if name not in known]
        return "\n".join(rows) or "no entry matches"
    if given.command == "info":
        return json.dumps(info(given.name), indent=2)
    if given.command == "table":
        return table(list_models())
    if given.command == "export":
        try:
            fields = json.loads(Path(given.fields).read_text(encoding="utf-8")) if given.fields else {}
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read the fields {given.fields!r}: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigurationError(f"{given.fields!r} must hold an object of JSON, not {type(fields).__name__}")
        if own := sorted(signature(export).parameters.keys() & fields.keys()):
            raise ConfigurationError(f"{own[0]!r} must not be in {given.fields!r}: it is an option of the command")
        folder = export(given.checkpoint, given.name, given.folder, given.dtype, **fields)
        try:
            found = measure(folder, given.data)
        except BaseException:  # also where it is interrupted: an entry without figures is none
            shutil.rmtree(folder)
            raise
        return f"{folder} made ({read_config(folder)['weights']} weights): {_accuracy(found)}"
    folder = find(given.name)
    if getattr(given, "device", None) is not None:
        check_device(given.device)
    if given.command == "verify":
        found = verify(given.name, given.data, given.batch_size, given.device, given.fuse)
        return f"{folder.name} is what its card says: {_accuracy(found)}"
    if given.command == "measure":
        return f"{folder.name} measured anew: {_accuracy(measure(given.name, given.data, given.device))}"
    write_card(folder)
    return f"card of {folder.name} written"


def _accuracy(found: dict[str, Any]) -> str:
    return f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on {found['top1_images']} test samples"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the zoo.

    Args:
        args: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_msnn.zoo", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="entries and their accuracy")
    listing.add_argument("filter", nargs="?", default="*", help="pattern of shell wildcards")
    listing.add_argument("--all", action="store_true", help="untrained architectures too")
    commands.add_parser("table", help="accuracy, spike rate and energy of all entries, in Markdown")
    for name, text in (
        ("info", "config.json of an entry"),
        ("verify", "measure an entry on its test set; fails if any figure of its card is wrong"),
        ("measure", "measure an entry on its test set, and write figures, picture and card anew"),
        ("card", "write the model card of an entry anew from its config.json"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", help="name of the entry")
        if name in ("verify", "measure"):
            command.add_argument("--data", "--root", help="folder of the data set (digits need none)")
            command.add_argument("--device", help="device to evaluate on")
        if name == "verify":
            command.add_argument("--batch_size", type=int, default=250)
            command.add_argument("--fuse", action="store_true", help="accuracy with batch norm folded")
    exporting = commands.add_parser("export", help="make an entry of a checkpoint, measure it and write its card")
    exporting.add_argument("checkpoint", help="checkpoint of lightning-msnn fit")
    exporting.add_argument("name", help="<architecture>.<tag>")
    exporting.add_argument("--data", "--root", help="folder of the data set (digits need none)")
    exporting.add_argument("--folder", default="zoo", help="folder of the zoo (default: zoo)")
    exporting.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights in the file; the figures are theirs"
    )
    exporting.add_argument("--fields", help="JSON file of further fields: command, recipe, epochs, seed, hardware, ...")
    for command in commands.choices.values():
        command.add_argument("--imports", action="append", default=[], help=HELP)
    given = parser.parse_args(args)
    try:
        sys.stdout.write(f"{_run(given)}\n")
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
