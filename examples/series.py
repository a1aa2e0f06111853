"""A data set of your own: labelled time series, as maps of one row with a channel for each variable.

    lightning-msnn fit --run.imports examples/series.py --data series.TimeSeries --config recipe/series

classifies made-up waves. Files in the ``.ts`` format of the UCR and UEA archives are read from a folder:
``--data.root my_folder --data.problem JapaneseVowels`` needs ``JapaneseVowels_TRAIN.ts`` and ``JapaneseVowels_TEST.ts``
there. The package aeon ships some in its folder ``datasets/data``.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F

from lightning_msnn.data import ArrayDataModule
from lightning_msnn.errors import ConfigurationError


def read_ts(file):
    """Series (C, L) of any lengths, the class of each, and all classes in the order of the header."""
    if not file.is_file():
        raise ConfigurationError(f"there is no file {str(file)!r}")
    head, _, body = file.read_text(encoding="utf-8").partition("@data")
    header = {words[0].lower(): words[1:] for line in head.splitlines() if (words := line.split())}
    rows = [line.strip().split(":") for line in body.splitlines() if line.strip()]
    series = [np.array([channel.replace("?", "nan").split(",") for channel in row[:-1]], dtype=float) for row in rows]
    if not series or not all(np.isfinite(values).all() for values in series):
        raise ConfigurationError(f"{str(file)!r} has no series, or one with missing values: fill them")
    return series, [row[-1].strip() for row in rows], header["@classlabel"][1:]


def make_waves(part, number=40):
    """Waves of 20 to 29 values that rise or fall, in the form that ``read_ts`` returns."""
    random = np.random.default_rng(["train", "test"].index(part))
    labels = [("up", "down")[i % 2] for i in range(number)]
    slopes = [0.3 * (1 if label == "up" else -1) * np.arange(20 + i % 10) for i, label in enumerate(labels)]
    return [random.normal(5 + slope)[None] for slope in slopes], labels, ["up", "down"]


def warp_series(series, warp, crop):
    """Play series ``(B, C, 1, L)`` unevenly and cut their ends; each has its own draw, and keeps its length.

    Time warping and window slicing (Iwana and Uchida, arXiv 2007.15951).

    The logarithm of the speed has standard deviation ``warp`` at five places, and is linear between them. At most the
    share ``crop`` of a series is cut off, at both ends together.
    """
    batch, size = len(series), series.shape[3]
    speeds = torch.exp(warp * torch.randn(batch, 1, 5))
    time = F.interpolate(speeds, size, mode="linear", align_corners=True)[:, 0, :-1].cumsum(1)
    time = F.pad(time, (1, 0)) / time[:, -1:]
    cut, begin = crop * torch.rand(batch, 1), torch.rand(batch, 1)
    places = (2 * (begin * cut + (1 - cut) * time) - 1).to(series)  # from -1, the first value, to 1, the last
    grid = torch.stack([places, torch.zeros_like(places)], 2)[:, None]
    return F.grid_sample(series, grid, align_corners=True)


class TimeSeries(ArrayDataModule):
    """Labelled series ``(B, C, 1, L)``, normalised by the training series.

    Where lengths differ, all series are stretched to one, so that each window meets the same share of every series, and
    a last channel says how long each was, as a share of that.

    Args:
        problem: Name of the problem, which files begin with.
        root: Folder of the files; by default waves are made up.
        length: Values of a series in the network; by default those of the longest training series.
        noise: Standard deviation of the noise that a training series gets, as a multiple of its channel's.
        scale: Largest share by which a training series is stretched or shrunk in value.
        warp: How unevenly a training series is played (``warp_series``).
        crop: Largest share of a training series that is cut off.
        differences: Whether the central differences of each variable follow as channels of their own, in which small
            notches are as large as anything (as in MultiRocket, arXiv 2102.00457).
        **kwargs: Arguments of ``ArrayDataModule``; few series are met several times in one epoch.
    """

    noun = "series"
    needs_root = False

    def __init__(
        self,
        problem: str = "waves",
        root: str | None = None,
        length: int | None = None,
        noise: float = 0.1,
        scale: float = 0.2,
        warp: float = 0.3,
        crop: float = 0.2,
        differences: bool = False,
        batch_size: int = 16,
        min_batches: int = 25,
        **kwargs,
    ):
        super().__init__(batch_size, min_batches=min_batches, **kwargs)
        self.problem, self.differences = problem, differences
        self.noise, self.scale, self.warp, self.crop = noise, scale, warp, crop
        self.length = self.hparams["length"] = length or max(x.shape[1] for x in self.series("train")[0])

    @functools.cache  # noqa: B019  of small files
    def series(self, part):
        return make_waves(part) if self.root is None else read_ts(self.root / f"{self.problem}_{part.upper()}.ts")

    def check(self, stage):
        super().check(stage)
        self.series("test" if stage == "test" else "train")

    @property
    def class_names(self):
        return self.series("train")[2]

    @property
    def values(self):
        """Channels that are values: variables, and their differences."""
        return len(self.series("train")[0][0]) * (1 + self.differences)

    @property
    def in_chans(self):
        return self.values + (len({x.shape[1] for x in self.series("train")[0]}) > 1)

    @property
    def image_size(self):
        return 1, self.length

    def read(self, part):
        series, labels, _ = self.series(part)
        rows = np.empty((len(series), self.in_chans, 1, self.length))
        for row, x in zip(rows, series):
            x = np.concatenate([x, np.gradient(x, axis=1)]) if self.differences else x
            places = np.linspace(0, x.shape[1] - 1, self.length)
            row[: len(x), 0] = [np.interp(places, range(x.shape[1]), variable) for variable in x]
            row[len(x) :] = x.shape[1] / self.length
        return torch.from_numpy(rows).float(), torch.tensor([self.class_names.index(label) for label in labels])

    def prepare(self, inputs):
        std, mean = torch.std_mean(inputs[:, : self.values].double(), (0, 2, 3), correction=0)
        more = self.in_chans - self.values  # the channel of lengths stays as it is
        self.mean, self.std = mean.tolist() + [0.0] * more, std.clamp(min=1e-6).tolist() + [1.0] * more

    def transform(self, inputs, training):
        inputs = warp_series(inputs, self.warp, self.crop) if training else inputs
        mean, std = (torch.tensor(x, device=inputs.device).view(-1, 1, 1) for x in (self.mean, self.std))
        inputs = (inputs - mean) / std
        if training:
            values = inputs[:, : self.values]
            factor = 1 + self.scale * (2 * torch.rand(len(values), 1, 1, 1) - 1).to(values)
            values.mul_(factor).add_(self.noise * torch.randn(values.shape).to(values))
        return inputs
