"""What is exported: the network of a checkpoint or of a zoo entry, and what is known of its images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_msnn import __version__
from lightning_msnn.errors import ConfigurationError, check_integer
from lightning_msnn.models.weights import find, read_config
from lightning_msnn.nn import BernoulliEncoder
from lightning_msnn.zoo.loading import load

__all__ = ["Source", "read_source"]


@dataclass(frozen=True)
class Source:
    """A trained network, and what its images are.

    Args:
        name: Name of the zoo entry, or of the checkpoint's file.
        network: The network in evaluation mode, in float32.
        architecture: Its name in timm's registry.
        arguments: Its arguments there.
        class_names: Names of its classes.
        input_size: Channels, height and width of its images.
        mean: Mean that is taken from each channel of values in [0, 1]; empty where images pass as they are.
        std: Deviation by which it is divided then.
        data: Name of the class in :mod:`lightning_msnn.data` that it learnt from; empty if it is none of them.
        settings: Arguments of that class.
    """

    name: str
    network: nn.Module
    architecture: str
    arguments: Mapping[str, Any]
    class_names: list[str]
    input_size: tuple[int, int, int]
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: ``input_size``, and before it the steps where data has a frame for each."""
        frames = self.settings.get("time_steps", 1)
        return (frames, *self.input_size) if isinstance(frames, int) and frames > 1 else self.input_size

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
    """Read a trained network.

    Args:
        source: Checkpoint of ``lightning-msnn fit`` with the ending ``.ckpt``, or name of a zoo entry.
        image_size: Height and width of the images in pixels, for checkpoints that do not say them.

    Raises:
        ConfigurationError: If there is no such checkpoint or entry, it cannot be read, or the size of its images is not
            known or given otherwise than it says.
    """
    if not isinstance(source, str | Path):
        raise ConfigurationError(f"a source must be a checkpoint or the name of a zoo entry, not {source!r}")
    if image_size is not None:
        check_integer("image_size", image_size, 1)
    name = str(source)
    if Path(name).suffix == ".ckpt":
        return _of_checkpoint(name, image_size)
    if Path(name).exists():
        raise ConfigurationError(
            f"{name!r} is no source: give a checkpoint of lightning-msnn fit, with the ending .ckpt, or the name of a "
            "zoo entry"
        )
    folder = find(name)
    config = read_config(folder)
    size = (config["input_size"][0], config["input_size"][1], config["input_size"][2])
    _check_size(image_size, size, folder.name)
    package, _, data = str(config.get("data", {}).get("class_path")).rpartition(".")
    return Source(
        folder.name, load(folder.name), config["architecture"], config["model_args"], config["class_names"], size,
        list(config["mean"]), list(config["std"]), data if package == "lightning_msnn.data" else "",
        config.get("data", {}).get("init_args") or {"image_size": size[1]},
    )  # fmt: skip


def _check_size(given: int | None, size: tuple[int, ...], name: str) -> None:
    if given is not None and size[1:] != (given, given):
        raise ConfigurationError(f"image_size is {given}, but {name} is for {size[1]} x {size[2]}: leave it out")


def _of_checkpoint(name: str, image_size: int | None) -> Source:
    # Here, since they take Lightning, which entries do not.
    from lightning_msnn.data.base import LARGEST_IMAGE, arguments_of_checkpoint
    from lightning_msnn.runs.checkpoints import network_of, read_checkpoint

    content = read_checkpoint(name)
    if "season" in (content.get("hyper_parameters") or {}):
        raise ConfigurationError(
            f"{name!r} is of a forecaster, and what it adds to its network's outputs would not come along: allowed are "
            "classifiers"
        )
    network = network_of(content, name).float().eval()
    arguments = dict(getattr(network, "arguments", None) or {})
    architecture = str(getattr(network, "architecture", "") or content["hyper_parameters"]["network"])
    seen = content.get("preprocessing") or {}
    settings = arguments_of_checkpoint(content.get("datamodule_hyper_parameters"), ("root", "dataset"))
    try:
        channels = int(arguments.get("in_chans", content["hyper_parameters"].get("in_chans", 3)))
        sides = seen.get("image_size", image_size)
        if sides is None:
            raise ConfigurationError(f"{name!r} does not say how large its images are: give --image_size")
        height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)
        size = (channels, check_integer("height", height, 1), check_integer("width", width, 1))
        mean, std = [float(v) for v in seen.get("mean", [])], [float(v) for v in seen.get("std", [])]
        names = [str(label) for label in content["class_names"]]
    except ConfigurationError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ConfigurationError(f"{name!r} does not say what images it is for: {reason}") from error
    if len(mean) != len(std) or len(mean) not in (0, channels):
        raise ConfigurationError(f"{name!r} has mean {mean} and std {std}, but images of {channels} channels")
    if size[1] * size[2] > LARGEST_IMAGE**2:
        raise ConfigurationError(
            f"images of {name!r} must have at most {LARGEST_IMAGE**2} pixels, not {size[1]} x {size[2]}"
        )
    frames, steps = settings.get("time_steps", 1), getattr(network, "time_steps", 1)
    if frames not in (1, steps):
        raise ConfigurationError(f"{name!r} has data of {frames!r} time steps, and its network has {steps}")
    _check_size(image_size, size, name)
    return Source(
        Path(name).name, network, architecture, arguments, names, size, mean, std, str(seen.get("data", "")), settings
    )
