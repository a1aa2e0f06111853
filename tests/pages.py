"""What stands in the project's pages: their fenced blocks of code."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of code: its page, the heading above it, what follows the fence, and what is in it."""

    page: str
    heading: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """Name of the file that it is, which its first line says; "" for what is none."""
        found = re.match(r"# (\S+\.\w+)\n", self.text)
        return found[1] if found else ""


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent, language, content = match.groups()
        headings = re.findall(r"^#+ (.+)$", re.sub(_FENCE, "", text[: match.start()]), re.MULTILINE)
        plain = "".join(line.removeprefix(indent) for line in content.splitlines(keepends=True))
        if not languages or language in languages:
            found.append(Block(page.relative_to(ROOT).as_posix(), headings[-1], language, plain))
    return found


def commands(text: str) -> list[str]:
    """Return the command lines of a block of shell, each on one line, without comments."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    joined = re.sub(r"'[^'\n]*\n[^']*'", lambda quoted: " ".join(quoted[0].split()), joined)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
