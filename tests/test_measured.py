"""Numbers on the pages are those of files that commands write: cards, results of benchmarks, lines of experiments."""

import csv
import json
import re
import runpy
import statistics
from pathlib import Path

import pytest

from benchmarks import beyond_images, experiments, frontier, integer, rates, runtimes, scaling, speed
from benchmarks.pages import fill
from benchmarks.trainings import read
from lightning_msnn import __version__, zoo
from lightning_msnn.export import FORMATS
from lightning_msnn.functional import NEURONS
from lightning_msnn.zoo.card import table
from tests.conftest import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
TRAININGS = [json.loads(line) for line in (DOCS / "trainings.jsonl").read_text(encoding="utf-8").splitlines()]
OWN = sorted(path.parent.name for path in (ROOT / "zoo").glob("*/config.json"))
CARD = zoo.info("msnn_resnet12.c100")
TWIN = zoo.info("msnn_resnet12.c100_relu")


def between(page: Path, start: str, end: str) -> str:
    """What stands between two marks."""
    return page.read_text(encoding="utf-8").partition(start)[2].partition(end)[0].strip()


def flat(text: str) -> str:
    """Text without line breaks."""
    return " ".join(text.split())


# README


def test_the_table_of_the_zoo() -> None:
    assert table(OWN) in README, "python -m lightning_msnn.zoo table prints it"


def test_readme_has_no_other_number_of_a_measurement() -> None:
    """Where it says something of speed or accuracy, a page has the number."""
    words = re.sub(r"^( *)```.*?^\1```$|^\|.*?$|\([^)]*\)", "", README, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\b\d+(?:\.\d+)? ?(?:%|times|µJ|mJ|points|MB|images/s|hours)", words)
    assert not found


def training_speed() -> float:
    """How many times as fast as its twin the convolutional network trains."""
    rows = csv.DictReader((ROOT / "benchmarks" / "results" / "train_cpu.csv").open(encoding="utf-8"))
    (row,) = (
        r
        for r in rows
        if (r["network"], r["precision"], r["contender"], r["isa"]) == ("msnn_resnet12", "bf16", speed.SHIPPED, "amx")
    )
    return float(row["speed_relative_to_twin_median"])


def ahead_of_twins() -> int:
    """How many of the entries whose card has the accuracy of their trained twin are more accurate."""
    cards = [zoo.info(name) for name in OWN]
    twins = [(card["top1"], card["top1_ann_twin"]) for card in cards if "top1_ann_twin" in card]
    assert len(twins) > 5
    return sum(spiking > twin for spiking, twin in twins)


CLAIMS = {
    "a training step of the convolutional network takes as long as that of its twin": lambda: training_speed() > 0.95,
    "Of the entries of the zoo whose rectifier twin was trained too, all but one are less accurate than it": lambda: (
        ahead_of_twins() == 1 and CARD["top1"] < TWIN["top1"]
    ),
    "the paper's accuracies are not reached here": lambda: (
        max(zoo.info(name)["top1"] for name in OWN if name.endswith(".c100")) < 72.31
    ),
    "comes with those that make it smaller": lambda: "zeros skipped | with memory traffic | both" in README,
    "| NIR | [one window, one step]": lambda: "nir" in FORMATS,
    "| neuron models | [two]": lambda: len(NEURONS) == 2,
    f"| lightning_msnn {__version__} |": lambda: True,
    "none trained yet": lambda: not any("EventFrames" in str(zoo.info(name).get("data")) for name in OWN),
}
"""Claims of README, and what is true if they are. One that no longer holds, or is not made any more, fails."""


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim(claim: str) -> None:
    assert claim in flat(README), "README says it no more"
    assert CLAIMS[claim](), "what was measured says otherwise"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


# Pages


def rows(page: str) -> list[list[str]]:
    """Cells of the tables of a page."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def times(field: str) -> str:
    return f"{CARD[field + '_ann_twin'] / CARD[field]:.1f}"


def lif(way: str) -> str:
    columns = MEASURED["columns"]
    (name,) = (column for column in columns if "T = 4" in column)
    return f"{columns[name]['energies'][way] / columns['network']['energies'][way]:.1f}"


def single(windows: str) -> str:
    (line,) = (r for r in experiments.lines() if (r["data"], r["name"]) == ("cifar100", f"windows {windows}"))
    return f"{line['top1']:.2f} %"


def paper() -> dict[str, list[str]]:
    """What a row of the page about the paper must say, by its beginning."""

    def entry(name: str) -> list[str]:
        config = zoo.info(name)
        return [f"{config['top1']} %", f"{config['epochs']} epochs"]

    ways = ("", "_zeros_skipped", "_memory", "_memory_zeros_skipped")
    factors = [times(f"energy_joules{way}") for way in ways]
    return {
        "72.41 %": entry("msnn_resnet12.c100"),
        "72.31 %": entry("msnn_rnn12.c100"),
        "a vision transformer": entry("msnn_vit12.c100"),
        "one time step": entry("msnn_resnet12.c100_relu"),
        "several receptive fields": [single("single"), single("alternate")],
        "a tenth": [
            "{} times less by arithmetic alone; {} where zeros are skipped, {} with memory".format(*factors),
            f"{factors[3]} with both",
        ],
        "a third": [f"{lif('arithmetic')} times less", f"{lif('memory')} with memory traffic"],
    }


@pytest.mark.parametrize("start", paper())
def test_what_stands_beside_the_paper(start: str) -> None:
    (row,) = (cells for cells in rows("paper.md") if cells[0].startswith(start))
    for text in paper()[start]:
        assert text in row[1]


def test_energy_of_an_entry_and_its_twins() -> None:
    made = runpy.run_path(str(DOCS / "pictures.py"))["energy_table"](MEASURED)
    assert between(DOCS / "energy.md", "<!-- energy -->", "<!-- end of energy -->") == made


def test_what_was_measured_is_of_the_entries() -> None:
    """As their cards say, which counted more images or the same: other weights are measured anew."""
    spiking = {name for name in OWN if "spike_rate" in zoo.info(name)}
    assert MEASURED["rates"].keys() == spiking, "python docs/pictures.py measure"
    for name, one in MEASURED["rates"].items():
        assert one["all"] == pytest.approx(zoo.info(name)["spike_rate"], abs=0.01)
    own = MEASURED["columns"]["network"]["energies"]
    assert own["arithmetic"] == pytest.approx(CARD["energy_joules"], rel=0.02)
    assert own["memory"] == pytest.approx(CARD["energy_joules_memory"], rel=0.02)


def test_trainings_by_hand() -> None:
    """Their results are in a file, with the command that repeats each."""
    for line in TRAININGS:
        page = (DOCS / line["page"]).read_text(encoding="utf-8")
        figures = ", ".join(f"{value}" for value in line["top1"])
        assert line["hardware"] in page
        assert line["date"] in page
        assert f"{figures} %" in page
        if len(line["top1"]) > 1:
            assert f"| {statistics.mean(line['top1']):.2f} % |" in page


def test_curves_end_where_their_trainings_do() -> None:
    for line in (line for line in TRAININGS if "curve" in line):
        epochs, accuracies = zip(*line["curve"], strict=True)
        assert sorted(set(epochs)) == list(epochs)
        assert accuracies[-1] == line["top1"][0]
        if "best" in line:
            assert line["best"] == [max(accuracies)]
            assert [line["best_epoch"], max(accuracies)] in line["curve"]


def test_experiments() -> None:
    made = experiments.tables(experiments.lines())
    assert between(DOCS / "experiments.md", "<!-- tables -->", "<!-- end of tables -->") == made.strip()


def test_exports() -> None:
    page = DOCS / "export.md"
    assert between(page, "<!-- runtimes -->", "<!-- end of runtimes -->") == runtimes.table()
    assert between(page, "<!-- integers -->", "<!-- end of integers -->") == integer.table()


def test_a_page_without_marks(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- tables -->\nold\n", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        fill(tmp_path / "page.md", "tables", "new")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "<!-- tables -->\nold\n"


def test_rates() -> None:
    """Of all entries that were measured; those that were trained anew are measured anew."""
    assert between(DOCS / "rates.md", "<!-- tables -->", "<!-- end of tables -->") == rates.tables(rates.read()).strip()


def test_tables_of_trainings() -> None:
    made = frontier.table(read(frontier.RESULTS))
    assert between(DOCS / "dial.md", "<!-- frontier -->", "<!-- end of frontier -->") == made
    assert between(DOCS / "rates.md", "<!-- scaling -->", "<!-- end of scaling -->") == scaling.table()
    made = beyond_images.table(read(beyond_images.RESULTS))
    assert between(DOCS / "beyond-images.md", "<!-- sequences -->", "<!-- end of sequences -->") == made


def test_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(speed, "HERE", tmp_path)
    speed.report()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page
