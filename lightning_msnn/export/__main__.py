"""``lightning-msnn export``: take a trained network elsewhere."""

import argparse
import sys

from lightning_msnn.export.exporting import export
from lightning_msnn_cli import main

__all__ = ["run"]


def run(options: argparse.Namespace) -> str:
    """Export a network as the command line says, and return what is printed."""
    given = {name: value for name, value in vars(options).items() if name != "imports"}
    report = export(**given)
    lines = [
        f"{given['source']} written as {given['to']} to {report.path} ({report.size / 2**20:.2f} MB)",
        f"run again by {report.runtime} on {report.images} {report.what}: {report.differ} have another class, "
        f"the largest difference of logits is {report.largest:.2g}",
    ]
    if report.top1 is not None:
        lines.append(f"top-1 of them {report.top1[0]:.2f} % before, {report.top1[1]:.2f} % in the file")
    return "\n".join(lines)


if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
