"""What a checkpoint or an entry of the zoo says of model, data and preprocessing, where the user says nothing."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import Namespace

from lightning_msnn import data, tasks
from lightning_msnn.cli.config_files import short
from lightning_msnn.cli.given import BASES, OURS, Given, arguments_of, class_at, path_of
from lightning_msnn.entries import find, read_config
from lightning_msnn.errors import ConfigurationError, UnknownNameError

__all__ = ["AT_THE_START", "OF_A_TRAINING", "OF_THE_DATA", "OF_THE_MACHINE", "Known", "plain"]

OF_THE_MACHINE = {"root", "folder", "download", "num_workers", "pin_memory"}
"""Arguments of the data that say where it lies and how it is loaded: no checkpoint chooses them."""

OF_THE_DATA = {"length"}
"""Arguments of the data that are read off it where they are null, as they are in a run's ``config.yaml``."""

OF_A_TRAINING = {
    "run": ("ema",),
    "trainer": ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
}
"""Options by section that decide what a training makes of its data, and that a resumed one has as it had them."""

AT_THE_START = {"pretrained": False}
"""Arguments of the model that say what a training starts from, as a checkpoint leaves them."""


def plain(value: Any) -> Any:
    """Return a value as a configuration and a checkpoint hold it alike."""
    if isinstance(value, Namespace | dict):
        return {str(key): plain(part) for key, part in dict(value).items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class Known:
    """What is known beside what is given.

    Args:
        given: What the user gives. A class that a checkpoint or an entry names becomes that of this run if none is
            given.
    """

    def __init__(self, given: Given) -> None:
        self.source = ""
        """The checkpoint or the entry."""
        self.arguments: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
        """Arguments by section."""
        self.preprocessing: dict[str, Any] = {}
        """``mean``, ``std``, ``image_size`` and ``class_names`` of what the weights have learnt from."""
        self._given = given

    def read_checkpoint(self, content: dict[str, Any], source: str, resumed: bool) -> None:
        """Take model, data and preprocessing of a checkpoint, and options of its training if that goes on.

        Raises:
            ConfigurationError: If the classes that are given are not those of the checkpoint.
        """
        self.source = source
        known = content.get("cli") or {}
        self.preprocessing = seen = dict(content.get("preprocessing") or {})
        if isinstance(content.get("class_names"), list):
            seen["class_names"] = content["class_names"]
        if seen.get("data") in data.__all__:
            known = {"data": f"{data.__name__}.{seen['data']}", **known}
        for section, hparams in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
            kind = self._take_class(section, known.get(section), resumed)
            values = content.get(hparams)
            if isinstance(values, dict) and kind is self._given.classes[section]:
                if section == "data" and not resumed:
                    values = self._arguments_of(kind, values)
                self._take_arguments(section, kind, values)
        for section, names in OF_A_TRAINING.items() if resumed else ():
            values = known.get(section)
            if isinstance(values, dict):
                self.arguments[section] = {name: values[name] for name in names if name in values}
        self._know_size()

    def read_entry(self, name: str) -> None:
        """Take data and preprocessing of a pretrained entry of the zoo, and what its weights fit.

        Raises:
            ConfigurationError: If its data is of a class that is not of this package, and none is given.
        """
        config = read_config(find(name))
        self.source = name
        self.arguments["model"] = {"num_classes": config["num_classes"], "in_chans": config["input_size"][0]}
        self.preprocessing = {field: config[field] for field in ("mean", "std", "class_names")}
        self.preprocessing["image_size"] = config["input_size"][1]
        of_data = config.get("data", {})
        kind = self._take_class("data", of_data.get("class_path"), resumed=False)
        if kind is not None:
            self._take_arguments("data", kind, self._arguments_of(kind, of_data.get("init_args")))
        self._know_size()

    def compare(self, config: Namespace, resumed: bool) -> None:
        """Compare what is given with what is known; what a training was started with becomes what its checkpoint has.

        Args:
            config: All options of the run, parsed.
            resumed: Whether a training goes on: then its data must be that of the checkpoint too.

        Raises:
            ConfigurationError: If an option is given otherwise than the checkpoint or the entry has it.
        """
        for section, known in self.arguments.items():
            ours = plain(config[section].get("init_args", {}) if section in BASES else config[section])
            given = {key.partition(".")[2] for key in self._given.values if key.startswith(f"{section}.")}
            if section == "data" and not resumed:
                continue
            for name in sorted(given & known.keys() - AT_THE_START.keys()):
                if ours[name] != known[name] and not (ours[name] is None and name in OF_THE_DATA):
                    raise ConfigurationError(
                        f"{section}.{name} is {ours[name]!r}, but {self.source} has {known[name]!r}: leave it out, or "
                        "train anew under another run.name"
                    )

    def apply(self, model: Any, datamodule: Any, classes_differ: bool) -> None:
        """Have images prepared as those that the weights have learnt from, and classes named as they were.

        Args:
            model: The module.
            datamodule: Its data, or None.
            classes_differ: Whether the data may have other classes, or these in another order.

        Raises:
            ConfigurationError: If the data has another number of channels, or its classes in another order.
        """
        for name in ("mean", "std"):
            learns = isinstance(datamodule, data.ArrayDataModule)  # has none before it has read its data
            if name in self.preprocessing and (learns or hasattr(datamodule, name)):
                values = tuple(self.preprocessing[name])
                channels = getattr(datamodule, "in_chans", None)
                ours = isinstance(datamodule, data.ImageDataModule | data.ArrayDataModule)
                if ours and len(values) != channels:
                    raise ConfigurationError(
                        f"{self.source} has {name} {list(values)}, a number for each channel, but the data has "
                        f"{channels}"
                    )
                setattr(datamodule, name, values)
        if isinstance(model, tasks.Task) and "class_names" in self.preprocessing:
            known = [str(name) for name in self.preprocessing["class_names"]]
            if not classes_differ:
                theirs = [str(name) for name in getattr(datamodule, "class_names", known)]
                if theirs != known and sorted(theirs) == sorted(known):
                    raise ConfigurationError(
                        f"the data has its classes in another order than {self.source}: {short(theirs)}, not "
                        f"{short(known)}"
                    )
            model.class_names = known

    def _take_class(self, section: str, path: Any, resumed: bool) -> type | None:
        """Return the class that a checkpoint names; if none is given, one of ours becomes that of this run."""
        given = self._given.classes[section]
        if not isinstance(path, str):
            return None if section == "data" else given
        if section not in self._given.values and path.startswith(f"{OURS[section].__name__}."):
            given = self._given.classes[section] = class_at(path, section)
        same = path in (path_of(given), f"{OURS[section].__name__}.{given.__name__}")
        # A file names no class that is imported for it, and weights are tested on other data if that is asked for.
        if not same and (section == "model" or resumed or section not in self._given.values):
            raise UnknownNameError(
                f"{section} is {path_of(given)}, but {self.source} has {path}: give --{section} {path}",
                "" if path.partition(".")[0] in sys.modules else section,
                path,
            )
        return given if same else None

    def _take_arguments(self, section: str, kind: type, values: dict[str, Any]) -> None:
        """Take what the class of this run has too, and what is not of the machine."""
        allowed = arguments_of(kind).keys() - OF_THE_MACHINE
        self.arguments[section] = {name: plain(value) for name, value in values.items() if name in allowed}

    def _arguments_of(self, kind: type, values: Any) -> dict[str, Any]:
        """Arguments of data that a file may choose."""
        ours = issubclass(kind, data.PartDataModule)
        return kind.arguments_from(values, self._given.names("data")) if ours else {}

    def _know_size(self) -> None:
        if "image_size" in self.preprocessing and "image_size" in arguments_of(self._given.classes["data"]):
            self.arguments["data"]["image_size"] = self.preprocessing["image_size"]
