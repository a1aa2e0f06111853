"""The command line: ``lightning-msnn fit|validate|test|predict``, a LightningCLI for any module and any data.

``lightning-msnn export`` and ``describe`` have command lines of their own: :mod:`lightning_msnn.export` and
:mod:`lightning_msnn.describe`. ``dial`` is a ``fit`` whose arguments :mod:`lightning_msnn.dial` completes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_msnn import __version__, data, tasks
from lightning_msnn.callbacks import (
    EMA,
    BestCheckpoint,
    EnergyMonitor,
    IntegerInference,
    ParameterSummary,
    PredictionWriter,
    SpikeRateMonitor,
    TrainingCurves,
)
from lightning_msnn.data.base import arguments_of_checkpoint
from lightning_msnn.describe import main as describe
from lightning_msnn.dial import fit_arguments
from lightning_msnn.errors import ConfigurationError, TrainingError, UnknownNameError, check_yaml, suggestion
from lightning_msnn.export.__main__ import main as export
from lightning_msnn.imports import HELP, explained, import_files
from lightning_msnn.models.weights import entries, find, read_config
from lightning_msnn.nn import Spike
from lightning_msnn.runs import (
    AtomicCheckpointIO,
    Claim,
    FiniteLoss,
    LastCheckpoint,
    LoggerGuard,
    RandomState,
    claim_version,
    newest_version,
    read_checkpoint,
    release_version,
)

__all__ = ["MSNNCLI", "configurations", "find_configuration", "main"]

BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
DEFAULTS: dict[str, type] = {"model": tasks.SpikingClassifier, "data": data.Digits}
OURS = {"model": tasks, "data": data}

LINKED = {"num_classes": "num_classes", "in_chans": "in_chans", "img_size": "image_size", "season": "season"}
"""Arguments of the model that are an attribute of the data by default."""

OF_THE_MACHINE = {"root", "folder", "cache_dir", "download", "num_workers", "pin_memory"}
"""Arguments of the data that say where it lies and how it is loaded: no checkpoint chooses them."""

OF_THE_DATA = {"length"}
"""Arguments of the data that are read off it where they are null, as they are in a run's ``config.yaml``."""

OF_A_TRAINING = {
    "run": ("ema",),
    "trainer": ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
}
"""Options by section that decide what a training makes of its data, and that a resumed one has as it had them."""

AT_THE_START = {"pretrained": False, "init_from": None}
"""Arguments of the model that say what a training starts from, as a checkpoint leaves them."""

EPOCHS = 30
"""Epochs of a training whose end nothing else says."""

BEST = "val/top1"
"""Metric that chooses the best checkpoint if no other is named."""

IMPORTS = "run.imports"
"""Option that names files of the user's own."""

OTHERS: dict[str, Callable[[Sequence[str]], None]] = {"export": export, "describe": describe}
"""Verbs that are no training of LightningCLI, each with a command line of its own."""

MORE = (*OTHERS, "dial")
"""Verbs that are not those of LightningCLI."""

_LOCAL_LOGGERS = ("CSVLogger", "TensorBoardLogger")


def _is_local(logger: Any) -> bool:
    return logger.class_path.rpartition(".")[2] in _LOCAL_LOGGERS


def _with_local_first(given: Any) -> list[Any]:
    """Return loggers, one of local files before those of services: the folder of the first is that of the run."""
    loggers = [logger for logger in (given if isinstance(given, list) else [given]) if hasattr(logger, "class_path")]
    if not any(map(_is_local, loggers)):
        name = f"lightning.pytorch.loggers.{_LOCAL_LOGGERS[0]}"
        loggers.append(Namespace(class_path=name, init_args=Namespace(save_dir=".")))
    return sorted(loggers, key=_is_local, reverse=True)


# Configurations by name


def configurations() -> dict[str, Path]:
    """Return the configurations that come with the package, by name, such as ``recipe/fast``."""
    package = Path(__file__).resolve().parent
    folder = next((f for f in (package / "_configs", package.parent / "configs") if f.is_dir()), package / "_configs")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Return a configuration's file: one of that name on the disk, else one that comes with the package.

    Args:
        name: Path of a file, or name such as ``quickstart`` or ``data/cifar100``.

    Raises:
        ConfigurationError: If there is none; the message lists those that come with the package.
    """
    if Path(name).is_file():
        return Path(name)
    known = configurations()
    if (short := name.removesuffix(".yaml")) not in known:
        raise ConfigurationError(
            f"no configuration {name!r}: neither a file nor one of {', '.join(known)}{suggestion(short, known)}"
        )
    return known[short]


def _read_configuration(name: str) -> dict[str, Any]:
    path = find_configuration(name)
    content: dict[str, Any]
    try:
        check_yaml(text := path.read_text(encoding="utf-8"))
        content = get_loader("yaml")(text)
    except Exception as error:  # tags on values that are none of theirs make the loader raise what it pleases
        raise ConfigurationError(f"cannot read the configuration {name!r}: {_sentence(error)}") from error
    _check_options(name, "", content)
    for section in (*BASES, "trainer", "run"):
        part = content.get(section)
        if part is not None and not (section in BASES and isinstance(part, str)):
            _check_options(name, f" of {section}", part)
            for key in ("init_args", "dict_kwargs"):
                if section in BASES and part.get(key) is not None:
                    _check_options(name, f" of {section}.{key}", part[key])
    return content


def _check_options(name: str, where: str, content: Any) -> None:
    """Raise a ConfigurationError if a part of a configuration is not options by name."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(f"the configuration {name!r} must have options by name{where}, not {_short(content)}")


def _short(value: Any) -> str:
    """Text of a value, cut where it gets long."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _sentence(error: BaseException) -> str:
    """What an error says, in one line; its type too where it says little."""
    while str(error).startswith("Does not validate against any of the Union") and (within := error.__cause__):
        error = within  # what a class raised, without all of its arguments
    said = " ".join(str(error).split())
    return said if isinstance(error, ConfigurationError | OSError) else f"{type(error).__name__} {said}".strip()


# What is allowed: looked up in the parsers, so that an error can name it


@cache
def _class_parser(kind: type) -> ArgumentParser:
    """Return a parser of the arguments of a class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options of a parser by name; those whose name is only the beginning of others' are left out."""
    actions = {action.dest: action for action in parser._actions if not f".{action.dest}".endswith(".help")}
    return {name: a for name, a in actions.items() if not any(other.startswith(f"{name}.") for other in actions)}


def _arguments(kind: type) -> dict[str, argparse.Action]:
    return _actions(_class_parser(kind))


def _class(path: Any, section: str) -> type:
    """Import the class of a model or of data; one of ours needs no path, only its name."""
    base, ours = BASES[section], OURS[section]
    module, _, name = str(path).rpartition(".")
    known = {getattr(ours, n).__name__: getattr(ours, n) for n in ours.__all__ if isinstance(getattr(ours, n), type)}
    try:
        kind = getattr(import_module(module), name) if module else known[name]
    except Exception as error:  # whatever importing a module raises
        there = [f"{ours.__name__}.{n}" for n, k in known.items() if issubclass(k, base)]
        raise UnknownNameError(
            f"{section} {path!r} cannot be imported ({error}): allowed are {', '.join(there)} and the path of another "
            f"{base.__name__}{suggestion(str(path), there)}",
            section,
            str(path),
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigurationError(f"{section} must be the path of a {base.__name__}, not {path!r}")
    return kind


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _classes(kind: Any) -> list[type]:
    """Classes of which an option takes objects, those derived from them too."""
    if not isinstance(kind, type) or get_args(kind):
        return [c for part in get_args(kind) for c in _classes(part)]
    if kind.__module__ == "builtins" or issubclass(kind, os.PathLike):
        return []
    derived: list[type] = type.__subclasses__(kind)
    return [kind, *(c for d in derived for c in _classes(d))]


def _names_one(value: str, kinds: list[type]) -> bool:
    """Whether a string is the name of one of some classes, or the path of one or of what makes one; it is imported."""
    module, _, name = value.rpartition(".")
    if not module:
        return any(kind.__name__ == name for kind in kinds)
    if not kinds or not all(part.isidentifier() for part in value.split(".")):
        return False
    try:
        found = getattr(import_module(module), name)
        return issubclass(found, tuple(kinds)) if isinstance(found, type) else callable(found)
    except Exception:  # whatever importing a module raises; the parser says what is wrong with the value
        return False


def _check_value(parser: ArgumentParser, name: str, action: argparse.Action, key: str, value: Any) -> None:
    """Raise a ConfigurationError if a single value is not of an option's type."""
    kind = getattr(action, "_typehint", action.type)
    if not isinstance(value, str | int | float) or (isinstance(value, str) and _names_one(value, _classes(kind))):
        return  # what is composed, or the name of a class, the parser checks part by part
    try:
        parser.validate(Namespace({name: value}), skip_required=True)
    except (TypeError, ValueError, ArithmeticError, argparse.ArgumentError) as error:
        allowed = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise ConfigurationError(f"{key} must be {allowed}, not {value!r}") from error


class _Parser(LightningArgumentParser):
    """A parser whose errors are configuration errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise ConfigurationError(" ".join(str(message).split())) from ex


# What is given


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a configuration, those of model and data without ``init_args``."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in ("model.init_args", "data.init_args") and isinstance(value, dict):
            yield from _flat(value, prefix)
        elif isinstance(value, dict) and name in ("model", "data", "trainer", "run"):
            yield from _flat(value, f"{name}.")
        else:
            yield (prefix.rstrip(".") if name in ("model.class_path", "data.class_path") else name), value


def _pairs(name: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an argument gives, by key: of a configuration all that is in it."""
    return _flat(content) if isinstance(content, dict) else iter([(name, content)])


def _imports(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the files that are to be imported, read as the parser reads the option."""
    parser = _Parser(exit_on_error=False)
    parser.add_argument(f"--{IMPORTS}", type=str | list[str], default=[])
    given = [
        f"--{key}={value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)}"
        for key, value in pairs
        if key.removesuffix("+") == IMPORTS and value is not None
    ]
    found = parser.parse_args(given)[IMPORTS]
    return [found] if isinstance(found, str) else found


class _Given:
    """What the user gives on the command line and in configurations, in its order, and checked.

    Files that are to be imported are, before anything else is looked at. The classes of model and data are those named
    last. Options given for another class are passed on to them as far as they have them too, so that data and recipe
    can be named in any order.

    Args:
        parser: The parser of the verb.
        args: The arguments after the verb.

    Raises:
        ConfigurationError: If an option does not exist or its value is of the wrong type.
    """

    def __init__(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        self.parser = parser
        self.values: dict[str, Any] = {}
        self.classes = dict(DEFAULTS)
        self._known = _actions(parser)
        self._parts: list[tuple[str, Any, list[str]]] = []
        self._unknown: list[tuple[str, Any]] | None = []  # of a class that a file may yet name; None: none will
        tokens = list(args)
        while tokens:
            first = tokens.pop(0)
            name, equals, value = first.partition("=")
            given: str | None = value if equals else None
            raw = [first]
            if first.startswith("-") and not equals and tokens and not tokens[0].startswith("--"):
                given = tokens.pop(0)
                raw.append(given)
            name = "config" if name == "-c" else name.removeprefix("--")
            content = _read_configuration(given) if name == "config" and given is not None else given
            self._parts.append((name, content, raw))
        pairs = [pair for name, content, _ in self._parts for pair in _pairs(name, content)]
        self.imports = import_files(_imports(pairs))
        for key, value_ in pairs:
            self._note(key.replace(".init_args.", ".") if key.startswith(("model.", "data.")) else key, value_)
        self.help: list[str] = []
        """The argument that asks for the help of a class, by default of the one that is given."""
        for name, value, raw in self._parts:
            section, _, rest = name.partition(".")
            if section in BASES and rest == "help":
                kind = self.classes[section] if value is None else _class(value, section)
                self.help = [f"--{name}={_path(kind)}"]
            elif rest == "help" or rest.endswith(".help"):
                self.help = raw

    def _note(self, key: str, value: Any) -> None:
        section, _, rest = key.partition(".")
        if section in BASES and (not rest or rest == "class_path"):
            self.classes[section] = _class(value, section)
            self.values[section] = value
            return
        name, plus = key.removesuffix("+"), key.endswith("+")
        if section in BASES:
            parser, known = _class_parser(self.classes[section]), _arguments(self.classes[section])
            name = rest.removesuffix("+").partition(".")[0]
            if name in ("help", "dict_kwargs"):
                return
        else:
            parser, known = self.parser, self._known
        if name in known:
            if not plus and (section not in BASES or name == rest):
                _check_value(parser, name, known[name], key, value)
        elif name.startswith("-") or name in ("help", "print_config"):
            return
        elif section in BASES and section not in self.values and self._unknown is not None:
            self._unknown.append((key, value))
            return
        elif section in BASES or not any(name.startswith(f"{other}.") for other in known):
            owner = f" of {_path(self.classes[section])}" if section in BASES else ""
            hint, allowed = suggestion(name, known), f": allowed are {', '.join(known)}"
            raise ConfigurationError(f"unknown option {key!r}{owner}{hint or allowed}")
        self.values[f"{section}.{name}" if section in BASES else name] = value

    def names(self, section: str) -> set[str]:
        """Names of the arguments of a section, with those that wait for its class to be known."""
        keys = [*self.values, *(key for key, _ in self._unknown or [])]
        return {key.partition(".")[2].partition(".")[0] for key in keys if key.startswith(f"{section}.")}

    def settle(self) -> None:
        """Check what waited for the classes that a checkpoint or an entry names, now that they are known.

        Raises:
            ConfigurationError: If an option does not exist or its value is of the wrong type.
        """
        waited, self._unknown = self._unknown or [], None
        for key, value in waited:
            self._note(key, value)

    def arguments(self, front: dict[str, Any], back: dict[str, Any]) -> list[str]:
        """Return the command line that the parser reads.

        Args:
            front: Arguments by section that what is given takes the place of.
            back: Arguments by section that take the place of what is given.
        """
        for section, kind in self.classes.items():
            self.parser.set_defaults({section: {"class_path": _path(kind)}})
        known = {s: {"init_args": arguments} if s in BASES else arguments for s, arguments in front.items()}
        parts = self._one_configuration(known)
        for name, content, raw in self._parts:
            section, _, rest = name.replace(".init_args.", ".").partition(".")
            rest = rest.partition(".")[0].removesuffix("+")
            if isinstance(content, dict):
                parts += self._one_configuration(content)
            elif section not in BASES or rest in ("dict_kwargs", *_arguments(self.classes[section])):
                parts += raw
        last = {s: {"init_args": arguments} for s, arguments in back.items()} | {"run": {"imports": self.imports}}
        return parts + self._one_configuration(last)

    def _one_configuration(self, content: dict[str, Any]) -> list[str]:
        """Write a configuration for the classes that were named last."""
        content = dict(content)
        for section in BASES.keys() & content.keys():
            part = content.pop(section)
            kind = self.classes[section]
            if isinstance(part, dict):
                kept = {**part, **(part.get("init_args") or {})}
                kept = {name: value for name, value in kept.items() if name.removesuffix("+") in _arguments(kind)}
                more = {"dict_kwargs": part["dict_kwargs"]} if "dict_kwargs" in part else {}
                content[section] = {"class_path": _path(kind), "init_args": kept, **more}
        return ["--config", yaml.safe_dump(content, default_flow_style=True, width=sys.maxsize)] if content else []


def _plain(value: Any) -> Any:
    """Return a value as a configuration and a checkpoint hold it alike."""
    if isinstance(value, Namespace | dict):
        return {str(key): _plain(part) for key, part in dict(value).items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _as_text(value: Any) -> Any:
    """Return a configuration with members of enumerations, which some classes have as defaults, as their text."""
    if isinstance(value, Namespace):
        for key, part in vars(value).items():
            setattr(value, key, _as_text(part))
    elif isinstance(value, list):
        return [_as_text(part) for part in value]
    return str(value.value) if isinstance(value, Enum) and isinstance(value, str) else value


def _no(value: Any) -> bool:
    return value in (None, False, "null", "false", "False")


def _linked(name: str, parameter: Parameter) -> Callable[[Any], Any]:
    """Return a function that reads what the model takes from the data, or the model's default."""

    def read(datamodule: Any) -> Any:
        try:
            value = getattr(datamodule, LINKED[name], None)
        except ConfigurationError:
            raise
        except Exception:  # of data that knows it only once it is set up
            value = None
        if value is None and parameter.default is Parameter.empty:
            raise ConfigurationError(f"model.{name} must be given: {type(datamodule).__name__} does not say it")
        return parameter.default if value is None else value

    return read


class _Record(SaveConfigCallback):
    """Save the configuration with the run, send it to the loggers, and say in checkpoints of what classes they are."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the configuration; a folder where that is not possible would not take checkpoints either."""
        try:
            super().setup(trainer, pl_module, stage)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to the run's folder {error.filename!r}: {error.strerror}"
            ) from error

    begun = False
    """Whether a training step is done."""

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Note that the first step is done."""
        self.begun = True

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Send the configuration to every logger."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, Logger):
                logger.log_hyperparams({"config": text})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the paths of the classes, and options that a training that goes on must have too."""
        known = {section: self.config[section].class_path for section in BASES}
        more = {
            section: {name: self.config[section].get(name) for name in names}
            for section, names in OF_A_TRAINING.items()
        }
        checkpoint["cli"] = known | _plain(more)


class MSNNCLI(LightningCLI):
    """LightningCLI for any module and data; a spiking classifier of digits by default.

    Beyond LightningCLI: configurations that come with the package are found by name; the model takes the data's number
    of classes, channels and image size; runs go to ``<run.folder>/<run.name>/version_<n>`` for all local loggers alike,
    and nothing that exists is overwritten; ``--ckpt_path last`` resumes the newest run that has a last checkpoint, bit
    for bit where it stopped; a checkpoint or a zoo entry says what model, data and preprocessing it needs, and what is
    given otherwise is refused; what is wrong with model, data or checkpoint is said before anything is written;
    checkpoints are written whole or not at all; a loss that is not finite stops the training, and a logger that fails
    does not; ``fit`` ends with ``test`` of the best checkpoint; ``predict`` writes a CSV file.
    """

    _claimed: Claim | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self._claimed is not None:
                release_version(self._claimed)  # of a run that ended before it wrote anything

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command line."""
        parser.set_defaults({section: {"class_path": _path(kind)} for section, kind in DEFAULTS.items()})
        for name, kind, default, text in (
            (IMPORTS, str | list[str], [], HELP),
            ("run.folder", str, "runs", "Folder of all runs."),
            ("run.name", str | None, None, "Folder of this experiment in it, by default network and data."),
            ("run.test", bool, True, "Whether fit ends by testing the best checkpoint."),
            ("run.best", str | None, BEST, "Metric that chooses checkpoints/best.ckpt; null keeps none."),
            ("run.best_mode", str, "max", "Whether the highest (max) or the lowest (min) value is best."),
            ("run.every_n_steps", int, 0, "Steps from one checkpoints/last.ckpt to the next; 0: after each epoch."),
            ("run.ema", float, 0.0, "Decay of the moving average of weights that is validated and kept; 0: none."),
            ("run.monitors", bool, True, "Whether energy and spike rates of tasks of this package are monitored."),
            ("predictions", str, "predictions.csv", "CSV file that predict writes."),
            ("integer", bool, False, "Whether validate, test and predict run in integers of 8 bits, on a CPU."),
        ):  # fmt: skip
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    # Before anything is parsed: what is given, and what a checkpoint or an entry says

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read what is given, and complete it from a checkpoint, an entry of the zoo, or the data."""
        args = list(sys.argv[1:] if args is None else args)
        verbs = self._subcommand_parsers
        if not args or (not args[0].startswith("-") and args[0] not in verbs):
            given = f", not {args[0]!r}{suggestion(args[0], (*verbs, *MORE))}" if args else ""
            raise ConfigurationError(f"the first argument must be one of {', '.join((*verbs, *MORE))}{given}")
        self._facts: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
        self._preprocessing: dict[str, Any] = {}
        self._source = ""
        self._checkpoint: str | None = None
        if args[0] not in verbs:
            self.config = parser.parse_args(args)
            raise ConfigurationError(f"the first argument must be one of {', '.join(verbs)}, not {args[0]!r}")
        verb = args[0]
        self._given = _Given(verbs[verb], args[1:])
        if self._given.help:
            parser.parse_args([verb, *self._given.help])  # which prints it, and exits
        back: dict[str, Any] = {}
        if (content := self._find_checkpoint(verb)) is not None:
            back = {"model": AT_THE_START}
            self._know_checkpoint(verb, content)
        elif verb != "fit":
            self._know_entry()
            self._name = self._name_of_run()  # after the data of the entry
        self._given.settle()
        self._link(verbs[verb])
        try:
            self.config = parser.parse_args([verb, *self._given.arguments(self._facts, back)])
        except ConfigurationError:
            raise
        except Exception as error:  # whatever nested values make the parser raise
            raise ConfigurationError(f"the options cannot be read: {_sentence(error)}") from error
        self._compare(verb)
        if verb == "fit" and self.config[verb].integer:
            raise ConfigurationError("integer is for validate, test and predict: a training has no integer weights")
        if verb == "fit" and self.config[verb].get("lr_scheduler") and not self.config[verb].get("optimizer"):
            raise ConfigurationError(
                "lr_scheduler needs an optimizer beside it (--optimizer), whose rate it sets: the model's own has "
                "model.schedule"
            )
        seed = self.config[verb].seed_everything
        if not isinstance(seed, bool) and (seed is None or not 0 <= seed < 2**32):
            raise ConfigurationError(f"seed_everything must be true, false or an integer in [0, 2^32), not {seed}")
        for name, kind in get_type_hints(Trainer.__init__).items():  # null gets past the parser
            if self.config[verb].trainer.get(name, 0) is None and type(None) not in get_args(kind):
                raise ConfigurationError(f"trainer.{name} must be {getattr(kind, '__name__', kind)}, not null")
        if (batches := self.config[verb].trainer.accumulate_grad_batches) < 1:
            raise ConfigurationError(f"trainer.accumulate_grad_batches must be at least 1, not {batches}")

    def _find_checkpoint(self, verb: str) -> dict[str, Any] | None:
        """Read the checkpoint that is given, before anything starts."""
        given = self._given.values
        path = given.get("ckpt_path")
        self._name = self._name_of_run()
        base = Path(str(given.get("run.folder", "runs"))) / self._name
        if path in ("best", "hpc") or (path == "last" and verb != "fit"):
            raise ConfigurationError(f"--ckpt_path {path} is not known to {verb}: give the path of a .ckpt file")
        if path == "last":
            if (version := newest_version(base, resumable=True)) is None:
                rank_zero_info(f"No last checkpoint in {base}: a new training begins")
                return None
            path = base / f"version_{version}" / "checkpoints" / "last.ckpt"
        elif _no(path):
            if (
                verb != "fit"
                and issubclass(self._given.classes["model"], tasks.Task)
                and _no(given.get("model.pretrained"))
            ):
                raise ConfigurationError(
                    f"{verb} needs trained weights: give --ckpt_path FILE, or --model.pretrained true"
                )
            return None
        self._source = self._checkpoint = str(path)
        return read_checkpoint(str(path))

    def _name_of_run(self) -> str:
        """The run's name: by default network and data."""
        name, kind = self._given.values.get("run.name"), self._given.classes["model"]
        if not _no(name):
            return str(name)
        network = self._given.values.get("model.network") or getattr(_arguments(kind).get("network"), "default", None)
        name = f"{network or kind.__name__}_{self._given.classes['data'].__name__}".lower()
        return name.replace(".", "_").replace("/", "_")

    def _know_checkpoint(self, verb: str, content: dict[str, Any]) -> None:
        """Take model, data and preprocessing of a checkpoint where none are given."""
        known = content.get("cli") or {}
        self._preprocessing = seen = dict(content.get("preprocessing") or {})
        if isinstance(content.get("class_names"), list):
            seen["class_names"] = content["class_names"]
        if seen.get("data") in data.__all__:
            known = {"data": f"{data.__name__}.{seen['data']}", **known}
        for section, hparams in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
            kind = self._take_class(section, known.get(section), resumed=verb == "fit")
            values = content.get(hparams)
            if isinstance(values, dict) and kind is self._given.classes[section]:
                if section == "data" and verb != "fit":
                    values = arguments_of_checkpoint(values, self._named(kind))
                allowed = _arguments(kind).keys() - OF_THE_MACHINE
                self._facts[section] = {name: _plain(v) for name, v in values.items() if name in allowed}
        for section, names in OF_A_TRAINING.items() if verb == "fit" else ():
            values = known.get(section)
            if isinstance(values, dict):
                self._facts[section] = {name: values[name] for name in names if name in values}
        self._know_size()

    def _take_class(self, section: str, path: Any, resumed: bool) -> type | None:
        """Return the class that a checkpoint names; if none is given, one of ours becomes that of this run."""
        if not isinstance(path, str):
            return None if section == "data" else self._given.classes[section]
        given = self._given.classes[section]
        if section not in self._given.values and path.startswith(f"{OURS[section].__name__}."):
            given = self._given.classes[section] = _class(path, section)
        same = path in (_path(given), f"{OURS[section].__name__}.{given.__name__}")
        # A file names no class that is imported for it, and weights are tested on other data if that is asked for.
        if not same and (section == "model" or resumed or section not in self._given.values):
            raise UnknownNameError(
                f"{section} is {_path(given)}, but {self._source} has {path}: give --{section} {path}",
                "" if path.partition(".")[0] in sys.modules else section,
                path,
            )
        return given if same else None

    def _know_entry(self) -> None:
        """Take model, data and preprocessing of a pretrained entry of the zoo."""
        name = str(self._given.values.get("model.network"))
        if _no(self._given.values.get("model.pretrained")) or name not in entries():
            return
        config = read_config(find(name))
        self._source = name
        self._facts["model"] = {"num_classes": config["num_classes"], "in_chans": config["input_size"][0]}
        self._preprocessing = {field: config[field] for field in ("mean", "std", "class_names")}
        self._preprocessing["image_size"] = config["input_size"][1]
        of_data = config.get("data", {})
        kind = self._take_class("data", of_data.get("class_path"), resumed=False)
        if kind is not None:
            allowed = _arguments(kind).keys() - OF_THE_MACHINE
            settings = arguments_of_checkpoint(of_data.get("init_args"), self._named(kind))
            self._facts["data"] = {key: _plain(v) for key, v in settings.items() if key in allowed}
        self._know_size()

    def _named(self, kind: type) -> set[str] | None:
        """Names of the arguments of data that the user gives; None for a class that is not of this package."""
        return self._given.names("data") if getattr(data, kind.__name__, None) is kind else None

    def _know_size(self) -> None:
        if "image_size" in self._preprocessing and "image_size" in _arguments(self._given.classes["data"]):
            self._facts["data"]["image_size"] = self._preprocessing["image_size"]

    def _link(self, parser: LightningArgumentParser) -> None:
        """Let the model's arguments be the data's, where neither the user nor a checkpoint says them."""
        model = self._given.classes["model"]
        made = [vars(kind)["__init__"] for kind in reversed(model.__mro__) if "__init__" in vars(kind)]
        parameters = {name: parameter for init in made for name, parameter in signature(init).parameters.items()}
        for name in LINKED.keys() & _arguments(model).keys() - self._facts["model"].keys():
            if f"model.{name}" not in self._given.values:
                read = _linked(name, parameters[name])
                parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def _compare(self, verb: str) -> None:
        """Refuse what is given otherwise than a checkpoint or an entry has it."""
        for section, facts in self._facts.items():
            config = self.config[verb][section]
            ours = _plain(config.get("init_args", {}) if section in BASES else config)  # none of a class without any
            given = {key.partition(".")[2] for key in self._given.values if key.startswith(f"{section}.")}
            if section == "data" and verb != "fit":
                continue
            for name in sorted(given & facts.keys() - AT_THE_START.keys()):
                if ours[name] != facts[name] and not (ours[name] is None and name in OF_THE_DATA):
                    raise ConfigurationError(
                        f"{section}.{name} is {ours[name]!r}, but {self._source} has {facts[name]!r}: leave it out, or "
                        "train anew under another run.name"
                    )

    def _parse_ckpt_path(self) -> None:
        """Done before parsing."""

    # Before anything is built: folders

    def before_instantiate_classes(self) -> None:
        """Give the local loggers one folder for this run."""
        verb = str(self.subcommand)
        config, given = self.config[verb], self._given.values
        config.run.name = self._name
        trainer = config.trainer
        if verb == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = EPOCHS
        resumed = given.get("ckpt_path") == "last"
        self._saved = _as_text(config.clone())  # what reproduces this run, in another folder
        if resumed:
            self._saved.ckpt_path, config.ckpt_path = None, self._checkpoint
        for option, place in (
            ("run.folder", config.run.folder),
            ("trainer.default_root_dir", trainer.default_root_dir),
        ):
            if "://" in str(place):
                raise ConfigurationError(f"{option} must be a folder of this machine, not {str(place)!r}")
        base = Path(config.run.folder) / config.run.name
        if verb == "predict":
            trainer.logger = False  # predictions are the output; no run begins
        loggers: list[Any] = []
        if trainer.logger not in (False, []):
            loggers = trainer.logger = _with_local_first(trainer.logger)
        version: int | str | None = None
        if resumed and self._checkpoint is not None:
            folder = Path(self._checkpoint).parents[1]
            version = int(folder.name.removeprefix("version_"))
            _put_aside(folder, "metrics.csv")
            _put_aside(folder, "config.yaml")
        elif (
            verb in ("validate", "test")
            and self._checkpoint is not None
            and not {"run.folder", "run.name"} & given.keys()
        ):
            file = Path(self._checkpoint).absolute()
            base = file.parents[1] if file.parent.name == "checkpoints" else file.parent
            version = next(v for i in count() if not (base / (v := f"{verb}_{i}")).exists())
        _check_folder(base)
        if version is None and verb != "predict":
            try:
                self._claimed = claim_version(base)
            except OSError as error:
                raise ConfigurationError(f"cannot write to {str(base)!r}: {error.strerror}") from error
            version = self._claimed.version
        run = base if version is None else base / (version if isinstance(version, str) else f"version_{version}")
        for logger in loggers:
            arguments = logger.init_args
            if _is_local(logger):
                name, number = arguments.get("name"), arguments.get("version")
                label = number if isinstance(number, str) else f"version_{number}"
                usual = {  # runs: in configurations that earlier versions have saved
                    "save_dir": {Path(), Path("runs"), base.parent, Path(config.run.folder)},
                    "name": {Path("lightning_logs"), Path(base.name), Path(config.run.name)},
                }
                for option, places in usual.items():
                    place = arguments.get(option)
                    if number is None and place is not None and Path(place) not in places:
                        rank_zero_warn(
                            f"{option} {place!r} of {logger.class_path.rpartition('.')[2]} has no effect: run.folder "
                            "and run.name say where the files of a run are"
                        )
                if number is None or (Path(arguments.save_dir) / str(name) / label).exists():
                    arguments.save_dir, arguments.name = str(base.parent), base.name
                    arguments.version = version
            elif arguments.get("save_dir") == ".":  # Weights & Biases
                arguments.save_dir = str(run)
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(run)

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        """Return the callbacks that options ask for; one of the user's takes the place of one of its kind."""
        verb, run = self.subcommand, self._get(self.config_init, "run")
        given: list[Callback] = config["callbacks"]
        checkpoints = config.get("enable_checkpointing") is not False
        first: list[Callback] = [EMA(run.ema)] if run.ema and verb == "fit" else []
        first += [IntegerInference()] if self._get(self.config_init, "integer") else []
        then: list[Callback] = [TrainingCurves()] if verb == "fit" else []
        if run.monitors and verb in ("fit", "test") and isinstance(self.model, tasks.Task):
            spikes = any(isinstance(module, Spike) for module in self.model.modules())
            then += [*([SpikeRateMonitor()] if spikes else []), EnergyMonitor()]
        if config.get("enable_model_summary") is not False and verb == "fit":
            config["enable_model_summary"] = False  # Lightning's own
            if not any(isinstance(callback, ModelSummary) for callback in given):
                first.append(ParameterSummary())
        chosen = any(isinstance(callback, ModelCheckpoint) for callback in given)
        if run.best is not None and checkpoints and verb == "fit" and not chosen:
            required = isinstance(self.model, tasks.Task) or run.best != BEST  # others log what they please
            then.append(BestCheckpoint(run.best, run.best_mode, required=required))
        kinds = tuple(type(callback) for callback in given)
        first, then = ([callback for callback in ours if not isinstance(callback, kinds)] for ours in (first, then))
        last: list[Callback] = [LastCheckpoint(run.every_n_steps)] if checkpoints else []
        return [*first, *given, *then, LoggerGuard(), RandomState(), FiniteLoss(), *last]

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what ours are given and cannot be made of is said in one sentence."""
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever arguments make torch, timm or Lightning raise
            if _configuration_error(error) is not None or not self._ours():
                raise
            raise ConfigurationError(f"model, data or trainer cannot be made as given: {_sentence(error)}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what a checkpoint holds and cannot be restored is said in one sentence."""
        try:
            super()._run_subcommand(subcommand)
        except TrainingError:
            raise
        except Exception as error:  # whatever the values in a file make Lightning and torch raise
            if _configuration_error(error) is not None:
                raise
            restoring, begins = self._checkpoint is not None and _restores(error), self._begins()
            if begins and not restoring and _raised_by_lightning(error):
                raise ConfigurationError(f"the training cannot begin: {_sentence(error)}") from error
            if restoring or (begins and self._checkpoint is not None):
                raise ConfigurationError(f"{self._checkpoint!r} cannot be restored: {_sentence(error)}") from error
            raise

    def _ours(self) -> bool:
        """Whether model and data are of this package; errors of other classes keep their traceback."""
        return all(kind.__module__.startswith("lightning_msnn.") for kind in self._given.classes.values())

    def _begins(self) -> bool:
        """Whether a training of our classes has not done a step yet, in which it takes up what it resumes."""
        records = [callback for callback in self.trainer.callbacks if isinstance(callback, _Record)]  # type: ignore[attr-defined]
        return self.subcommand == "fit" and self._ours() and not any(record.begun for record in records)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run has, and say in one sentence what a Trainer refuses."""
        given = config.get("callbacks") or []
        config["callbacks"] = list(given) if isinstance(given, list) else [given]
        config["callbacks"] = self._callbacks(config)
        if self.subcommand != "predict" and not config.get("fast_dev_run"):
            callbacks = [*callbacks, _Record(self._parser(self.subcommand), self._saved)]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error
        on_cpus = isinstance(trainer.accelerator, CPUAccelerator) and isinstance(trainer.strategy, DDPStrategy)
        if config.get("sync_batchnorm") and on_cpus:
            raise ConfigurationError(
                "trainer.sync_batchnorm must be false on CPUs, not true: torch has it on GPUs alone"
            )
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints as plain values only."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "weights_only": True}

    # Before anything is written: does the model fit the data?

    def _check(self) -> None:
        if self.datamodule is not None and hasattr(self.datamodule, "check"):
            self.datamodule.check(self.subcommand)
        if isinstance(self.model, tasks.Task) and self.datamodule is not None and self.subcommand != "predict":
            self.model.check_data(self.datamodule)
        if self.subcommand != "fit":
            for name in ("mean", "std"):  # images are what the weights have learnt from
                learns = isinstance(self.datamodule, data.ArrayDataModule)  # has none before it has read its data
                if name in self._preprocessing and (learns or hasattr(self.datamodule, name)):
                    values = tuple(self._preprocessing[name])
                    channels = getattr(self.datamodule, "in_chans", None)
                    ours = isinstance(self.datamodule, data.ImageDataModule | data.ArrayDataModule)
                    if ours and len(values) != channels:
                        raise ConfigurationError(
                            f"{self._source} has {name} {list(values)}, a number for each channel, but the data has "
                            f"{channels}"
                        )
                    setattr(self.datamodule, name, values)
            if isinstance(self.model, tasks.Task) and "class_names" in self._preprocessing:
                known = [str(name) for name in self._preprocessing["class_names"]]
                if self.subcommand != "predict":
                    theirs = [str(name) for name in getattr(self.datamodule, "class_names", known)]
                    if theirs != known and sorted(theirs) == sorted(known):
                        raise ConfigurationError(
                            f"the data has its classes in another order than {self._source}: {_short(theirs)}, not "
                            f"{_short(known)}"
                        )
                self.model.class_names = known

    before_validate = before_test = _check

    def before_fit(self) -> None:
        """Check the data, also what the training ends by testing on, and the teacher."""
        self._check()
        if self._get(self.config_init, "run").test and hasattr(self.datamodule, "check"):
            try:
                self.datamodule.check("test")
            except ConfigurationError as error:
                raise ConfigurationError(f"{error}; --run.test false leaves out the test at the end") from error
        if isinstance(self.model, tasks.Task):
            self.model.load_teacher()

    def after_test(self) -> None:
        """Print what the network costs beside its twins."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EnergyMonitor) and self.trainer.is_global_zero:
                sys.stdout.write(f"\n{callback.table()}")

    def before_predict(self) -> None:
        """Check the folder and have a CSV file written."""
        self._check()
        if isinstance(self.model, tasks.SpikingClassifier | tasks.SpikingForecaster):
            writer = PredictionWriter(self._get(self.config_init, "predictions"))
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        else:
            rank_zero_info("%s writes no predictions: give it a callback that does", type(self.model).__name__)

    def after_fit(self) -> None:
        """Test the best checkpoint of the training, which validation chose."""
        if not self._get(self.config_init, "run").test or self.trainer.interrupted:
            return
        if not isinstance(self.model, tasks.Task) and type(self.model).test_step is LightningModule.test_step:
            return
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if checkpoint is not None else ""
        rank_zero_info(f"Testing {path or 'the last weights'}")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, weights_only=True)
        self.after_test()


def _check_folder(folder: Path) -> None:
    """Raise a ConfigurationError if a folder cannot be made or written to; make nothing."""
    if "\0" in str(folder):
        raise ConfigurationError(f"cannot write to {str(folder)!r}: a path has no character 0")
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(place)!r} is a file")
    if not os.access(place, os.W_OK):
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(place)!r} is read-only")


@rank_zero_only
def _put_aside(folder: Path, name: str) -> None:
    """Give a file of the run that is resumed a number: what comes would overwrite it."""
    file = folder / name
    if file.is_file():
        file.rename(next(f for i in count() if not (f := folder / f"{file.stem}.{i}{file.suffix}").exists()))


def _restores(error: BaseException) -> bool:
    """Whether an error was raised while Lightning restored what a checkpoint holds."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        restoring = frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        if restoring and frame.f_globals.get("__name__") == checkpoint_connector.__name__:
            return True
        trace = trace.tb_next
    return False


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised an error, as where options do not fit the data, and no user's code called it."""
    rooms, trace = [], error.__traceback__
    while trace is not None:
        rooms.append(str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0])
        trace = trace.tb_next
    return rooms[-1:] == ["lightning"] and set(rooms) <= {"lightning", "lightning_msnn", "torch"}


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Find a configuration error under what a parser or a Trainer has wrapped it in."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if None.
    """
    args = sys.argv[1:] if args is None else args
    if args and args[0] in OTHERS:
        return OTHERS[args[0]](args[1:])
    loggers = [f"lightning.pytorch.loggers.{name}" for name in _LOCAL_LOGGERS]
    try:
        if args and args[0] == "dial":
            args = fit_arguments(args[1:])
        MSNNCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # ours is added with the other callbacks
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={
                "version": __version__,
                "epilog": f"More, each with --help: {', '.join(f'lightning-msnn {verb}' for verb in MORE)}",
            },
            trainer_defaults={"logger": [{"class_path": p, "init_args": {"save_dir": "."}} for p in loggers]},
            load_from_checkpoint_support=False,  # hyper-parameters are plain values already
            args=args,
        )
    except SIGTERMException as stop:
        sys.exit(128 + signal.SIGTERM if stop.code is None else stop.code)  # Lightning's own are without a code
    except Exception as error:
        cause: Exception | None = error if isinstance(error, TrainingError) else _configuration_error(error)
        if cause is None:
            raise
        sys.stderr.write(f"lightning-msnn: error: {explained(cause, f'--{IMPORTS}')}\n")
        sys.exit(1 if isinstance(cause, TrainingError) else 2)
