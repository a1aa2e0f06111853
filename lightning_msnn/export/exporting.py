"""Exports: write a network in another format, run the file with the other runtime, and keep it if both agree.

A format is one file of this room with a function that writes and one that runs, and a line in :data:`FORMATS`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, brief, choose
from lightning_msnn.export import nir, onnx, program
from lightning_msnn.export.samples import Samples, find_samples
from lightning_msnn.trained import Trained, load_trained

__all__ = ["FORMATS", "Format", "Report", "export"]

BATCH = 64
"""Images in a batch when a file is run; the first batch has one image, so that no size is taken for granted."""

MOST = 0.05
"""Share of the images whose class rounding may change, at most; one image always may."""

_ROUNDING = 2e-6
"""Relative change of the weights that stands for adding up in another order."""

_TRIALS = 8

_MOVED = 1e-3
"""A spike moves logits by more than this, rounding alone by less."""


class Format(NamedTuple):
    """A format of exported files.

    Args:
        suffix: Ending of the files, with its dot.
        write: Writes a file: ``write(trained, file, shape)``, with the shape of one input.
        run: Makes a function from images to logits of a file: ``run(file)(images)``.
        runtime: Name of what runs it, for people.
    """

    suffix: str
    write: Callable[[Trained, Path, torch.Size], None]
    run: Callable[[Path], Callable[[Tensor], Tensor]]
    runtime: str


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", onnx.write, onnx.run, "onnxruntime"),
    "torch": Format(".pt2", program.write, program.run, "torch.export"),
    "nir": Format(".nir", nir.write, nir.run, "nirtorch"),
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
        ConfigurationError: If an argument is not allowed, the file exists or cannot be written, or the other runtime
            finds other classes than rounding explains; no file is left then.
    """
    form, path = choose(FORMATS, to, "format"), Path(out).expanduser()
    if path.suffix != form.suffix:
        raise ConfigurationError(f"out must end with {form.suffix} for {to}, not be {str(path)!r}")
    if os.path.lexists(path):
        raise ConfigurationError(f"{str(path)!r} exists, and nothing is overwritten: give another file")
    known = load_trained(source, image_size=image_size)
    samples = find_samples(known, data, images)
    ours = _logits(known.network, samples, len(known.class_names), f"{known.name} itself")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file = Path(folder) / path.name
            form.write(known, file, samples.images.shape[1:])
            theirs = _logits(form.run(file), samples, len(known.class_names), form.runtime)
            _check_classes(known.network, samples.images, ours, theirs, form.runtime)
            file.rename(path)
    except ConfigurationError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # torch hides a full disk behind a RuntimeError
        reason = getattr(error, "strerror", None) or brief(error)
        raise ConfigurationError(f"cannot write {str(path)!r}: {reason}") from error
    top1 = None
    if samples.targets is not None:
        own, its = (100 * (found.argmax(1) == samples.targets).double().mean().item() for found in (ours, theirs))
        top1 = (own, its)
    differ, largest = int((ours.argmax(1) != theirs.argmax(1)).sum()), float((ours - theirs).abs().max())
    return Report(path, path.stat().st_size, len(ours), samples.what, differ, largest, top1, form.runtime)


def _logits(run: Callable[[Tensor], Tensor], samples: Samples, classes: int, who: str) -> Tensor:
    """Run images; refuse a network or runtime that fails, or returns anything but finite logits of all classes."""
    try:
        logits = _run(run, samples.images)
    except Exception as error:  # whatever stops a network or a runtime
        raise ConfigurationError(f"{who} cannot run on {samples.what}: {brief(error)}") from error
    if logits.shape[1:] != (classes,) or not logits.isfinite().all():
        raise ConfigurationError(
            f"{who} returns {tuple(logits.shape[1:])} for an image of {samples.what}, and {classes} finite logits are "
            "needed, one for each name of a class"
        )
    return logits


@torch.no_grad()
def _run(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    starts = [0, *range(1, len(images), BATCH)]
    return torch.cat([run(images[a:b]) for a, b in zip(starts, [*starts[1:], len(images)], strict=True)]).float()


def _check_classes(network: nn.Module, images: Tensor, ours: Tensor, theirs: Tensor, runtime: str) -> None:
    """Refuse a file that finds other classes than rounding explains."""
    other = ours.argmax(1) != theirs.argmax(1)
    differ, count = int(other.sum()), len(other)
    wrong = differ - int(_at_threshold(network, images[other], ours[other]).sum()) if differ else 0
    if wrong or differ > max(1, MOST * count):
        raise ConfigurationError(
            f"{runtime} finds another class in {differ} of {count} images, {wrong} of them not explained by rounding "
            "at thresholds: nothing is written"
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
