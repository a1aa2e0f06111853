"""Exports: write a network in another format, run the file with the other runtime, and keep it if both agree.

A format is a function that writes and one that runs, and a line in :data:`FORMATS`.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, brief, choose
from lightning_msnn.export import nir, programs
from lightning_msnn.export.samples import Samples, find_samples
from lightning_msnn.trained import Trained, load_trained

__all__ = ["FORMATS", "Format", "Report", "export", "run"]

_BATCH = 64  # images, when a file is run; the first batch has one, so that no size is taken for granted
_MOST = 0.05  # share of the images whose class rounding may change, at most; one image always may
_ROUNDING = 2e-6  # relative change of the weights that stands for adding up in another order
_TRIALS = 8
_MOVED = 1e-3  # a spike moves logits by more, rounding alone by less


class Format(NamedTuple):
    """A format of exported files.

    Args:
        suffix: Ending of the files, with its dot.
        write: Writes a file: ``write(trained, file, shape)``, with the shape of one input.
        run: Makes a function from images to logits of a file: ``run(file)(images)``.
        runtime: Name of what runs it, for people.
        extra: Extra of this package that installs what both import.
    """

    suffix: str
    write: Callable[[Trained, Path, torch.Size], None]
    run: Callable[[Path], Callable[[Tensor], Tensor]]
    runtime: str
    extra: str = ""


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", programs.write_onnx, programs.run_onnx, "onnxruntime", "export"),
    "torch": Format(".pt2", programs.write_torch, programs.run_torch, "torch.export"),
    "nir": Format(".nir", nir.write, nir.run, "nirtorch", "nir"),
}
"""Formats by the name that the command line uses."""


class Report(NamedTuple):
    """What an export has written, and how it agrees with the network.

    Args:
        path: The file.
        size: Its size in bytes.
        images: Number of images that the network and the file were run on.
        what: What these images are.
        differ: Number of images that the file puts into another class.
        largest: Largest difference between two logits.
        top1: Accuracy in percent of the network and of the file; None where the classes are not known.
        runtime: What ran the file.
    """

    path: Path
    size: int
    images: int
    what: str
    differ: int
    largest: float
    top1: tuple[float, float] | None
    runtime: str


def export(
    source: str | Path,
    to: str,
    out: str | Path,
    data: str | Path | None = None,
    images: str | Path | None = None,
    image_size: int | None = None,
) -> Report:
    """Write a trained network in another format, once the other runtime has run it and agrees.

    Args:
        source: Checkpoint of ``lightning-msnn fit``, or name of a zoo entry.
        to: The format, one of :data:`FORMATS`.
        out: The file, with the ending of the format; it must not exist.
        data: Folder of the data set that the network was trained on, if it needs one: the file is run on test images.
        images: Folder of images to run instead. Without either, random images are run.
        image_size: Height and width of the images in pixels, for checkpoints that do not say them.

    Raises:
        ConfigurationError: If an argument is not allowed, the file exists or cannot be written, the format cannot
            describe the network, or the other runtime finds other classes than rounding explains; no file is left then.
    """
    form, path = choose(FORMATS, to, "format"), Path(out).expanduser()
    if path.suffix != form.suffix:
        raise ConfigurationError(f"out must end with {form.suffix} for {to}, not be {str(path)!r}")
    if os.path.lexists(path):
        raise ConfigurationError(f"{str(path)!r} exists, and nothing is overwritten: give another file")
    known = load_trained(source, image_size=image_size)
    samples = find_samples(known, data, images)
    try:
        ours = _logits(known, samples, known.network, f"{known.name} itself")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of exporters
            file = Path(folder) / path.name
            form.write(known, file, samples.images.shape[1:])
            theirs = _logits(known, samples, form.run(file), form.runtime)
            _check_classes(known.network, samples.images, ours, theirs, form.runtime)
            file.rename(path)
    except ConfigurationError:
        raise
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(path)!r}: {error.strerror or brief(error)}") from error
    except ImportError as error:
        install = f"pip install 'lightning-msnn[{form.extra}]'"
        raise ConfigurationError(f"{to} needs {error.name}, which is not installed: {install}") from error
    except Exception as error:  # whatever stops a network, an exporter or a runtime
        reason = brief(error.__cause__ or error)
        raise ConfigurationError(f"{known.name} cannot be run and written as {to}: {reason}") from error
    top1 = None
    if samples.targets is not None:
        own, its = (100 * (found.argmax(1) == samples.targets).double().mean().item() for found in (ours, theirs))
        top1 = (own, its)
    differ, largest = int((ours.argmax(1) != theirs.argmax(1)).sum()), float((ours - theirs).abs().max())
    return Report(path, path.stat().st_size, len(ours), samples.what, differ, largest, top1, form.runtime)


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


def _logits(trained: Trained, samples: Samples, run: Callable[[Tensor], Tensor], who: str) -> Tensor:
    """Run images; refuse a network or runtime that returns anything but finite logits of all classes."""
    logits, classes = _run(run, samples.images), len(trained.class_names)
    if logits.shape[1:] != (classes,) or not logits.isfinite().all():
        raise ConfigurationError(
            f"{who} returns {tuple(logits.shape[1:])} for an image of {samples.what}, and {classes} finite logits are "
            "needed, one for each name of a class"
        )
    return logits


@torch.no_grad()
def _run(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(part) for part in (images[:1], *torch.split(images[1:], _BATCH)) if len(part)]).float()


def _check_classes(network: nn.Module, images: Tensor, ours: Tensor, theirs: Tensor, runtime: str) -> None:
    """Refuse a file that finds other classes than rounding explains."""
    other = ours.argmax(1) != theirs.argmax(1)
    differ, count = int(other.sum()), len(other)
    wrong = differ - int(_at_threshold(network, images[other], ours[other]).sum()) if differ else 0
    if wrong or differ > max(1, _MOST * count):
        why = f"{wrong} of them not explained by rounding at thresholds" if wrong else f"and {_MOST:.0%} are allowed"
        raise ConfigurationError(
            f"{runtime} finds another class in {differ} of {count} images, {why}: nothing is written"
        )


@torch.no_grad()
def _at_threshold(network: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """Whether rounding can change the class of images ``(B, ...)``, ``(B,)``.

    Adding up in another order changes the last digits of a sum, as moving the weights in their last digits does. Where
    that makes a neuron fire or not, logits move by more than :data:`_MOVED`; else the two best classes must be level.
    """
    best = logits.topk(min(2, logits.shape[1])).values
    near = best[:, 0] - best[:, -1] < _MOVED
    for trial in range(_TRIALS):
        generator = torch.Generator().manual_seed(trial)
        moved = copy.deepcopy(network)
        for value in moved.parameters():
            value.mul_(1.0 + _ROUNDING * torch.randn(value.shape, generator=generator))
        near |= ((_run(moved, images) - logits).abs() > _MOVED).any(1)
    return near
