"""Tables of measurements, put between the marks of a page; the words around them stay."""

from pathlib import Path

__all__ = ["fill"]


def fill(page: Path, mark: str, text: str) -> None:
    """Put a text between the marks of a page, ``<!-- mark -->`` and ``<!-- end of mark -->``.

    Args:
        page: The page.
        mark: Name of the marks.
        text: Markdown.

    Raises:
        ValueError: If the page has not both marks, once each.
    """
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page} must have {start} and {end} once each")
    before, after = whole.partition(start)[0], whole.partition(end)[2]
    page.write_text(f"{before}{start}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
