"""The HTML report of a zoo entry and of a checkpoint."""

import re
from html.parser import HTMLParser

import pytest

from lightning_msnn import zoo
from lightning_msnn.energy.profiles import PROFILES
from lightning_msnn.report import main


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Page(HTMLParser):
    """Collects what a page loads and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.rows, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, text):
        if self.rows and self.lasttag in ("td", "th") and text.strip():
            self.rows[-1].append(text.strip())


def test_zoo_entry(tmp_path, capsys):
    main(["msnn_resnet12_tiny_digits", "--samples", "64"])
    assert capsys.readouterr().out == "report written to msnn_resnet12_tiny_digits.html\n"
    text = (tmp_path / "msnn_resnet12_tiny_digits.html").read_text()
    page = Page(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources), (
        "nothing is loaded from elsewhere"
    )
    assert not page.tags & {"script", "link", "iframe"}
    table = {row[0]: row[1:] for row in page.rows if row}
    assert table["for one sample"] == ["network", "ANN twin", "SNN twin, T = 4"]
    ours, ann, snn = (float(cell.split()[0]) for cell in table["energy"][:3])
    assert ours < snn < ann
    assert set(PROFILES) <= set(table)
    assert table["truenorth"][1] == "no figure"
    assert "multiply accumulates" in table["truenorth"][-1]
    assert "could not be counted: none" in text
    assert all(profile.source.split(",")[0].replace("'", "&#x27;") in text for profile in PROFILES.values())


def test_unknown_names(capsys):
    for args, message in (
        (["msnn_resnet12_digit"], "unknown zoo entry 'msnn_resnet12_digit'.*did you mean 'msnn_resnet12"),
        (["none.ckpt"], "no checkpoint at 'none.ckpt'"),
        ([zoo.list_models()[0], "--profile", "cmos"], "unknown energy profile 'cmos'"),
        ([zoo.list_models()[0], "--samples", "0"], "samples must be an integer of at least 1, not 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err), message
