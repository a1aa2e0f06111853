"""``lightning-msnn export``: take a trained network elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_msnn.errors import ConfigurationError, VerbParser
from lightning_msnn.export.exporting import FORMATS, Report, export
from lightning_msnn.imports import HELP, explained, import_files

__all__ = ["main", "make_parser"]


def _summary(source: str, to: str, report: Report) -> str:
    """Describe an export for the command line."""
    lines = [
        f"{source} written as {to} to {report.path} ({report.size / 2**20:.2f} MB)",
        f"run again by {report.runtime} on {report.images} {report.what}: {report.differ} have another class, "
        f"the largest difference of logits is {report.largest:.2g}",
    ]
    if report.top1 is not None:
        lines.append(f"top-1 of them {report.top1[0]:.2f} % before, {report.top1[1]:.2f} % in the file")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb, whose errors are configuration errors."""
    parser = VerbParser(
        prog="lightning-msnn export",
        allow_abbrev=False,
        description="Write a trained network in another format, once the other runtime has run the file. If it finds "
        "other classes than rounding explains, nothing is written.",
    )
    parser.add_argument("source", help="checkpoint (.ckpt) of lightning-msnn fit, or name of a zoo entry")
    suffixes = ", ".join(f"{name} ({form.suffix})" for name, form in FORMATS.items())
    parser.add_argument("--to", required=True, metavar="FORMAT", help=suffixes)
    parser.add_argument("--out", required=True, metavar="PATH", help="the file; it must not exist")
    parser.add_argument(
        "--data", "--root", metavar="FOLDER", help="folder of the network's data set, whose test images are run"
    )
    parser.add_argument("--images", metavar="FOLDER", help="images to run instead; without either, random ones")
    parser.add_argument(
        "--image_size", type=int, metavar="N", help="side of the images, for checkpoints that do not say it"
    )
    parser.add_argument("--imports", action="append", default=[], metavar="FILE", help=HELP)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of exports.

    Args:
        args: Arguments, those of the process if None.
    """
    try:
        given = vars(make_parser().parse_args(args))
        import_files(given.pop("imports"))
        report = export(**given)
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)
    sys.stdout.write(f"{_summary(given['source'], given['to'], report)}\n")


if __name__ == "__main__":
    main()
