"""Configurations by name, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from lightning_msnn.errors import ConfigurationError, check_yaml, suggestion

__all__ = ["configurations", "find_configuration", "read_configuration", "sentence", "short"]


def configurations() -> dict[str, Path]:
    """Return the configurations that come with the package, by name, such as ``recipe/fast``."""
    package = Path(__file__).resolve().parents[1]
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
    if (key := name.removesuffix(".yaml")) not in known:
        raise ConfigurationError(
            f"no configuration {name!r}: neither a file nor one of {', '.join(known)}{suggestion(key, known)}"
        )
    return known[key]


def read_configuration(name: str) -> dict[str, Any]:
    """Return what a configuration holds; raise a ConfigurationError if it is not options by name."""
    path = find_configuration(name)
    content: dict[str, Any]
    try:
        check_yaml(text := path.read_text(encoding="utf-8"))
        content = get_loader("yaml")(text)
    except Exception as error:  # tags on values that are none of theirs make the loader raise what it pleases
        raise ConfigurationError(f"cannot read the configuration {name!r}: {sentence(error)}") from error
    _check_options(name, "", content)
    for section in ("model", "data", "trainer", "run"):
        part, of_a_class = content.get(section), section in ("model", "data")
        if part is not None and not (of_a_class and isinstance(part, str)):
            _check_options(name, f" of {section}", part)
            for key in ("init_args", "dict_kwargs"):
                if of_a_class and part.get(key) is not None:
                    _check_options(name, f" of {section}.{key}", part[key])
    return content


def _check_options(name: str, where: str, content: Any) -> None:
    """Raise a ConfigurationError if a part of a configuration is not options by name."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(f"the configuration {name!r} must have options by name{where}, not {short(content)}")


def short(value: Any) -> str:
    """Text of a value, cut where it gets long."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def sentence(error: BaseException) -> str:
    """What an error says, in one line; its type too where it says little."""
    while str(error).startswith("Does not validate against any of the Union") and (within := error.__cause__):
        error = within  # what a class raised, without all of its arguments
    said = " ".join(str(error).split())
    return said if isinstance(error, ConfigurationError | OSError) else f"{type(error).__name__} {said}".strip()
