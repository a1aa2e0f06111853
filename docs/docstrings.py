"""Docstrings as the site shows them: what is reStructuredText in them becomes Markdown."""

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Markdown", "to_markdown"]

_ROLE = re.compile(r":(?:data|class|func|mod|meth|attr):`~?(?P<name>[\w.]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # in a section, which is indented, griffe finds them
_RULE = re.compile(r"=+(?: +=+)+$")


def _table(lines: list[str]) -> list[str]:
    """Rows of a simple table, whose first and last lines are rules, as rows of a Markdown table."""
    starts = [match.start() for match in re.finditer(r"=+", lines[0])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    headed = any(_RULE.match(line) for line in lines[1:-1])
    for line in (line for line in lines if not _RULE.match(line)):
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:  # the line above goes on
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    if not headed:
        rows.insert(0, [""] * len(starts))
    rows.insert(1, ["---"] * len(starts))
    return [f"| {' | '.join(row)} |" for row in rows]


def to_markdown(text: str) -> str:
    """Return a docstring without roles, literal blocks and simple tables of reStructuredText, its doctests as code."""
    lines = text.splitlines()
    if rules := [i for i, line in enumerate(lines) if _RULE.match(line)]:  # one table at most
        lines[rules[0] : rules[-1] + 1] = _table(lines[rules[0] : rules[-1] + 1])
    plain = re.sub(_ROLE, r"`\g<name>`", "\n".join(lines))
    plain = re.sub(_DOCTEST, lambda found: f"```pycon\n{found[0]}\n```", plain)
    return re.sub(r"::\n(?=\n {4})", ":\n", plain)


class Markdown(Extension):
    """A griffe extension that rewrites every docstring of a package when it is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
