"""Load a trained network and its preprocessing: from a checkpoint, an entry of the zoo, or timm.

>>> trained = load_trained("msnn_resnet12_tiny.digits")
>>> trained.input_size, trained.class_names[:3], trained.data
((1, 16, 16), ['0', '1', '2'], 'lightning_msnn.data.Digits')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor, nn

from lightning_msnn import data as data_sets
from lightning_msnn.data import ArrayDataModule, AudioDataModule, ImageDataModule
from lightning_msnn.data.arrays import OF_THE_MACHINE
from lightning_msnn.data.reading import normalise, prepare_pixels, shorten
from lightning_msnn.entries import entries, find, read_config
from lightning_msnn.errors import ConfigurationError, check_integer, choose, parameters_of, suggestion
from lightning_msnn.models.registry import imported, is_ours
from lightning_msnn.runs.checkpoints import is_checkpoint, network_of, read_checkpoint

__all__ = ["Inputs", "Trained", "inputs_of_checkpoint", "inputs_of_entry", "load_trained"]

_TENSORS = ("state_dict", "optimizer_states", "current_model_state")
"""What a checkpoint holds beside facts."""


@dataclass(frozen=True)
class Inputs:
    """What a trained network takes.

    Args:
        name: Name of the zoo entry or of timm's network, or of the checkpoint's file.
        class_names: Names of the classes.
        input_size: Channels, height and width of an input.
        mean: Mean that is subtracted from each channel of images in [0, 1]; empty where they pass as they are.
        std: Standard deviation that they are divided by then.
        data: Path of the data module's class that it was trained on; empty if nothing says it.
        data_args: Arguments of that class, without where the data lies.
        info: All other facts: the entry's ``config.json``, or the checkpoint without its tensors.
    """

    name: str
    class_names: list[str]
    input_size: tuple[int, int, int]
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    data: str = ""
    data_args: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the preprocessing, the same that ``predict`` does: a function to one input of the network.

        It takes a PIL image, or the path of a wav file where the network was trained on recordings.

        Raises:
            ConfigurationError: If the network takes neither square images nor recordings.
        """
        kind = imported(self.data, LightningDataModule) or ImageDataModule
        if issubclass(kind, AudioDataModule):
            module: Any = self.data_module()
            read: Callable[[Any], Tensor] = module.read_one
            return read
        channels, height, width = self.input_size
        if channels not in (1, 3) or height != width:
            raise ConfigurationError(
                f"{self.name} takes {channels} x {height} x {width}, and images are square ones of 1 or 3 channels"
            )

        def prepare(image: Image.Image) -> Tensor:
            pixels = torch.from_numpy(prepare_pixels(image, height, channels).copy())
            return normalise(pixels, self.mean, self.std)

        return prepare

    def data_module(self, root: str | Path | None = None, **given: Any) -> LightningDataModule:
        """Return the data set that the network was trained on, with its preprocessing.

        Args:
            root: Folder of the data set; some need none.
            **given: Further arguments of the data module.

        Raises:
            ConfigurationError: If the data set is not known, its class is not imported, or its arguments do not fit.
        """
        kind, saved = imported(self.data, LightningDataModule), self.data_args
        if kind is None:
            said = f"was trained on {self.data}, which is not imported" if self.data else "names no data"
            raise ConfigurationError(f"{self.name} {said}: import its file, or give the data module itself")
        if issubclass(kind, ArrayDataModule):
            saved = kind.arguments_from(saved, given)
        else:
            given = {name: value for name, value in given.items() if name in parameters_of(kind)}
        arguments = {**saved, **given, **({} if root is None else {"root": str(root)})}
        if issubclass(kind, ImageDataModule):
            arguments.setdefault("image_size", self.input_size[1])
        try:
            module = kind(**arguments)
        except TypeError as error:
            raise ConfigurationError(f"{self.name} gives {kind.__name__} arguments that do not fit: {error}") from error
        self.prepare(module)
        return module

    def prepare(self, module: Any) -> None:
        """Let a data module normalise as the network was trained.

        Raises:
            ConfigurationError: If it is of this package and has another number of channels.
        """
        ours = isinstance(module, ArrayDataModule)
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if not values or not (ours or hasattr(module, name)):
                continue
            if ours and len(values) != module.in_chans:
                raise ConfigurationError(
                    f"{self.name} has a {name} for each of {len(values)} channels, but {type(module).__name__} has "
                    f"{module.in_chans}"
                )
            setattr(module, name, values)

    def test_data(self, root: str | Path | LightningDataModule | None = None, **given: Any) -> LightningDataModule:
        """Return the data set with its test part ready; see :meth:`data_module`. It can be given in place of its root.

        Raises:
            ConfigurationError: If it is not there, or has other classes.
        """
        module: Any = root if isinstance(root, LightningDataModule) else self.data_module(root, **given)
        self.prepare(module)
        if isinstance(module, ArrayDataModule):
            module.check("test")
        self.check(module)
        module.prepare_data()
        module.setup("test")
        return module  # type: ignore[no-any-return]

    def check(self, module: Any) -> None:
        """Compare the class names of a data module, if it has any, with the network's.

        Raises:
            ConfigurationError: If they are others, or in another order.
        """
        theirs = [str(name) for name in getattr(module, "class_names", None) or ()]
        numbers = [str(i) for i in range(len(self.class_names))]
        nameless = self.class_names == numbers and not self.data.startswith(data_sets.__name__)
        if not theirs or nameless or theirs == self.class_names:
            return
        raise ConfigurationError(
            f"{type(module).__name__} has the classes {shorten(theirs)}, but {self.name} knows "
            f"{shorten(self.class_names)}, in this order"
        )


@dataclass(frozen=True)
class Trained(Inputs):
    """A trained network, and what it takes.

    Args:
        network: The network in evaluation mode, in float32 on the CPU.
        architecture: Its registered name; that of a class of the user's own is its path.
    """

    network: nn.Module = field(default_factory=nn.Identity)
    architecture: str = ""


def load_trained(source: str | Path, *, image_size: int | None = None) -> Trained:
    """Load a trained network with what it takes.

    Args:
        source: Checkpoint of ``lightning-msnn fit`` (its name ends in ``.ckpt``), zoo entry in either spelling, or
            name of a pretrained network in ``timm.list_pretrained()``.
        image_size: Height and width of the images in pixels, for checkpoints that do not say it.

    Raises:
        ConfigurationError: If there is no such network, it cannot be read, or the size of its images is not known or
            given otherwise than it says.
    """
    if image_size is not None:
        check_integer("image_size", image_size, 1)
    name = str(source)
    spelled = name.replace(".", "_")
    if is_checkpoint(name):
        made = _of_checkpoint(name, image_size)
    elif Path(name).is_file():
        raise ConfigurationError(f"{name!r} is no source: the name of a checkpoint ends in .ckpt")
    elif timm.is_model_pretrained(name) and not any(entry.replace(".", "_") == spelled for entry in entries()):
        made = _of_timm(name)
    elif timm.is_model(name) and not is_ours(name):
        raise ConfigurationError(f"timm has no weights for {name!r}{suggestion(name, timm.list_pretrained())}")
    else:
        made = _of_entry(name)
    _, height, width = made.input_size
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ConfigurationError(f"image_size is {image_size}, but {made.name} is for {height} x {width}: leave it out")
    return made


def inputs_of_entry(entry: str | Path) -> Inputs:
    """Return what a zoo entry takes; no weights are read.

    Args:
        entry: Name of the entry, in either spelling, or its folder.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    folder = entry if isinstance(entry, Path) else find(entry)
    config = read_config(folder)
    of_data, (channels, height, width) = config.get("data", {}), config["input_size"]
    return Inputs(
        folder.name, list(config["class_names"]), (channels, height, width), list(config["mean"]), list(config["std"]),
        str(of_data.get("class_path") or ""), _data_args(of_data.get("init_args")), config,
    )  # fmt: skip


def inputs_of_checkpoint(content: Mapping[str, Any], name: str, image_size: int | None = None) -> Inputs:
    """Return what the network of a checkpoint takes.

    Args:
        content: The checkpoint, see :func:`lightning_msnn.runs.checkpoints.read_checkpoint`.
        name: Its path.
        image_size: Height and width of the images, if the checkpoint does not say it.

    Raises:
        ConfigurationError: If it does not say what its network takes.
    """
    hparams, seen = content.get("hyper_parameters") or {}, content.get("preprocessing") or {}
    made = content.get("network_arguments") or {}
    if (sides := seen.get("image_size", image_size)) is None:
        raise ConfigurationError(f"{name!r} does not say how large its images are: give image_size")
    try:
        height, width = map(int, [sides] * 2 if isinstance(sides, int) else sides)
        size = (int(made.get("in_chans", hparams.get("in_chans", 3))), height, width)
        mean, std = ([float(value) for value in seen.get(key, ())] for key in ("mean", "std"))
        names = [str(label) for label in content["class_names"]]
    except (LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ConfigurationError(f"{name!r} does not say what images it is for: {reason}") from error
    said, by_cli = (str(part.get("data") or "") for part in (seen, content.get("cli") or {}))
    path = said if "." in said or said in data_sets.__all__ or not by_cli else by_cli  # files of before say no module
    module, _, kind = path.rpartition(".")
    if kind in data_sets.__all__ and (not module or module.startswith(f"{data_sets.__name__}.")):
        path = f"{data_sets.__name__}.{kind}"
    return Inputs(
        Path(name).name, names, size, mean, std, path, _data_args(content.get("datamodule_hyper_parameters")),
        {key: value for key, value in content.items() if key not in _TENSORS},
    )  # fmt: skip


def _data_args(given: Any) -> dict[str, Any]:
    """Arguments of data in a file, without the user's own choices."""
    return {name: value for name, value in (given or {}).items() if name not in OF_THE_MACHINE}


def _of_entry(name: str) -> Trained:
    folder = find(name)
    inputs = inputs_of_entry(folder)
    architecture = inputs.info["architecture"]
    if not timm.is_model(architecture):
        choose(dict.fromkeys(timm.list_models("msnn*")), architecture, "network")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return Trained(**vars(inputs), network=network, architecture=architecture)


def _of_timm(name: str) -> Trained:
    network = timm.create_model(name, pretrained=True).eval()
    cfg = network.pretrained_cfg
    names = list(cfg.get("label_names") or map(str, range(cfg["num_classes"])))
    size, mean, std = tuple(cfg["input_size"]), list(cfg["mean"]), list(cfg["std"])
    return Trained(name, names, size, mean, std, info=cfg, network=network, architecture=name.partition(".")[0])


def _of_checkpoint(name: str, image_size: int | None) -> Trained:
    content = read_checkpoint(name)
    said: Any = (content.get("hyper_parameters") or {}).get("network")
    network = network_of(content, name, said).float().eval()
    registered = said.partition(".")[0] if timm.is_model(said) else said
    return Trained(
        **vars(inputs_of_checkpoint(content, name, image_size)), network=network,
        architecture=str(getattr(network, "architecture", "") or registered),
    )  # fmt: skip
