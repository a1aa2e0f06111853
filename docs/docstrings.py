"""Docstrings as the site shows them: what is reStructuredText in them becomes Markdown."""

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Markdown"]

_ROLE = re.compile(r":(?:data|class|func|mod|meth|attr):`~?(?P<name>[\w.]+)`")
_TABLE = re.compile(r"^=+(?: +=+)+\n(?:.*\n)*?=+(?: +=+)+$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Return a docstring without roles, literal blocks and simple tables of reStructuredText."""
    tables = list(_TABLE.finditer(text))
    for match in reversed(tables):
        # A table has a rule above and below its head, and one at its end: take all until the last rule.
        text = f"{text[: match.start()]}```text\n{match[0]}\n```{text[match.end() :]}"
    text = re.sub(_ROLE, r"`\g<name>`", text)
    return re.sub(r"::\n(?=\n {4})", ":\n", text)


class Markdown(Extension):
    """A griffe extension that rewrites every docstring of a package when it is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
