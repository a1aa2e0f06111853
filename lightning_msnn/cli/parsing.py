"""The parser: configurations by name, and errors in one sentence that names what is allowed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from inspect import isabstract
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_msnn.errors import ConfigurationError, brief, in_chain, suggestion
from lightning_msnn.imports import import_files

__all__ = ["IMPORTS", "ConfigurationFile", "Parser", "configurations", "find_configuration", "leading"]

IMPORTS = "run.imports"
"""Option that names the user's own files."""

_MEANT, _ALLOWED = "; did you mean ", ": allowed are "

_MEANT_BY = {
    **{"learning_rate": "lr", "wandb": "WandbLogger", "tensorboard": "TensorBoardLogger", "csv": "CSVLogger"},
    **{"epochs": "trainer.max_epochs", "trainer.epochs": "trainer.max_epochs", "trainer.gpus": "trainer.devices"},
}
"""Names of other libraries."""

_INNER = (_MEANT, _ALLOWED, "must be one of", "Got value: ", "the following arguments are required")
"""Marks of what a parser within the parser has said."""

_JARGON = re.compile(
    r"<class '[\w.]*?(\w+)'>|Parser key \"([\w.]+)\"|\b(collections|lightning|typing)\.[a-z_.]*(?=[A-Z])"
)


def configurations() -> dict[str, Path]:
    """Return the configurations that come with the package, by name, such as ``recipe/paper``."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "_configs", package.parent / "configs") if f.is_dir()), package / "_configs")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Return a configuration's file: one of that name on the disk, else one that comes with the package.

    Args:
        name: Path of a file, or name such as ``quickstart`` or ``data/cifar100``.

    Raises:
        ConfigurationError: If there is none; the message lists the package's.
    """
    if Path(name).is_file():
        return Path(name)
    known = configurations()
    if (key := name.removesuffix(".yaml")) not in known:
        groups = groupby(known, key=lambda known: known[: known.rfind("/") + 1])
        names = ", ".join(f"{f}{{{','.join(k.removeprefix(f) for k in group)}}}" for f, group in groups)
        hint = suggestion(key, known) or f"{_ALLOWED}{names}"
        raise ConfigurationError(f"no configuration {name!r}, neither a file nor one of the package{hint}")
    return known[key]


class ConfigurationFile(ActionConfigFile):  # type: ignore[misc]  # jsonargparse has no types
    """``--config``: a file, the name of a configuration of the package, or YAML itself, which begins with ``{``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Import the files that the configuration names, then apply it."""
        inline = values.lstrip().startswith("{")
        values = values if inline else str(find_configuration(values))
        try:
            content = yaml.safe_load(values if inline else Path(values).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it must have options by name")
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise ConfigurationError(f"cannot read the configuration {values!r}: {brief(error)}") from error
        run = content.get("run")
        import_files((run.get("imports") if isinstance(run, dict) else None) or [])
        super().__call__(parser, namespace, values, option_string)


def leading(args: list[str]) -> argparse.Namespace:
    """Read the options that decide what is parsed, those of the checkpoint or entry, and import the files named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("ckpt_path", "model.network", "model.pretrained"):
        parser.add_argument(f"--{name}")
    parser.add_argument(f"--{IMPORTS}", f"--{IMPORTS}+", dest=IMPORTS, action="append", default=[])
    given, _ = parser.parse_known_args(args)
    for value in vars(given)[IMPORTS]:
        import_files(yaml.safe_load(value) if value.startswith("[") else value)
    return given


class Parser(LightningArgumentParser):
    """A parser whose errors are configuration errors, with the allowed name nearest to one that is not known."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the arguments."""
        if (found := in_chain(ex, ConfigurationError)) is not None:  # of the parser of a class
            raise found
        message = _JARGON.sub(r"\1\2", message).replace("NoneType", "null")
        lines = [" ".join(line.split()).removeprefix("- ") for line in message.splitlines()]
        if inner := [line for line in lines if any(mark in line for mark in _INNER)]:
            raise ConfigurationError(inner[0] if inner[0] == lines[0] else f"{lines[0]} {inner[0]}") from ex
        # jsonargparse repeats all that it was given, and says of each type of several what does not fit.
        said, _, given = " ".join(filter(None, lines)).partition(" Errors: ")
        said = re.sub(r"Expected a path but .*? invalid ", "", said)
        said = said.replace("Does not validate against any of the Union subtypes Subtypes:", "must be one of")
        value = given.rpartition("Given value: ")[2]
        said = f"{said[:300]}{f', not {value[:60]}' if value else ''}"
        hint = f"; a file of yours that defines it must be imported with --{IMPORTS}"
        if in_chain(ex, (ImportError, AttributeError)) is None:  # no such module, or no such class in it
            hint = self._hint(message)
        raise ConfigurationError(f"{said}{hint}") from ex

    def format_help(self) -> str:
        """Return the help without the 1,400 modules that could be a network."""
        return re.sub(r",\s+known\s+subclasses:\s+torch\.nn\.Module,[^)]*", "", super().format_help())

    def _hint(self, message: str) -> str:
        """The allowed name nearest to a word of a message; the arguments of a class if there is none."""
        names = list(_names(self))
        bases = (Callback, Logger, LightningModule, LightningDataModule, Optimizer, LRScheduler)
        allowed = {*names, *(kind.__name__ for base in bases for kind in _derived(base))}
        for word in message.replace("=", " ").split():
            word = word.strip("\"'.,:;()[]{}<>-")
            if _MEANT_BY.get(word) in allowed:
                return f"{_MEANT}{_MEANT_BY[word]!r}?"
            if len(word) > 2 and word not in allowed and (hint := suggestion(word, allowed, 0.8)):
                return hint
        if "is not accepted" in message and len(names) < 20:
            return f"{_ALLOWED}{', '.join(names)}"
        return "; see --help" if message.startswith("unrecognized") else ""


def _names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of the options of a parser and of its verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield name
                yield from _names(verb)
        elif action.dest != argparse.SUPPRESS:
            yield action.dest


def _derived(base: type) -> Iterable[type]:
    """A class and all that are derived from it and imported, without abstract ones."""
    kind: type
    for kind in type.__subclasses__(base):
        yield from _derived(kind)
    if not isabstract(base):
        yield base
