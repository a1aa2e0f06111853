"""The user's own files, imported before a run looks up what they define.

A file adds its definitions to a table (:data:`TABLES`) or to timm's registry. A class of it is ``<file>.<class>``.
"""

import os
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_msnn.energy.profiles import PROFILES
from lightning_msnn.errors import ConfigurationError, UnknownNameError, brief, in_chain
from lightning_msnn.functional import PROJECTIONS, SURROGATES, WINDOWS
from lightning_msnn.models.msnn import WINDOW_SCHEDULES

__all__ = ["TABLES", "explained", "import_files"]

TABLES: dict[str, dict[str, Any]] = {
    "projection": PROJECTIONS,
    "surrogate gradient": SURROGATES,
    "kind of windows": WINDOWS,
    "windows": WINDOW_SCHEDULES,
    "energy profile": PROFILES,
}
"""Tables that a file can add to, by what they hold."""

_OPEN = {*TABLES, "network", "model", "data"}


def import_files(names: str | Iterable[str]) -> list[str]:
    """Import files and modules in their order, each once in a process.

    Args:
        names: One or several: the path of a Python file, which then is a module by the name of the file, or the name of
            a module that Python finds.

    Returns:
        The names, paths in full, so that they mean the same in another folder.

    Raises:
        ConfigurationError: If there is no such file or module, it fails, its name is another module's, or it
            redefines a name of a table.
    """
    return [_import(name) for name in ([names] if isinstance(names, str) else names)]


def _import(name: str) -> str:
    file = Path(name).expanduser().resolve() if name.endswith(".py") or os.sep in name else None
    module = name if file is None else _on_path(file)
    known = {what: dict(table) for what, table in TABLES.items()}
    try:
        import_module(module)
    except (Exception, SystemExit) as error:  # whatever a file raises
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).stem == module]
        where = f", line {lines[-1]}" if lines else ""
        hint = "; the path of a file ends in .py" if file is None else ""
        raise ConfigurationError(
            f"cannot import {name!r}: {type(error).__name__}{where}: {brief(error)}{hint}"
        ) from error
    for what, table in TABLES.items():
        if changed := [key for key, value in known[what].items() if table.get(key) is not value]:
            raise ConfigurationError(
                f"{name!r} changes {what} {changed[0]!r}, which there is already: give yours another name"
            )
    return name if file is None else str(file)


def _on_path(file: Path) -> str:
    """Let Python find a file as a module, in processes started from this one too; return the module's name.

    Its folder comes last, where it hides no other module.
    """
    if not file.is_file():
        raise ConfigurationError(f"cannot import {str(file)!r}: there is no such file")
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ConfigurationError(
            f"cannot import {str(file)!r}: its name must be letters, digits and '_', and end in .py"
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    invalidate_caches()
    spec = find_spec(file.stem)
    found = spec and spec.origin
    if not found or Path(found).resolve() != file:
        raise ConfigurationError(
            f"cannot import {str(file)!r}: there is another module {file.stem!r} ({found}), so rename the file"
        )
    return file.stem


def explained(error: BaseException, option: str) -> str:
    """Return an error's message; if a name is unknown, add how to import a file that defines it."""
    cause = in_chain(error, UnknownNameError)
    if cause is not None and cause.what in _OPEN:
        return f"{error}; a file of yours that defines {cause.what} {cause.name!r} must be imported with {option}"
    return str(error)
