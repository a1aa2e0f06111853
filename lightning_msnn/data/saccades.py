"""Scanned digits before a simulated event camera that moves as in N-MNIST. Needs the extra ``events``."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from tonic.datasets import NMNIST

from lightning_msnn.data.base import stratified_split
from lightning_msnn.data.digits import Digits

__all__ = ["SaccadedDigits", "saccade", "write_events"]

SIDE = 34
"""Pixels of a side of the camera."""

STEPS = 90
"""Times at which the camera looks."""

DURATION = 300_000
"""Microseconds of a recording: three saccades."""

CONTRAST = 0.25
"""Change of the logarithm of a pixel's intensity that is an event."""

Events = npt.NDArray[np.void]


def saccade(image: npt.NDArray[np.float64], seed: int) -> Events:
    """Look at an image with three small movements along the sides of a triangle.

    A pixel fires an event of its polarity each time the logarithm of its intensity has changed by :data:`CONTRAST`, as
    the pixels of a DVS do (Lichtsteiner et al., IEEE JSSC 2008); the movement is that of N-MNIST (Orchard et al.,
    arXiv 1507.07629).

    Args:
        image: Intensities in [0, 1], square.
        seed: Of the noise in the movement and in the times.

    Returns:
        Events with fields x, y, t (microseconds) and p (0 or 1), in order of time.
    """
    random = np.random.default_rng(seed)
    corners = np.array([(0.0, 0.0), (3.0, 1.5), (3.0, -1.5), (0.0, 0.0)]) + random.normal(0, 0.3, (4, 2))
    share = np.linspace(0, 3, STEPS + 1)
    path = np.stack([np.interp(share, range(4), corners[:, axis]) for axis in (0, 1)], 1)
    zoom = (len(image) - 1) / 21  # the digit fills 22 of 34 pixels
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 22) / 2
    parts, held = [], None
    for step, (down, right) in enumerate(path):
        seen = map_coordinates(image, [(rows - down) * zoom, (columns - right) * zoom], order=1, mode="constant")
        light = np.log(0.1 + seen)
        held = light.copy() if held is None else held
        while (fired := np.abs(light - held) >= CONTRAST).any():
            y, x = fired.nonzero()
            sign = np.sign(light - held)[y, x]
            held[y, x] += CONTRAST * sign
            t = (step - random.random(len(y))) * DURATION / STEPS
            parts.append((x, y, t, sign > 0))
    events = np.zeros(sum(len(x) for x, *_ in parts), [("x", int), ("y", int), ("t", int), ("p", int)])
    for name, values in zip("xytp", zip(*parts, strict=True), strict=True):
        events[name] = np.concatenate(values)
    return np.sort(events, order="t")


def write_events(file: Path, events: Events) -> None:
    """Write events in the format of N-MNIST: x, y, one bit of polarity and 23 of the time in microseconds."""
    t = events["t"]
    columns = [events["x"], events["y"], events["p"] << 7 | t >> 16, t >> 8 & 255, t & 255]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")  # a file that is there is whole
    np.stack(columns, 1).astype(np.uint8).tofile(part)
    part.replace(file)


class SaccadedDigits(NMNIST):  # type: ignore[misc]
    """The digits of scikit-learn as N-MNIST has those of MNIST; written to the folder when they are first asked for.

    Training and test part are those of :class:`~lightning_msnn.data.Digits`.
    """

    def _files(self) -> dict[int, Path]:
        """Files of this part, by the number of their digit."""
        targets = load_digits().target
        parts = stratified_split(torch.from_numpy(targets), Digits.test_fraction, Digits.test_seed)
        folder = Path(self.location_on_system, self.folder_name)
        chosen = parts[self.folder_name == self.test_folder].tolist()
        return {index: folder / str(targets[index]) / f"{index:05}.bin" for index in chosen}

    def _check_exists(self) -> bool:
        return all(file.is_file() for file in self._files().values())

    def download(self) -> None:
        """Write those recordings of this part that are not there."""
        images = load_digits().images
        for index, file in self._files().items():
            if not file.is_file():
                write_events(file, saccade(images[index] / 16, index))
