"""``lightning-msnn report <entry or checkpoint>``: what a network does and costs, as one HTML page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import date
from functools import partial
from pathlib import Path

import torch

import lightning_msnn_cli as command
from lightning_msnn import __version__, zoo
from lightning_msnn.conversion import baselines
from lightning_msnn.energy import NETWORK, SAMPLES, evenly, profile
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.energy.report import compare, page
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.runs import write_whole
from lightning_msnn.trained import load_trained

__all__ = ["run", "write_report"]


def _place(out: str | Path | None, name: str, run: Path | None) -> Path:
    """Where the page is written; a file that cannot be written is refused before any work."""
    stem = Path(name).stem if name.endswith(".ckpt") else name
    path = Path(out) if out is not None else run / f"report_{stem}.html" if run else Path(f"{stem}.html")
    place = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigurationError(f"cannot write the report to {str(path)!r}: give a file that can, by --out")
    return path


def write_report(
    name: str,
    out: str | Path | None = None,
    root: str | None = None,
    samples: int = SAMPLES,
    batch_size: int = 64,
    on: str = DEFAULT_PROFILE,
) -> Path:
    """Write the report of a network as one HTML page.

    Args:
        name: Name of a zoo entry, or path of a checkpoint of ``lightning-msnn fit``.
        out: The page, by default ``report_<checkpoint>.html`` in the folder of the checkpoint's run, else
            ``<name>.html`` in the working folder. A page that is there is replaced.
        root: Folder of the data; some data sets need none.
        samples: Test inputs that are counted, spread evenly over the classes; accuracy is measured on all.
        batch_size: Inputs of a batch when accuracy is measured.
        on: Energy profile, or a YAML file of one.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: If an argument is not allowed, the page cannot be written, or there is no such network or
            data.
    """
    check_integer("samples", samples, 1)
    profile(on)
    folder = Path(name).absolute().parent.parent
    run = folder if name.endswith(".ckpt") and (folder / "config.yaml").is_file() else None
    path = _place(out, name, run)
    trained = load_trained(name)
    data = trained.test_data(root, batch_size=batch_size)
    kind = type(data).__name__
    facts = {"network": trained.architecture, "data": kind}
    configuration, curves = "", b""
    if name.endswith(".ckpt"):
        facts["checkpoint"] = name
        top1 = {NETWORK: zoo.evaluate(trained.network, data)["top1"]}
        if run is not None:
            configuration = (run / "config.yaml").read_text(encoding="utf-8")
            curves = (run / "curves.png").read_bytes() if (run / "curves.png").is_file() else b""
    else:
        configuration = json.dumps(dict(trained.info), indent=2)
        known = {NETWORK: "top1", "ANN twin": "top1_ann_twin"}
        top1 = {column: trained.info[key] for column, key in known.items() if key in trained.info}
    facts["page made"] = f"{date.today()}, lightning-msnn {__version__}, torch {torch.__version__}"
    network, noun = trained.network, getattr(data, "noun", "images")
    records = compare(network, partial(baselines, network), evenly(data, samples), samples)
    write_whole(page(name, kind, records, network, on, top1, facts, configuration, curves, noun).encode(), path)
    return path


def run(options: argparse.Namespace) -> str:
    """Write a report as the command line says, and return what is printed."""
    path = write_report(options.name, options.out, options.root, options.samples, options.batch_size, options.profile)
    return f"report written to {path}"


if __name__ == "__main__":
    command.main(["report", *sys.argv[1:]])
