"""The data module of data sets that fit into memory as tensors and are not images: sounds, series, events."""

from pathlib import Path

from torch import Tensor

from lightning_msnn.data.datasets import ArrayDataset
from lightning_msnn.data.parts import Part, PartDataModule
from lightning_msnn.errors import ConfigurationError

__all__ = ["ArrayDataModule", "list_files"]


class ArrayDataModule(PartDataModule):
    """Parts of a data set held as tensors.

    A data set is a subclass that reads its parts (``read``), and says what becomes of a batch (``transform``); its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect. Each process reads the parts that its stage needs. Arguments are those of
    :class:`~lightning_msnn.data.parts.PartDataModule`.
    """

    @property
    def in_chans(self) -> int:
        """Channels of an input."""
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an input."""
        raise NotImplementedError

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, ...) and targets (N,) of a part."""
        raise NotImplementedError

    def read_unknown(self) -> tuple[Tensor, list[str]]:
        """Return the inputs (N, ...) that are to be predicted, and a name for each."""
        raise NotImplementedError

    def prepare(self, inputs: Tensor) -> None:
        """Set ``mean``, ``std`` and what else ``transform`` needs by the training inputs alone, (N, ...)."""

    def open(self, part: Part | None) -> ArrayDataset:
        """Return the dataset of a part, or of what is to be predicted."""
        return ArrayDataset(*(self.read_unknown() if part is None else self.read(part)))

    def _load(self, part: Part | None) -> None:
        super()._load(part)
        # What is tested or predicted is normalised by what the training inputs say, unless a checkpoint has said it.
        if type(self).prepare is not ArrayDataModule.prepare and "mean" not in vars(self):
            if "train" not in self._datasets:
                super()._load("train")
            train = self._datasets["train"]
            self.prepare(train.images[train.indices])


def list_files(place: Path, suffix: str) -> list[Path]:
    """Return a file, or the sorted files of a folder and its sub-folders with a suffix, hidden ones left out.

    Raises:
        ConfigurationError: If there is no such file.
    """
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")]
    if not files:
        raise ConfigurationError(f"{str(place)!r} must be a {suffix} file or a folder with some, and is not")
    return files
