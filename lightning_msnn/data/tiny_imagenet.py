"""Tiny-ImageNet-200."""

from collections import Counter
from pathlib import Path
from typing import ClassVar

from lightning_msnn.data.archives import Archive
from lightning_msnn.data.arrays import Part
from lightning_msnn.data.base import ImageDataModule
from lightning_msnn.data.reading import list_classes, read_lines
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
        root = self.check_root()
        inner = root / self.archive.folder
        return inner if inner.is_dir() else root

    def _wnids(self) -> list[str]:
        path = self._tree / "wnids.txt"
        wnids = sorted(read_lines(path))
        if len(set(wnids)) != self.num_classes:
            raise ConfigurationError(f"{str(path)!r} names {len(set(wnids))} classes, but TinyImageNet200 has 200")
        return wnids

    def list_part(self, part: Part) -> tuple[list[str], list[int]]:
        """Return the files of a part and their classes."""
        wnids = self._wnids()
        if part == "train":
            return list_classes(self._tree / "train", wnids)
        path = self._tree / "val" / "val_annotations.txt"
        rows = [line.split("\t") for line in sorted(read_lines(path))]
        files = [str(path.with_name("images") / row[0]) for row in rows]
        for row, file in zip(rows, files, strict=True):
            if row[1:2] == [] or row[1] not in wnids or not Path(file).is_file():
                raise ConfigurationError(
                    f"{str(path)!r} names {row}: a file in images/ and an id of wnids.txt are needed"
                )
        return files, [wnids.index(row[1]) for row in rows]
