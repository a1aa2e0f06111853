"""What is exported: a trained network, and what is known of its images."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_msnn import __version__
from lightning_msnn.nn import BernoulliEncoder
from lightning_msnn.trained import Trained, load_trained

__all__ = ["Source", "read_source"]


class Source(Trained):
    """A trained network, as an exported file describes it."""

    @property
    def settings(self) -> dict[str, object]:
        """Arguments of its data."""
        return dict(self.data_args)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.input_size

    @property
    def random(self) -> bool:
        """Whether the network draws random numbers, so that no two calls agree."""
        return any(isinstance(module, BernoulliEncoder) for module in self.network.modules())

    def facts(self) -> dict[str, str]:
        """Return what an exported file says of itself; each value but names and versions is JSON."""
        return {
            "source": self.name,
            "architecture": self.architecture,
            "lightning_msnn": __version__,
            "class_names": json.dumps(self.class_names),
            "input_size": json.dumps(list(self.shape)),
            "in_chans": json.dumps(self.input_size[0]),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
        }


def read_source(source: str | Path, image_size: int | None = None) -> Source:
    """Load a trained network, see :func:`lightning_msnn.trained.load_trained`."""
    return Source(**vars(load_trained(source, image_size=image_size)))
