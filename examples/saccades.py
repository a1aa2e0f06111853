"""A data set of your own: scanned digits before a simulated event camera that moves as in N-MNIST, as frames of events.

    lightning-msnn fit --run.imports examples/saccades.py --data saccades.SaccadedDigits --config recipe/tiny

``--data.frames 4`` cuts a recording into four frames, which are stacked as channels. For real recordings, such as those
of the package tonic, let ``read`` count their events.
"""

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from lightning_msnn.data import ArrayDataModule, BatchAugmentation, Digits
from lightning_msnn.data.arrays import stratified_split

SIDE = 34
"""Pixels of a side of the camera."""

STEPS = 90
"""Times at which the camera looks, during three saccades."""

CONTRAST = 0.25
"""Change of the logarithm of a pixel's intensity that is an event."""


def saccade(image, seed):
    """Look at an image with three small movements along the sides of a triangle.

    A pixel fires an event of its polarity each time the logarithm of its intensity has changed by ``CONTRAST``, as the
    pixels of a DVS do (Lichtsteiner et al., IEEE JSSC 2008); the movement is that of N-MNIST (Orchard et al.,
    arXiv 1507.07629).

    Args:
        image: Intensities in [0, 1], square.
        seed: Of the noise in the movement.

    Returns:
        Numbers of events by step, polarity, row and column, (90, 2, 34, 34).
    """
    random = np.random.default_rng(seed)
    corners = np.array([(0.0, 0.0), (3.0, 1.5), (3.0, -1.5), (0.0, 0.0)]) + random.normal(0, 0.3, (4, 2))
    share = np.linspace(0, 3, STEPS + 1)
    path = np.stack([np.interp(share, range(4), corners[:, axis]) for axis in (0, 1)], 1)
    zoom = (len(image) - 1) / 21  # the digit fills 22 of 34 pixels
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 22) / 2
    events, held = np.zeros((STEPS, 2, SIDE, SIDE), int), None
    for step, (down, right) in enumerate(path):
        seen = map_coordinates(image, [(rows - down) * zoom, (columns - right) * zoom], order=1, mode="constant")
        light = np.log(0.1 + seen)
        held = light.copy() if held is None else held
        fired = np.trunc((light - held) / CONTRAST)
        held += CONTRAST * fired
        if step:
            events[step - 1] = np.maximum(fired, 0), np.maximum(-fired, 0)
    return events


class SaccadedDigits(ArrayDataModule):
    """The digits of scikit-learn as a camera sees them that fires where light changes, ``(B, 2 * frames, 34, 34)``.

    Training and test part are those of ``Digits``. A network sees ``log(1 + events)``, normalised.

    Args:
        frames: Parts of equal duration that a recording is cut into.
        shift: Most pixels that a training recording is moved to each side.
        batch_size: Recordings a batch.
    """

    noun = "recordings"
    class_names = tuple("0123456789")
    image_size = (SIDE, SIDE)
    needs_root = False

    def __init__(self, frames: int = 1, shift: int = 2, batch_size: int = 64, **kwargs):
        super().__init__(batch_size, **kwargs)
        self.frames = frames
        self.augment = BatchAugmentation(shift, flip=0.0)

    @property
    def in_chans(self):
        return 2 * self.frames

    def read(self, part):
        digits = load_digits()
        targets = torch.from_numpy(digits.target)
        chosen = stratified_split(targets, Digits.test_fraction, Digits.test_seed)[part == "test"]
        counts = torch.empty(len(chosen), self.in_chans, SIDE, SIDE, dtype=torch.uint8)
        for row, index in enumerate(chosen.tolist()):
            parts = np.array_split(saccade(digits.images[index] / 16, index), self.frames)
            counts[row] = torch.from_numpy(np.concatenate([x.sum(0) for x in parts])).clamp(max=255)
        return counts, targets[chosen]

    def prepare(self, inputs):
        values = inputs.float().log1p()
        self.mean, self.std = values.mean((0, 2, 3)).tolist(), values.std((0, 2, 3)).clamp(min=1e-6).tolist()

    def transform(self, inputs, training):
        if training:
            inputs = self.augment(inputs)
        mean, std = (torch.tensor(value, device=inputs.device).view(-1, 1, 1) for value in (self.mean, self.std))
        return (inputs.float().log1p() - mean) / std
