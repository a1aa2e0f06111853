"""Files of folders, and pixels of image files."""

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from lightning_msnn.errors import ConfigurationError, brief

__all__ = [
    "IMAGE_SUFFIXES",
    "Pixels",
    "decode_files",
    "image_array",
    "list_classes",
    "list_files",
    "normalise",
    "prepare_pixels",
    "read_image",
    "read_lines",
]

#: Endings of image files, whatever their case.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: PIL's decoders of these files. It goes by the first bytes, not the ending, and one of its others starts a program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Pixels = npt.NDArray[np.uint8]


def has_suffix(path: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Return whether a file's name ends in one of the suffixes, whatever its case, and is not hidden."""
    return path.lower().endswith(suffixes) and not os.path.basename(path).startswith(".")


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's sub-folders, hidden ones left out; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_classes(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the images of ``folder/<class>``, sorted by class and name, and the number of each one's class.

    Raises:
        ConfigurationError: If the class folders are others, or one of them holds no image.
    """
    found = class_folders(folder)
    if not found:
        raise ConfigurationError(f"{str(folder)!r} has no class folders: one folder of images for each class is needed")
    missing, unknown = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing or unknown:
        difference = [f"{what} {shorten(names)}" for what, names in (("lacks", missing), ("has", unknown)) if names]
        raise ConfigurationError(
            f"{str(folder)!r} {' and '.join(difference)}, but its class folders must be exactly {shorten(classes)}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    listed = make_dataset(str(folder), numbers, is_valid_file=has_suffix, allow_empty=True)
    if empty := sorted(set(numbers.values()) - {target for _, target in listed}):
        raise ConfigurationError(
            f"class folder {str(folder / classes[empty[0]])!r} holds no image: allowed are {' '.join(IMAGE_SUFFIXES)}"
        )
    return [file for file, _ in listed], [target for _, target in listed]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the names as text, cut after ``most`` of them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest


def list_files(place: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Return a file, or the sorted files of a folder and its sub-folders, with these suffixes; there must be one."""
    found = [place] if place.is_file() else place.rglob("*")
    files = sorted(str(file) for file in found if has_suffix(file.name, suffixes) and file.is_file())
    if not files:
        raise ConfigurationError(f"{str(place)!r} must be a folder with files that end in {' '.join(suffixes)}")
    return files


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, or raise a ConfigurationError that names it."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {str(path)!r}: {brief(error)}") from error


def image_array(image: Image.Image, size: int) -> Pixels:
    """Return the pixels of an image, (C, size, size).

    The centre square of an image of another size is scaled to ``size``, bilinear and anti-aliased: the same as scaling
    the shorter side and cropping the centre, in one step.
    """
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        square = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=square)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(size, size, -1).transpose(2, 0, 1)


def read_image(
    path: str, size: int, channels: int, transform: Callable[[Image.Image], Image.Image] | None = None
) -> Pixels:
    """Decode an image file to the pixels that :func:`prepare_pixels` returns.

    Raises:
        ConfigurationError: If the file cannot be decoded, or PIL takes it for a decompression bomb.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            return prepare_pixels(file, size, channels, transform)
    except Exception as error:  # PIL's decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ConfigurationError(f"cannot read the image {path!r}: {brief(error)}") from error


def prepare_pixels(
    image: Image.Image, size: int, channels: int, transform: Callable[[Image.Image], Image.Image] | None = None
) -> Pixels:
    """Return the pixels of an image, uint8, (channels, size, size): upright, its centre square scaled.

    With 1 channel it is grey, with 3 RGB; ``transform`` is applied then, in the image's own size.
    """
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL clips 16-bit values at 255; their upper byte is what is meant
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB" if channels == 3 else "L")
    return image_array(image if transform is None else transform(image), size)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map images (..., C, H, W) of 0 to 255 to ``(pixels / 255 - mean) / std``, float32; both may be empty."""
    shift, scale = (torch.tensor(x, device=pixels.device).view(-1, 1, 1) for x in ([*mean] or [0.0], [*std] or [1.0]))
    return pixels.float().div_(255).sub_(shift).div_(scale)


def decode_files(files: Sequence[str], size: int, channels: int) -> Tensor:
    """Decode image files into one uint8 tensor, (N, channels, size, size).

    Threads share the work in pieces of 256 files: PIL lets go of the interpreter while it decodes.
    """
    pixels = np.empty((len(files), channels, size, size), dtype=np.uint8)

    def fill(first: int) -> None:
        for index in range(first, min(first + 256, len(files))):
            pixels[index] = read_image(files[index], size, channels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(0, len(files), 256)):
            pass
    return torch.from_numpy(pixels)
