"""The HTML report of a zoo entry and of a checkpoint."""

import base64
import re
from datetime import date
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.data import Digits
from lightning_msnn.energy import FACTORS, Record
from lightning_msnn.energy.pictures import draw_energy, draw_spike_rates, draw_windows, window_maps
from lightning_msnn.energy.profiles import PROFILES
from lightning_msnn.nn import Spike
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn_cli import main
from tests.callbacks.training import quiet
from tests.conftest import SHALLOW


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
    main(["report", "msnn_resnet12_tiny_digits", "--samples", "16"])
    assert capsys.readouterr().out == "report written to msnn_resnet12_tiny_digits.html\n"
    text = (tmp_path / "msnn_resnet12_tiny_digits.html").read_text()
    page = Page(text)
    assert [source.partition(",")[0] for source in page.sources] == ["data:image/png;base64"] * 3
    assert not page.tags & {"script", "link", "iframe"}
    table = {row[0]: row[1:] for row in page.rows if row}
    assert table["for one sample"] == [
        "network", "ReLU baseline (same weights)", "LIF neurons, T = 4 (same weights)",
    ]  # fmt: skip
    ours, ann, snn = (float(cell) for cell in table["energy (µJ)"][:3])
    assert ours < snn < ann
    accuracy = zoo.info("msnn_resnet12_tiny_digits")["top1"]
    assert re.search(rf"<p><b>msnn_resnet12_tiny_digits classifies {accuracy:.2f} % of the test images of Digits", text)
    assert {f"times the first column, {way}" for way in FACTORS.values()} <= set(table), (
        "no factor without its companions"
    )
    assert table["page made"][0].startswith(str(date.today()))
    assert set(PROFILES) <= set(table)
    assert table["truenorth"][1] == "no figure"
    assert "multiply accumulates" in table["truenorth"][-1]
    assert "could not be counted: none" in text
    assert all(profile.source.split(",")[0].replace("'", "&#39;") in text for profile in PROFILES.values())


def test_checkpoint_of_a_run(tmp_path, capsys):
    """The page is in the run's folder, with accuracy on the whole test set, configuration and training curves."""
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, network_kwargs=SHALLOW)
    run = tmp_path / "runs" / "mine" / "version_0"
    trainer = quiet(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, datamodule=(datamodule := Digits()))
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
    (run / "config.yaml").write_text("seed: <1234>\n")
    figure = Figure(figsize=(1, 1))
    figure.savefig(run / "curves.png")
    main(["report", str(run / "checkpoints" / "best.ckpt"), "--samples", "4"])
    assert capsys.readouterr().out == f"report written to {run / 'report_best.html'}\n"
    text = (run / "report_best.html").read_text()
    measured = trainer.test(task, datamodule=datamodule, verbose=False)[0]["test/top1"]
    assert f"classifies {100 * measured:.2f} % of the test images" in text
    assert "<pre>seed: &lt;1234&gt;" in text
    assert base64.b64encode((run / "curves.png").read_bytes()).decode() in text
    assert "trained by itself: not known" in text


def test_a_page_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    for output in (tmp_path, tmp_path / "file" / "r.html"):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit) as stop:
            main(["report", zoo.list_models()[0], "--out", str(output), "--root", "/nowhere"])
        assert stop.value.code == 2
        assert "cannot write the report to" in capsys.readouterr().err


def test_pictures_answer_one_question():
    """Of 60 layers there are 20 rows at most, and no map of a single pixel or row without maps."""
    names = [f"stages.{i // 15}.blocks.{i // 5 % 3}.layer{i}" for i in range(60)]
    layer = {"energy": {"accumulates": 1e-9}, "spike_rate": 0.25, "counts": {"spikes": 1.0, "neurons": 4.0}}
    summary = {"layers": dict.fromkeys(names, layer), "energy": {"total": 6e-8}, "samples": 3, "spike_rate": 0.25}
    summary["profile"] = {"source": "somebody, somewhere"}
    for draw in (draw_energy, draw_spike_rates):
        axes = draw(summary).axes[0]
        labels = [tick.get_text() for tick in axes.get_yticklabels()]
        assert labels == [f"stages.{i}.blocks.{k}" for i in range(4) for k in range(3)]
    assert [round(bar.get_width(), 9) for bar in draw_energy(summary).axes[0].patches] == [0.005] * 12

    class Block(nn.Module):
        windows = "dilated"

        def __init__(self):
            super().__init__()
            self.spike = Spike()

    model = nn.Sequential(*[Block() for _ in range(6)])
    sides = (16, 8, 8, 4, 4, 1)
    fired = {f"{i}.spike": torch.full((2, side, side), 3) for i, side in enumerate(sides)}
    maps = window_maps(model, Record((), torch.zeros(0), 4, torch.zeros(0), {}, fired, dict.fromkeys(fired, 4)))
    assert list(maps) == list(fired)[:5], "a pixel is no map"
    figure = draw_windows(maps)
    assert len(figure.axes) == 5 + 1, "maps and the colour bar, nothing empty"
    assert all(axes.get_title().endswith("dilated windows: 75 75 75 75") for axes in figure.axes[:5])
