"""What the site has beside the pages in ``docs``: pages that lie elsewhere in the repository, and the reference.

Pages link to each other by their places in the repository, as a code host shows them; here such a link becomes one to
the page of the site. A link to another file leads to the repository if ``repo_url`` is set, and is its path if not.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

__all__ = ["on_config", "on_files", "on_page_markdown", "public_names"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_msnn"

ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        path.relative_to(ROOT).as_posix(): f"zoo/{path.parent.name}{'.md' if path.suffix == '.md' else '/energy.png'}"
        for path in sorted((ROOT / "zoo").glob("*/*"))
        if path.name in ("README.md", "energy.png")
    },
}
"""Files outside of ``docs`` by their places in the repository, and their places on the site."""

WIDE = ("index.md", "zoo.md", "benchmarks.md", "paper.md")
"""Pages with tables that take the room of the table of contents."""

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_TIGHT = re.compile(r"(?<=\d) (?=[%µ])| (?=± )|(?<=±) ")  # spaces at which a line does not break
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


def _listed(nav: Any) -> list[str]:
    """Pages that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [page for part in parts for page in _listed(part)]


def rooms() -> list[str]:
    """Public modules: the package, its packages and the modules beside them."""
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    modules = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_"))
    return ["lightning_msnn", *(f"lightning_msnn.{name}" for name in sorted([*packages, *modules]))]


def public_names(module: str) -> list[str]:
    """Names in ``__all__`` of a module, which is read, not imported."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]  # type: ignore[attr-defined]
    raise PluginError(f"{module} has no __all__")


def _reference() -> dict[str, str]:
    """Pages of the reference: one for each room with public names, and the list of them."""
    lines = ["# Reference", "", "What is not listed here may change without a word.", ""]
    pages = {}
    for room in rooms():
        names = [name for name in public_names(room) if not name.startswith("__")]
        if not names:
            continue
        short = room.removeprefix("lightning_msnn.")
        of_room = [name for name in names if f"{room}.{name}" not in rooms()]
        links = ", ".join(f"[`{name}`]({short}.md#{room}.{name})" for name in of_room)
        lines += [f"- [`{room}`]({short}.md)" + (f": {links}" if links else "")]
        options = f"    options:\n      members: [{', '.join(of_room)}]"
        pages[f"reference/{short}.md"] = f"# `{room}`\n\n::: {room}\n{options}\n"
    return {"reference/index.md": "\n".join(lines) + "\n", **pages}


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name at the end of its guides, cards and rooms into their sections."""
    (guides,) = (part["Guides"] for part in config.nav if "Guides" in part)
    folder = Path(config.docs_dir)
    named = {*_listed(config.nav), *ELSEWHERE.values()}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.md")))
    guides += [page for page in found if page not in named]
    cards = sorted(page for page in ELSEWHERE.values() if page.startswith("zoo/") and page.endswith(".md"))
    for part in config.nav:
        if "Zoo" in part:
            part["Zoo"] = [part["Zoo"], *({Path(card).stem: card} for card in cards)]
        if "Reference" in part:
            pages = [page for page in _reference() if page != "reference/index.md"]
            part["Reference"] = [part["Reference"], *({Path(page).stem: page} for page in pages)]
    config.watch += [str(ROOT / name) for name in ELSEWHERE] + [str(PACKAGE)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of ``docs``, and the reference."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for place, text in _reference().items():
        files.append(File.generated(config, place, content=text))
    return files


def _zoo_table() -> str:
    """The table of entries in README."""
    found = re.search(r"^\| entry \|.*?(?=\n\n)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if found is None:
        raise PluginError("README.md has no table of entries")
    return found[0]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links of the site."""
    place = page.file.src_uri
    if place.startswith("reference/"):
        return markdown
    source = {there: here for here, there in ELSEWHERE.items()}.get(place, f"docs/{place}")
    if place in WIDE:
        page.meta["hide"] = ["toc"]

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {target}, which is not there")
        there = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if there and files.get_file_from_path(there):
            relative = posixpath.relpath(there, posixpath.dirname(place) or ".")
            return f"{match['picture']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"
        if config.repo_url:
            return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        if path.endswith(match["text"].strip("`")):
            return f"`{path}`"
        inside = match.string[: match.start()].endswith("(")
        return f"{match['text']}, `{path}`" if inside else f"{match['text']} (`{path}`)"

    def entries(text: str) -> str:
        """Link entries in tables to their cards."""
        for card in (ROOT / "zoo").glob("*/README.md"):
            name, up = card.parent.name, posixpath.relpath("zoo", posixpath.dirname(place) or ".")
            text = text.replace(f"| `{name}` |", f"| [`{name}`]({up}/{name}.md) |")
        return text

    markdown = markdown.replace("<!-- zoo table -->", _zoo_table())
    parts, end = [], 0
    for fence in [*_FENCE.finditer(markdown), None]:
        start = fence.start() if fence else len(markdown)
        parts.append(entries(re.sub(_TIGHT, "\u00a0", re.sub(_LINK, link, markdown[end:start]))))
        parts.append(fence[0] if fence else "")
        end = fence.end() if fence else start
    return "".join(parts)
