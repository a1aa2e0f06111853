"""Imports go one way: a room of the package knows only those below it."""

import ast
from pathlib import Path

import lightning_msnn

PACKAGE = Path(lightning_msnn.__file__).parent

MAY_IMPORT = {
    "errors": set(),
    "entries": set(),
    "functional": set(),
    "kernels": {"functional"},
    "nn": {"functional", "kernels"},
    "models": {"functional", "kernels", "nn"},
    "conversion": {"functional", "nn", "models"},
    "energy": {"functional", "nn"},
    "metrics": {"energy"},
    "data": set(),
    "runs": {"models"},
    "tasks": {"conversion", "energy", "functional", "nn", "models", "metrics", "runs"},
    "callbacks": {"functional", "nn", "conversion", "energy", "metrics", "runs", "tasks", "trained"},
    "imports": {"functional", "models", "energy"},
    "trained": {"data", "models", "runs"},
    "zoo": {"imports", "nn", "models", "conversion", "energy", "data", "runs", "trained"},
    "export": {"trained", "data", "energy", "imports", "models", "nn"},
    "report": {"conversion", "imports", "energy", "models", "runs", "trained", "zoo"},
    "cli": {"callbacks", "data", "entries", "imports", "models", "nn", "runs", "tasks", "trained"},
    "__init__": {"conversion", "energy", "models", "zoo"},
    "__main__": {"cli"},
}
WITHOUT_LIGHTNING = {"errors", "entries", "functional", "kernels", "nn", "models", "conversion", "energy"}


def room_of(file):
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else file.stem


def imported(file):
    """Names of the modules that a file imports, at any depth, with what it takes of the package itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            names = [f".{alias.name}" for alias in node.names] if node.module == "lightning_msnn" else [""]
            yield from (f"{node.module}{name}" for name in names)


def test_rooms_know_only_those_below_them():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = room_of(file)
        for name in imported(file):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "lightning_msnn" and other not in {room, "errors", "entries", "__version__", *MAY_IMPORT[room]}:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
            if top == "lightning" and room in WITHOUT_LIGHTNING:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_every_room_has_its_place():
    assert {room_of(file) for file in PACKAGE.rglob("*.py")} == MAY_IMPORT.keys()


def test_no_room_is_above_itself():
    below = {room: set(others) for room, others in MAY_IMPORT.items()}
    while below:
        ground = {room for room, others in below.items() if not others & below.keys()}
        assert ground, f"these import each other in a circle: {sorted(below)}"
        below = {room: others for room, others in below.items() if room not in ground}
