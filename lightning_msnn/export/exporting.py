"""Exports: a file in another format, run again by the other side before it gets its name.

A format is one file of this room with a function that writes and one that runs, and a line in :data:`FORMATS`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, brief, choose
from lightning_msnn.export import aoti, nir, onnx, program, weights
from lightning_msnn.export.samples import Samples, find_samples
from lightning_msnn.export.source import Source, read_source
from lightning_msnn.nn.integer import to_integers
from lightning_msnn.zoo.storing import DTYPES

__all__ = ["FORMATS", "Format", "Report", "export"]

BATCH = 64
"""Images of a batch when a file is run; the first is of one image."""

MOST = 0.05
"""Share of the images whose class rounding may change, at most; one image always may."""

_ROUNDING = 2e-6
"""Relative change of weights that stands for what sums lose when they are added up in another order."""

_TRIALS = 8

_LONGEST = 255
"""Bytes of a file's name that disks hold."""

_MOVED = 1e-3
"""Difference of logits that a spike makes, and rounding alone does not."""


class Format(NamedTuple):
    """A format of exported files.

    Args:
        suffix: Ending of the files, with its dot.
        write: Writes a file: ``write(source, file, shape, dtype)``, with the shape of one input.
        run: Returns what runs a file, a function from images to logits: ``run(file)(images)``.
        runtime: What that is, for people.
        dtypes: Types that weights can be kept in; the first is the default.
    """

    suffix: str
    write: Callable[[Source, Path, torch.Size, str], None]
    run: Callable[[Path], Callable[[Tensor], Tensor]]
    runtime: str
    dtypes: tuple[str, ...] = ("float32",)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", onnx.write, onnx.run, "onnxruntime", ("float32", "int8")),
    "torch": Format(".pt2", program.write, program.run, "torch.export"),
    "aoti": Format(".pt2", aoti.write, aoti.run, "AOTInductor"),
    "nir": Format(".nir", nir.write, nir.run, "nirtorch"),
    "weights": Format(".safetensors", weights.write, weights.run, "lightning_msnn", DTYPES),
}
"""Formats by the name that the command line uses."""


class Report(NamedTuple):
    """What an export has written, and how it agrees with the network that it was made of.

    Args:
        path: The file.
        size: Its size in bytes.
        images: Images that both were run on.
        what: What they are.
        differ: How many of them have another class.
        largest: Largest difference of two logits.
        top1: Accuracy in percent of the network and of the file; None where classes are not known.
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
    dtype: str | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    image_size: int | None = None,
) -> Report:
    """Write a trained network in another format, once the other side has run it and agrees.

    Args:
        source: Checkpoint of ``lightning-msnn fit``, or name of a zoo entry.
        to: The format, one of :data:`FORMATS`.
        out: The file, with the ending of the format; it must not exist.
        dtype: Type in which weights are kept, one of those of the format.
        data: Folder of the data set that the network learnt from, for those that need one: its test images are run.
        images: Folder of images that are run instead. Without either, random ones are.
        image_size: Height and width of the images in pixels, for checkpoints that do not say them.

    Raises:
        ConfigurationError: If an argument is not allowed, the file exists or cannot be written, or the other side finds
            other classes than rounding explains; no file is left then.
    """
    form = choose(FORMATS, to, "format")
    kept = form.dtypes[0] if dtype is None else dtype
    if kept not in form.dtypes:
        raise ConfigurationError(f"dtype of {to} must be {' or '.join(form.dtypes)}, not {dtype!r}")
    path, place = _check_path(out, form.suffix, to)
    known = read_source(source, image_size)
    if known.random and to != "weights":
        raise ConfigurationError(
            f"{known.name} draws its spikes at random (coding bernoulli), so that {to} has nothing to be compared "
            "with: allowed is weights"
        )
    samples = find_samples(known, data, images)
    ours = _own_logits(known, samples)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".export-") as folder:
            file = Path(folder) / path.name
            form.write(known, file, samples.images.shape[1:], kept)
            exact = known.network if kept == "float32" else to_integers(known.network) if to == "onnx" else None
            report = _compare(known, samples, ours, form, file, exact)
            _settle(file, path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return report._replace(path=path)


def _check_path(out: str | Path, suffix: str, to: str) -> tuple[Path, Path]:
    """Check that a file can be written; return its path, and a folder of its disk that exists."""
    try:
        path = Path(out).expanduser()
        os.fspath(path).encode()
    except (TypeError, RuntimeError, UnicodeEncodeError) as error:  # no path, no such user, no text
        raise ConfigurationError(f"out must be the path of a file, not {out!r}") from error
    if "\0" in str(path) or len(os.fsencode(path.name)) > _LONGEST:
        raise ConfigurationError(f"out must be a name that a disk can hold, not {out!r}")
    if path.suffix != suffix:
        raise ConfigurationError(f"out must end with {suffix} for {to}, not be {str(path)!r}")
    if os.path.lexists(path):
        raise ConfigurationError(f"{str(path)!r} exists, and nothing is overwritten: give another file")
    place = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not place.is_dir():
        raise ConfigurationError(f"cannot write {str(path)!r}: {str(place)!r} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigurationError(f"cannot write {str(path)!r}: {str(place)!r} is read-only")
    return path, place


def _settle(file: Path, path: Path) -> None:
    """Give a finished file its name in one step, if nothing has that name."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, path)  # which a rename would replace
    except FileExistsError as error:
        raise ConfigurationError(f"{str(path)!r} exists, and nothing is overwritten: give another file") from error
    except OSError:  # a disk without links
        with path.open("xb"):
            pass
        file.replace(path)


def _batches(images: Tensor) -> Iterator[Tensor]:
    """One image, then batches of :data:`BATCH` and what is left, so that no batch size is taken for granted."""
    yield images[:1]
    yield from (images[first : first + BATCH] for first in range(1, len(images), BATCH))


@torch.no_grad()
def _logits(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # spikes that are drawn are the same again
        torch.manual_seed(0)
        return torch.cat([run(batch) for batch in _batches(images)]).float()


def _own_logits(source: Source, samples: Samples) -> Tensor:
    """Run a network itself, before anything is written of it.

    Raises:
        ConfigurationError: If it cannot, or its outputs are not finite logits of its classes.
    """
    try:
        ours = _logits(source.network, samples.images)
    except Exception as error:  # whatever stops a network
        reason = brief(error)
        raise ConfigurationError(f"{source.name} itself cannot run on {samples.what}: {reason}") from error
    if ours.dim() != 2 or ours.shape[1] != len(source.class_names):
        raise ConfigurationError(
            f"{source.name} names {len(source.class_names)} classes, but returns {tuple(ours.shape[1:])} for an image"
        )
    if not ours.isfinite().all():
        raise ConfigurationError(f"{source.name} itself finds logits that are not finite in {samples.what}")
    return ours


def _compare(
    source: Source, samples: Samples, ours: Tensor, form: Format, file: Path, exact: nn.Module | None
) -> Report:
    """Run a file, and compare it with the logits of its network.

    Raises:
        ConfigurationError: If more classes differ from those of ``exact`` than rounding explains, the network that the
            file stands for: with weights of 8 bits, not the source's own, and None if nothing else computes with them.
    """
    run = form.run(file)
    try:
        theirs = _logits(run, samples.images)
    except Exception as error:  # whatever stops a runtime
        reason = brief(error)
        raise ConfigurationError(f"{form.runtime} cannot run {source.name}, so nothing is written: {reason}") from error
    if theirs.shape != ours.shape or not theirs.isfinite().all():
        raise ConfigurationError(
            f"{form.runtime} returns {tuple(theirs.shape)} for {source.name}, not {tuple(ours.shape)} finite logits: "
            "nothing is written"
        )
    if exact is not None:
        expected = ours if exact is source.network else _logits(exact, samples.images)
        _check_classes(exact, samples.images, expected, theirs, form.runtime)
    differ, count = int((ours.argmax(1) != theirs.argmax(1)).sum()), len(ours)
    top1 = None
    if samples.targets is not None:
        own, its = (100 * (found.argmax(1) == samples.targets).double().mean().item() for found in (ours, theirs))
        top1 = (own, its)
    largest = float((ours - theirs).abs().max())
    return Report(file, file.stat().st_size, count, samples.what, differ, largest, top1, form.runtime)


def _check_classes(network: nn.Module, images: Tensor, ours: Tensor, theirs: Tensor, runtime: str) -> None:
    """Refuse other classes of a file than rounding explains."""
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
    """Whether rounding can change what a network says of images ``(B, ...)``, ``(B,)``.

    Sums in another order differ in the last digits, and so do sums of weights that are moved by as much. Where that
    makes a neuron fire or not, logits move by more than :data:`_MOVED`; else the two best classes have to be as near.
    """
    best = logits.topk(min(2, logits.shape[1])).values
    near = best[:, 0] - best[:, -1] < _MOVED
    for trial in range(_TRIALS):
        generator = torch.Generator().manual_seed(trial)
        moved = copy.deepcopy(network)
        for value in moved.parameters():
            value.mul_(1.0 + _ROUNDING * torch.randn(value.shape, generator=generator))
        near |= ((_logits(moved, images) - logits).abs() > _MOVED).any(1)
    return near
