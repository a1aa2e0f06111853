"""The data module of data sets that fit into memory as tensors and are not images."""

from torch import Tensor

from lightning_msnn.data.datasets import ArrayDataset
from lightning_msnn.data.parts import Part, PartDataModule

__all__ = ["ArrayDataModule"]


class ArrayDataModule(PartDataModule):
    """Parts of a data set held as tensors.

    A data set is a subclass that reads its parts (``read``), and says what becomes of a batch (``transform``); its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect. Each process reads the parts that its stage needs. Arguments are those of
    :class:`~lightning_msnn.data.parts.PartDataModule`.
    """

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
