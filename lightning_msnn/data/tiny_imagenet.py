"""Tiny-ImageNet-200."""

from collections import Counter
from pathlib import Path
from typing import ClassVar

from lightning_msnn.data.base import Archive, ImageDataModule, Part
from lightning_msnn.data.reading import Listing, list_classes, scan
from lightning_msnn.errors import ConfigurationError

__all__ = ["TinyImageNet200"]


class TinyImageNet200(ImageDataModule):
    """Tiny-ImageNet-200: 100,000 training and 10,000 test images of 200 ImageNet classes, 64x64 RGB.

    Source: Stanford CS231N, 2015. ``root`` is the ``tiny-imagenet-200`` folder or the one that contains it. The labels
    of the official test set were never published, so the official ``val`` part is the test set here, as in the papers
    that report an accuracy, and validation is split off the training part. Classes are numbered by WordNet id.
    """

    native_size = 64
    # Of the 100,000 training images, as published with most Tiny-ImageNet programs.
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    layout = "wnids.txt, train/<wnid>/images/ and val/val_annotations.txt, or tiny-imagenet-200/ with them"
    archive: ClassVar[Archive] = Archive(
        "https://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200"
    )
    unpacked = ("wnids.txt",)

    @property
    def num_classes(self) -> int:
        """Number of classes, known before the data set is there."""
        return 200

    @property
    def class_names(self) -> list[str]:
        """First word of ``words.txt`` for each class, with the WordNet id behind it where two classes share it."""
        wnids = self._wnids()
        path = self._tree / "words.txt"
        lines = read_lines(path) if path.is_file() else []
        words = {wnid: text.split(",")[0].strip() for wnid, _, text in (line.partition("\t") for line in lines)}
        names = [words.get(wnid) or wnid for wnid in wnids]
        count = Counter(names)
        return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]

    @property
    def _tree(self) -> Path:
        root = self._root_folder()
        inner = root / self.archive.folder
        return inner if inner.is_dir() else root

    def _wnids(self) -> list[str]:
        path = self._tree / "wnids.txt"
        wnids = sorted(line.strip() for line in read_lines(path) if line.strip())
        if len(set(wnids)) != self.num_classes:
            raise ConfigurationError(f"{str(path)!r} names {len(set(wnids))} classes, but {self._title} has 200")
        return wnids

    def _list(self, part: Part) -> Listing:
        wnids = self._wnids()
        if part == "train":
            return list_classes(self._tree / "train", wnids, inside="images")
        folder = self._tree / "val"
        path = folder / "val_annotations.txt"
        number = {wnid: target for target, wnid in enumerate(wnids)}
        images = set(scan(folder / "images")[1])
        files, targets = [], []
        for line in sorted(filter(None, read_lines(path))):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0].strip()
            if wnid not in number:
                raise ConfigurationError(
                    f"line {line!r} of {str(path)!r} must start with a file and an id of wnids.txt"
                )
            if name not in images:
                raise ConfigurationError(
                    f"{str(path)!r} names {name!r}, which is no image in {str(folder / 'images')!r}"
                )
            files.append(str(folder / "images" / name))
            targets.append(number[wnid])
        if not files:
            raise ConfigurationError(f"{str(path)!r} is empty: one line for each image is needed")
        return Listing(folder, files, targets)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, or raise a ConfigurationError that names it."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"cannot read {str(path)!r}: {reason}") from error
