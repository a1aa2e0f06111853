"""What a checkpoint or an entry says of a run's model and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_msnn import tasks
from lightning_msnn.data.arrays import OF_THE_MACHINE, ArrayDataModule
from lightning_msnn.entries import entries
from lightning_msnn.errors import ConfigurationError, parameters_of
from lightning_msnn.models.registry import imported
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.trained import Inputs, inputs_of_checkpoint, inputs_of_entry

__all__ = ["Source", "compare_resumed", "options_of"]

OF_THE_TRAINING = {
    "run": ("ema",),
    "trainer": ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
}
"""Options by section that a resumed training has as it began, beside its model and its data."""

_CLASSIFIER = f"{tasks.__name__}.{tasks.SpikingClassifier.__name__}"

_BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}


class Source:
    """What a checkpoint or an entry, by its name, says of the run that evaluates it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: Inputs | None = None
        """What the network takes; None of a checkpoint of another module, which does not say it."""
        if name in entries():
            self.inputs = inputs_of_entry(name)
            shape = {"num_classes": len(self.inputs.class_names), "in_chans": self.inputs.input_size[0]}
            model, arguments = _CLASSIFIER, {"network": name, "pretrained": True, **shape}
        else:
            content = read_checkpoint(name)
            said, arguments = content.get("cli") or {}, dict(content.get("hyper_parameters") or {})
            model, data = (str(said.get(section) or "") for section in _BASES)
            of_data = dict(content.get("datamodule_hyper_parameters") or {})
            if (content.get("preprocessing") or {}).get("data") and "class_names" in content:
                self.inputs, model = inputs_of_checkpoint(content, name), model or _CLASSIFIER
        if self.inputs is not None:
            data, of_data = self.inputs.data, dict(self.inputs.data_args)
            kind = imported(data, LightningDataModule)
            if kind is not None and "image_size" in parameters_of(kind):
                of_data["image_size"] = self.inputs.input_size[1]
        self.paths = {"model": model, "data": data}
        """Paths of its classes; empty if nothing says them."""
        self.arguments: dict[str, dict[str, Any]] = {"model": arguments, "data": of_data}
        """Their arguments."""

    def configuration(self, args: Sequence[str]) -> dict[str, Any]:
        """Return model and data as a configuration; a class that is not imported must be among these arguments."""
        found, names = {}, {arg.partition("=")[0] for arg in args}
        for section, path in self.paths.items():
            kind: type | None = imported(path, _BASES[section])
            if kind is not None:
                arguments, known = self.arguments[section], parameters_of(kind).keys() - OF_THE_MACHINE
                if issubclass(kind, ArrayDataModule):
                    arguments = kind.arguments_from(arguments, given=None)
                given = {name: _plain(value) for name, value in arguments.items() if name in known}
                found[section] = {"class_path": path, "init_args": given}
            elif path and not names & {f"--{section}", "--config", "-c"}:
                raise ConfigurationError(
                    f"{self.name} has {path}: give --{section} {path}, and import the file that defines it with "
                    "--run.imports"
                )
        return found

    def check(self, config: Namespace) -> None:
        """Compare a run's model with this one's, let it be this one's, and ask for paths that only the user gives."""
        kind = imported(self.paths["data"], ArrayDataModule)
        if kind is not None and imported(config.data.class_path, LightningDataModule) is kind:
            defaults, arguments = parameters_of(kind), config.data.init_args.items()
            kind.arguments_from(self.arguments["data"], {n for n, value in arguments if value != defaults.get(n)})
        ours, path = config.model.class_path, self.paths["model"]
        if path and imported(ours, LightningModule) is not imported(path, LightningModule):
            raise ConfigurationError(f"model is {ours}, but {self.name} has {path}: give --model {path}")
        arguments = config.model.init_args
        for name, theirs in _plain(self.arguments["model"]).items():
            if name not in arguments or name == "pretrained":
                continue
            value = _plain(arguments[name])
            agree = value == theirs
            if name == "network":
                agree = str(value).partition(".")[0] == str(theirs).partition(".")[0]
            elif name == "network_kwargs":
                agree = (value or {}).items() <= (theirs or {}).items()
            if not agree:
                raise ConfigurationError(f"model.{name} is {value!r}, but {self.name} has {theirs!r}: leave it out")
            arguments[name] = theirs


def compare_resumed(config: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    """Refuse to resume a training with another model, other data or another option that must stay.

    Args:
        config: The configuration.
        theirs: What the command line has stored in the checkpoint.
        name: The checkpoint.
    """
    known = theirs.get("options") or {}
    for option, ours in options_of(config):
        if option in known and ours != known[option]:
            raise ConfigurationError(
                f"{option} is {ours!r}, but {name} has {known[option]!r}: a training is resumed by the command that "
                "began it; train anew under another run.name"
            )


def options_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a configuration that a resumed training has as it began, and their values."""
    for section in (*_BASES, "optimizer", "lr_scheduler"):
        part = config.get(section) or {}
        yield f"{section}.class_path", part.get("class_path")
        arguments = (part.get("init_args") or {}).items()
        yield from ((f"{section}.{name}", value) for name, value in arguments if name not in OF_THE_MACHINE)
    for section, names in OF_THE_TRAINING.items():
        part = config.get(section) or {}
        yield from ((f"{section}.{name}", part[name]) for name in names if name in part)


def _plain(value: Any) -> Any:
    """A value as a configuration and a checkpoint hold it alike."""
    if isinstance(value, Namespace | Mapping):
        return {str(key): _plain(part) for key, part in dict(value).items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
