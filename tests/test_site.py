"""The site: links lead somewhere, every entry and room has its page, pictures are small and used."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.pages import PAGES

FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


def text_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower().strip()) for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for target in LINK.findall(text_of(page)):
        if re.match(r"https://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or ROOT not in (there, *there.parents):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            wrong.append(f"{target}: no such heading")
    assert not wrong


def test_links_and_pictures_are_found() -> None:
    assert sum(len(LINK.findall(text_of(page))) for page in LINKED) > 100
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.stat().st_size < 300_000
        assert any(picture.name in text_of(page) for page in PAGES)


def test_pages_named_in_the_navigation_are_there() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!ENV", lambda loader, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for each in (part.values() if isinstance(part, dict) else part) for page in pages(each)]

    elsewhere = {"index.md", "benchmarks.md", "changelog.md", "contributing.md", "security.md", "reference/index.md"}
    assert {page for page in pages(nav) if not (ROOT / "docs" / page).is_file()} == elsewhere


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocstrings"), reason="the extra docs is not installed")
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, with what lies outside of ``docs``; examples in docstrings are code."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for entry in (ROOT / "zoo").glob("*/config.json"):
        assert (tmp_path / "site" / "zoo" / entry.parent.name / "index.html").is_file()
    names = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8").split()
    for name in names:
        room, _, short = name.rpartition(".")
        if short.startswith("__") or f"{room}.{short}" in ROOMS:
            continue
        page = tmp_path / "site" / "reference" / room.removeprefix("lightning_msnn.") / "index.html"
        assert f'id="{name}"' in page.read_text(encoding="utf-8"), f"{name} is not in the reference"
        assert "<blockquote>" not in page.read_text(encoding="utf-8"), f"an example in {room} is shown as a quotation"


ROOMS = {f"lightning_msnn.{path.parent.name}" for path in (ROOT / "lightning_msnn").glob("*/__init__.py")}
