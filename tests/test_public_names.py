"""What is public: ``__all__`` of every module, and the list of the names that users may rely on.

``python tests/test_public_names.py`` writes the list, ``tests/public_names.txt``, anew.
"""

import argparse
import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from lightning_msnn import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_msnn"
NAMES = ROOT / "tests" / "public_names.txt"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [
    "lightning_msnn",
    *sorted(f"lightning_msnn.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")),
    *sorted(f"lightning_msnn.{path.stem}" for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")),
]
"""What users import from: the package, its packages, and the modules beside them."""


def listed(module: Path) -> list[str] | None:
    """Names in ``__all__`` of a file, None if it has none."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return None


def public() -> list[str]:
    """Full names of all that is public, in order."""
    files = {room: PACKAGE.parent / room.replace(".", "/") for room in ROOMS}
    paths = {room: path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for room, path in files.items()}
    return sorted(f"{room}.{name}" for room, path in paths.items() for name in listed(path) or [])


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_is_public(module: Path) -> None:
    names = listed(module)
    assert names is not None, "it has no __all__"
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


def test_public_names_are_those_of_the_list() -> None:
    known, found = NAMES.read_text(encoding="utf-8").split(), public()
    gone, new = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    assert not gone, f"gone: {gone}. See CONTRIBUTING.md on how a name goes"
    assert not new, f"new: {new}. If they are meant to be public, python tests/test_public_names.py lists them"
    assert known == found, "out of order: python tests/test_public_names.py"


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_there_and_documented(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{room}.{name} has no docstring"


def test_the_version_is_the_same_everywhere() -> None:
    """README's is compared where its claims are."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    NAMES.write_text("\n".join(public()) + "\n", encoding="utf-8")
