"""The data module of data sets that fit into memory as tensors and are not images."""

from torch import Tensor

from lightning_msnn.data.datasets import ArrayDataset
from lightning_msnn.data.parts import Part, PartDataModule

__all__ = ["ArrayDataModule"]


class ArrayDataModule(PartDataModule):
    """Parts of a data set held as tensors.

    A data set is a subclass that reads its parts (``read``) and turns a batch into inputs (``transform``). Its
    attributes ``class_names``, ``in_chans``, ``image_size`` (height and width), ``mean`` and ``std`` tell a task and a
    network what to expect. It takes the arguments of :class:`~lightning_msnn.data.parts.PartDataModule`.
    """

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, ...) and targets (N,) of a part."""
        raise NotImplementedError

    def read_unknown(self) -> tuple[Tensor, list[str]]:
        """Return the inputs (N, ...) in ``folder``, and a name for each."""
        raise NotImplementedError

    def prepare(self, inputs: Tensor) -> None:
        """Set ``mean``, ``std`` and whatever else ``transform`` needs from the training inputs, (N, ...)."""

    def open(self, part: Part | None) -> ArrayDataset:
        """Return the dataset of a part, or of the inputs to predict."""
        return ArrayDataset(*(self.read_unknown() if part is None else self.read(part)))

    def _load(self, part: Part | None) -> None:
        super()._load(part)
        # All parts are normalised by the training inputs, unless a checkpoint has set the mean already.
        if type(self).prepare is not ArrayDataModule.prepare and "mean" not in vars(self):
            if "train" not in self._datasets:
                super()._load("train")
            train = self._datasets["train"]
            self.prepare(train.images[train.indices])
