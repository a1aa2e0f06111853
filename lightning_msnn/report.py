"""``python -m lightning_msnn.report <zoo name or checkpoint>``: what a network does and costs, as one HTML page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lightning_msnn import __version__, data, zoo
from lightning_msnn.energy import NETWORK, PROFILES, SAMPLES, evenly, profile
from lightning_msnn.energy.inputs import draw_frames, draw_recording, draw_series, saliency
from lightning_msnn.energy.pictures import png
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.energy.report import compare, page
from lightning_msnn.errors import ConfigurationError, check_integer, choose
from lightning_msnn.imports import HELP, explained, import_files
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier

__all__ = ["load_task", "main", "make_test_data", "write_report"]


def load_task(name: str, root: str | None = None) -> tuple[SpikingClassifier, str, dict[str, Any]]:
    """Load a zoo entry or a checkpoint.

    Args:
        name: Name of the entry, or path of the checkpoint.
        root: Folder of the data, or the file of a series to forecast, where the user gives one.

    Returns:
        The task in eval mode, the name of its data set, and the arguments of its data.

    Raises:
        ConfigurationError: If it is neither.
    """
    if not name.endswith(".ckpt"):
        if Path(name).is_file():
            raise ConfigurationError(f"{name!r} is neither a zoo entry nor a checkpoint, whose name ends with .ckpt")
        entry = zoo.resolve(name)
        info = zoo.info(name)
        task = SpikingClassifier(
            entry, num_classes=info["num_classes"], in_chans=info["input_size"][0], pretrained=True
        )
        path = str(info.get("data", {}).get("class_path"))
        kind = choose({f"{data.__name__}.{name}": name for name in data.__all__}, path, "data set of a zoo entry")
        task.preprocessing = {"mean": info["mean"], "std": info["std"]}
        settings = getattr(data, kind).arguments_from(info["data"].get("init_args"), () if root is None else ("root",))
        return task.eval(), kind, _at(kind, settings or {"image_size": info["input_size"][1]}, root)
    content = read_checkpoint(name)
    kind = str((content.get("preprocessing") or {}).get("data"))
    if kind not in data.__all__ or "hyper_parameters" not in content:
        raise ConfigurationError(
            f"{name!r} does not say what data it was trained on: give a checkpoint of lightning-msnn"
        )
    if "season" in (content["hyper_parameters"] or {}):
        raise ConfigurationError(f"{name!r} is of a forecaster, and a report is of a classifier")
    try:  # all that the training started from is in the checkpoint
        loaded = SpikingClassifier.load_from_checkpoint(name, map_location="cpu", weights_only=True, pretrained=False)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the values in a file make torch raise
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise ConfigurationError(f"{name!r} is of a network that cannot be made of it: {reason}") from error
    settings = getattr(data, kind).arguments_from(
        content.get("datamodule_hyper_parameters"), () if root is None else ("root", "source")
    )
    return loaded.eval(), kind, _at(kind, settings, root)


def _at(kind: str, settings: dict[str, Any], root: str | None) -> dict[str, Any]:
    """Arguments of data with the place that the user gives."""
    return settings if root is None else {**settings, "root": root}


def make_test_data(task: SpikingClassifier, kind: str, arguments: dict[str, Any]) -> Any:
    """Return a data module, its test part ready, that normalises as when a task was trained.

    Args:
        task: What :func:`load_task` returned, as the rest.
        kind: Name of the data set.
        arguments: Its arguments.

    Raises:
        ConfigurationError: If the data is not there, or cannot be made of the arguments.
    """
    try:
        datamodule = getattr(data, kind)(**arguments)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the values in a file make torch raise
        raise ConfigurationError(f"{kind} cannot be made of the arguments {arguments!r}: {error}") from error
    datamodule.check("test")
    if isinstance(datamodule, data.ArrayDataModule):
        for name in {"mean", "std"} & task.preprocessing.keys():
            setattr(datamodule, name, list(task.preprocessing[name]))
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def _pictures(task: SpikingClassifier, datamodule: Any) -> dict[str, bytes]:
    """Pictures of the first test inputs of data that are no images, PNG by title."""
    if not isinstance(datamodule, data.ArrayDataModule):
        return {}
    loader: Any = datamodule.test_dataloader()
    stored, targets = next(iter(loader))
    made: dict[str, bytes] = {}
    names = list(datamodule.class_names)
    first = [int((targets == c).nonzero()[0]) for c in targets.unique()[:2]]  # one of each of two classes
    inputs = datamodule.transform(stored[first], False)
    salient = saliency(task.network, inputs)
    with torch.no_grad():
        chosen = task.network(inputs).argmax(1).tolist()
    for row, index in enumerate(first):
        title = f"{names[int(targets[index])]}, which the network takes for {names[chosen[row]]}"
        if isinstance(datamodule, data.AudioDataModule):
            maps = [x.reshape(-1, *x.shape[-2:]) for x in (inputs[row], salient[row])]  # parts of the time steps
            mel, where = (torch.cat(list(parts), 1) for parts in maps)
            figure = draw_recording(
                stored[index].float() / 32768, datamodule.rate, mel, where, datamodule.span(stored[index]), title
            )
        elif inputs.shape[-2] == 1:
            variables = [f"variable {c}" for c in range(inputs.shape[1])]
            figure = draw_series(inputs[row, :, 0], salient[row, 0], variables, title)
        else:
            frames, where = inputs[row].view(-1, *inputs.shape[-3:]), salient[row].view(-1, *inputs.shape[-2:])
            figure = draw_frames(frames, where, title)
        made[f"{row + 1}. {title}"] = png(figure)
    return made


def _run_of(name: str) -> Path | None:
    """Folder of the run that a checkpoint is of, None for what is of no run."""
    folder = Path(name).absolute().parent.parent
    return folder if name.endswith(".ckpt") and (folder / "config.yaml").is_file() else None


def write_report(
    name: str,
    output: str | Path | None = None,
    root: str | None = None,
    samples: int = SAMPLES,
    batch_size: int = 64,
    on: str = DEFAULT_PROFILE,
) -> Path:
    """Write the report of a network as one HTML page.

    Args:
        name: Name of a zoo entry, or path of a checkpoint of ``lightning-msnn fit``.
        output: The page, by default ``report_<checkpoint>.html`` in the folder of the checkpoint's run, else
            ``<name>.html`` in the working folder.
        root: Folder of the data, or the file of a series to forecast; by default that of the data set.
        samples: Test inputs that are counted, spread evenly over the classes; accuracy is that of all.
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
    stem, run = Path(name).stem if name.endswith(".ckpt") else name, _run_of(name)
    path = Path(output) if output is not None else run / f"report_{stem}.html" if run else Path(f"{stem}.html")
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if path.is_dir() or not (path.is_file() or place.is_dir()) or not os.access(place, os.W_OK):
        raise ConfigurationError(f"cannot write the report to {str(path)!r}: give a file that can, by --output")
    task, kind, arguments = load_task(name, root)
    datamodule = make_test_data(task, kind, arguments | {"batch_size": batch_size})
    facts = {"network": str(task.hparams["network"]), "data": kind}
    top1, configuration, curves, lead = {}, "", b"", ""
    if name.endswith(".ckpt"):
        facts["checkpoint"] = name
        top1[NETWORK] = zoo.evaluate(task, datamodule)["top1"]
        if run is not None:
            configuration = (run / "config.yaml").read_text(encoding="utf-8")
            curves = (run / "curves.png").read_bytes() if (run / "curves.png").is_file() else b""
    else:
        info = zoo.info(name)
        configuration = json.dumps(info, indent=2)
        top1 = {c: info[key] for c, key in ((NETWORK, "top1"), ("ANN twin", "top1_ann_twin")) if key in info}
    facts |= {"page made": f"{date.today()}, lightning-msnn {__version__}, torch {torch.__version__}"}
    records, networks = compare(task.network, task.twins, evenly(datamodule, samples), samples)
    content = page(
        name, kind, records, networks[NETWORK], on, top1, facts, configuration, curves, lead,
        _pictures(task, datamodule), getattr(datamodule, "noun", "images"),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the report.

    Args:
        args: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_msnn.report", description=__doc__)
    parser.add_argument("name", help="name of a zoo entry, or path of a checkpoint of lightning-msnn fit")
    parser.add_argument("--output", help="the page (default: in the folder of the run, or here)")
    parser.add_argument("--root", help="folder of the data (default: that of the checkpoint or of the data set)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"test images to count (default: {SAMPLES})")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--profile", default=DEFAULT_PROFILE, help=f"{', '.join(PROFILES)}, or a YAML file of one")
    parser.add_argument("--imports", action="append", default=[], help=HELP)
    given = parser.parse_args(args)
    try:
        import_files(given.imports)
        path = write_report(given.name, given.output, given.root, given.samples, given.batch_size, given.profile)
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)
    sys.stdout.write(f"report written to {path}\n")


if __name__ == "__main__":
    main()
