"""Errors that a user can mend: a wrong configuration, file or argument, or a training that broke."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypeVar

import torch

__all__ = [
    "ConfigurationError",
    "TrainingError",
    "UnknownNameError",
    "brief",
    "check_device",
    "check_integer",
    "check_number",
    "choose",
    "in_chain",
    "suggestion",
]

T = TypeVar("T")


class ConfigurationError(ValueError):
    """A value that the user gave cannot be used.

    The message is one sentence that names the value and says what is allowed; the command line prints it without a
    traceback and exits with status 2.
    """


class UnknownNameError(ConfigurationError):
    """A name is not known.

    Args:
        message: What is wrong.
        what: Kind of thing that was named, in the singular ("projection").
        name: The name.
    """

    def __init__(self, message: str, what: str = "", name: str = "") -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class TrainingError(RuntimeError):
    """A training cannot go on.

    The message is one sentence that says where it stopped and what was saved; the command line prints it without a
    traceback and exits with status 1.
    """


def brief(error: BaseException) -> str:
    """Return what an error of another library says, on one line of at most 300 characters."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:300]


def in_chain(error: BaseException | None, kind: type[BaseException] | tuple[type[BaseException], ...]) -> Any:
    """Return the first error of these kinds among an error and its causes, or None."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def suggestion(name: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the entry of ``allowed`` nearest to ``name``, or an empty string.

    Entries are less similar the lower the cutoff is, from 1 (the same) to 0 (nothing in common).
    """
    names = {known.lower(): known for known in allowed}
    near = get_close_matches(name.lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def parameters_of(kind: type) -> dict[str, Any]:
    """Return the arguments that a class takes, with ``**kwargs`` those of its bases too, and their defaults."""
    found: dict[str, Any] = {}
    for init in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        given = list(signature(init).parameters.values())[1:]
        found = {p.name: p.default for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        if all(p.kind != p.VAR_KEYWORD for p in given):
            break
    return found


def check_number(name: str, value: object, *, below_one: bool = False) -> float:
    """Return ``value`` if it is a number in [0, 1], or in [0, 1) if ``below_one``, else raise a ConfigurationError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1):  # type: ignore[operator]
        allowed = "a number in [0, 1)" if below_one else "a number in [0, 1]"
        raise ConfigurationError(f"{name} must be {allowed}, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Return the definition of a name in a table.

    Raises:
        UnknownNameError: If the table has no such name; the message says ``what`` it holds, in the singular ("surrogate
            gradient", "projection"), and lists the names that it has.
    """
    if not isinstance(name, str) or name not in table:
        hint = suggestion(str(name), table)
        message = f"unknown {what} {name!r}: allowed are {', '.join(sorted(table))}{hint}"
        raise UnknownNameError(message, what, str(name))
    return table[name]


def check_integer(name: str, value: object, low: int) -> int:
    """Return ``value`` if it is an integer of at least ``low``, else raise a ConfigurationError that names both."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigurationError(f"{name} must be an integer of at least {low}, not {value!r}")
    return value


def check_device(name: str) -> torch.device:
    """Return the device of a name, such as ``cuda:1``, or raise a ConfigurationError if it is not there."""
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(f"device {name!r} cannot be used here: {brief(error)}") from error
