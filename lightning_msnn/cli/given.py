"""What the user gives on the command line and in configurations, read and checked before it is parsed."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_msnn import data, tasks
from lightning_msnn.cli.config_files import read_configuration
from lightning_msnn.errors import ConfigurationError, UnknownNameError, suggestion
from lightning_msnn.imports import import_files

__all__ = ["BASES", "DEFAULTS", "IMPORTS", "OURS", "Given", "Parser", "arguments_of", "class_at", "path_of"]

BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
DEFAULTS: dict[str, type] = {"model": tasks.SpikingClassifier, "data": data.Digits}
OURS = {"model": tasks, "data": data}

BY_EPOCH = ("data.train_sizes",)
"""Options whose values may be numbers by the epoch."""

IMPORTS = "run.imports"
"""Option that names files of the user's own."""


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


def arguments_of(kind: type) -> dict[str, argparse.Action]:
    """Arguments of a class, by name."""
    return _actions(_class_parser(kind))


def class_at(path: Any, section: str) -> type:
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


def path_of(kind: type) -> str:
    """Path from which a class is imported."""
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
    if key in BY_EPOCH:
        _check_epochs(key, value)
    composed = isinstance(value, str) and (value.lstrip().startswith(("[", "{")) or _names_one(value, _classes(kind)))
    if composed or not isinstance(value, str | int | float):
        return  # what is composed, or the name of a class, the parser checks part by part
    try:
        parser.validate(Namespace({name: value}), skip_required=True)
    except (TypeError, ValueError, ArithmeticError, argparse.ArgumentError) as error:
        *others, last = dict.fromkeys(_allowed(kind))
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ConfigurationError(f"{key} must be {allowed}, not {value!r}") from error


def _check_epochs(key: str, value: Any) -> None:
    """Raise a ConfigurationError for values by the epoch of which a key is no integer, which the parser cuts to one."""
    with contextlib.suppress(yaml.YAMLError, ValueError):
        value = get_loader("yaml")(value) if isinstance(value, str) else value
    for epoch, one in value.items() if isinstance(value, dict) else ():
        if not re.fullmatch(r"\d+", str(epoch)):
            raise ConfigurationError(f"an epoch of {key} must be an integer of at least 0, not {epoch!r}")
        if not re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", str(one), re.IGNORECASE):
            raise ConfigurationError(
                f"{key} of epoch {epoch} must be a number, not {'null' if one is None else repr(one)}"
            )


def _allowed(kind: Any) -> list[str]:
    """Names of types and values that an annotation allows."""
    if kind is NoneType:
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [name for part in get_args(kind) for name in _allowed(part)]
    return [kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")]


_ALSO = re.compile(r"\s*($|Expected a path|Does not validate|a class path |a dict |Not a valid sub)|.*NoneType'>")
"""What the parser says of each type that a value could have been, beside what is wrong with it."""


class Parser(LightningArgumentParser):
    """A parser whose errors are configuration errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the arguments, of several types that are allowed by what each of them says."""
        text = " ".join(str(message).split())
        if found := re.match(r'Parser key "([^"]*)":(?= .*Does not validate against any of the Union)', text):
            parts = re.split(r"^\s*- ", str(message).partition(":")[2], flags=re.MULTILINE)
            said = [" ".join(part.partition("\n  Given value")[0].split()) for part in parts if not _ALSO.match(part)]
            text = f"{found[1]}: {'; '.join(dict.fromkeys(said))}" if said else text
        raise ConfigurationError(text) from ex


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
    parser = Parser(exit_on_error=False)
    parser.add_argument(f"--{IMPORTS}", type=str | list[str], default=[])
    given = [
        f"--{key}={value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)}"
        for key, value in pairs
        if key.removesuffix("+") == IMPORTS and value is not None
    ]
    found = parser.parse_args(given)[IMPORTS]
    return [found] if isinstance(found, str) else found


class Given:
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
            content = read_configuration(given) if name == "config" and given is not None else given
            self._parts.append((name, content, raw))
        pairs = [pair for name, content, _ in self._parts for pair in _pairs(name, content)]
        self.imports = import_files(_imports(pairs))
        for key, value_ in pairs:
            self._note(key.replace(".init_args.", ".") if key.startswith(("model.", "data.")) else key, value_)
        self.help: list[str] = []
        """The argument that asks for the help of a class, by default of the one that is given."""
        self.only_prints = any(name in ("help", "-h", "print_config") for name, *_ in self._parts)
        """Whether all that is asked for is text: help, or the configuration."""
        for name, value, raw in self._parts:
            section, _, rest = name.partition(".")
            if section in BASES and rest == "help":
                kind = self.classes[section] if value is None else class_at(value, section)
                self.help = [f"--{name}={path_of(kind)}"]
            elif rest == "help" or rest.endswith(".help"):
                self.help = raw

    def _note(self, key: str, value: Any) -> None:
        section, _, rest = key.partition(".")
        if section in BASES and (not rest or rest == "class_path"):
            self.classes[section] = class_at(value, section)
            self.values[section] = value
            return
        name, plus = key.removesuffix("+"), key.endswith("+")
        if section in BASES:
            parser, known = _class_parser(self.classes[section]), arguments_of(self.classes[section])
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
            owner = f" of {path_of(self.classes[section])}" if section in BASES else ""
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
            self.parser.set_defaults({section: {"class_path": path_of(kind)}})
        known = {s: {"init_args": arguments} if s in BASES else arguments for s, arguments in front.items()}
        parts = self._one_configuration(known)
        for name, content, raw in self._parts:
            section, _, rest = name.replace(".init_args.", ".").partition(".")
            rest = rest.partition(".")[0].removesuffix("+")
            if isinstance(content, dict):
                parts += self._one_configuration(content)
            elif section not in BASES or rest in ("dict_kwargs", *arguments_of(self.classes[section])):
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
                kept = {name: value for name, value in kept.items() if name.removesuffix("+") in arguments_of(kind)}
                more = {"dict_kwargs": part["dict_kwargs"]} if "dict_kwargs" in part else {}
                content[section] = {"class_path": path_of(kind), "init_args": kept, **more}
        return ["--config", yaml.safe_dump(content, default_flow_style=True, width=sys.maxsize)] if content else []
