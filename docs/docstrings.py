"""Docstrings as the site shows them: what is reStructuredText in them becomes Markdown."""

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Markdown", "to_markdown"]

_ROLE = re.compile(r":(?:data|class|func|mod|meth|attr):`~?(?P<name>[\w.]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # in a section, which is indented, griffe finds them


def to_markdown(text: str) -> str:
    """Return a docstring without roles of reStructuredText; its literal blocks and doctests are code."""
    plain = re.sub(_ROLE, r"`\g<name>`", text)
    plain = re.sub(_DOCTEST, lambda found: f"```pycon\n{found[0]}\n```", plain)
    return re.sub(r"::\n(?=\n {4})", ":\n", plain)


class Markdown(Extension):
    """A griffe extension that rewrites every docstring of a package when it is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
