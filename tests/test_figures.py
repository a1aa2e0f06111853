"""Figures on pages are those of files that commands write: cards, results of benchmarks, lines of trainings.

A table between marks (``<!-- x -->``) is made anew and compared. Any other figure that looks like a measurement must be
one that the page's sources have, rounded as on the page. Settings and the figures of others are listed.
"""

import json
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from benchmarks import inference, pictures, rates, speed, trainings
from benchmarks.common import read, with_interval
from lightning_msnn import __version__, zoo
from lightning_msnn.conversion.tracing import trace
from lightning_msnn.energy import PROFILES
from lightning_msnn.zoo.card import table
from tests.conftest import ROOT, rest_is_slow

DOCS = ROOT / "docs"
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in DOCS.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
TRAININGS = [json.loads(line) for line in (DOCS / "trainings.jsonl").read_text(encoding="utf-8").splitlines()]
OWN = sorted(path.parent.name for path in (ROOT / "zoo").glob("*/config.json"))
MARKED = re.compile(r"<!-- (\w+) -->(.*?)<!-- end of \1 -->", re.DOTALL)

# Tables

TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("energy.md", "energy"): lambda: pictures.energy_table(MEASURED),
    ("export.md", "integers"): inference.table_of_integers,
    ("export.md", "runtimes"): inference.table_of_runtimes,
    ("rates.md", "tables"): lambda: rates.tables(rates.read()),
    **{
        (page, mark): lambda file=file, make=make: make(read(f"{file}.csv"))
        for file, (page, mark, make) in trainings.TABLES.items()
    },
}


@pytest.mark.parametrize(("page", "mark"), TABLES)
def test_a_table_is_that_of_its_file(page: str, mark: str) -> None:
    found = dict(MARKED.findall((DOCS / page).read_text(encoding="utf-8")))
    assert found[mark].strip() == TABLES[page, mark]().strip()


def test_the_tables_of_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(speed, "HERE", tmp_path)
    speed.report()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page


def test_the_table_of_the_zoo() -> None:
    pages = (ROOT / "README.md", DOCS / "zoo.md")
    assert any(table(OWN) in page.read_text(encoding="utf-8") for page in pages), "python -m lightning_msnn.zoo table"


def test_means_have_their_intervals() -> None:
    assert with_interval([97.0, 98.0, 99.0], 2) == "98.00 ± 2.48", "4.303 / sqrt(3)"
    assert with_interval([1.5], 3) == "1.500"


def test_pictures_are_of_the_entries() -> None:
    """As their cards say, which counted more images or the same: other weights are measured anew."""
    assert MEASURED["rates"].keys() == {name for name in OWN if "spike_rate" in zoo.info(name)}
    for name, one in MEASURED["rates"].items():
        assert one["all"] == pytest.approx(zoo.info(name)["spike_rate"], abs=0.01)
    card, own = zoo.info(MEASURED["entry"]), MEASURED["columns"]["network"]["energies"]
    assert own["arithmetic"] == pytest.approx(card["energy_joules"], rel=0.02)
    assert own["memory"] == pytest.approx(card["energy_joules_memory"], rel=0.02)


# Claims of README


def test_claims_of_readme() -> None:
    """What README says in words of accuracy and speed, and of its version."""
    cards = [zoo.info(name) for name in OWN]
    ahead = [card["top1"] > card["top1_ann_twin"] for card in cards if "top1_ann_twin" in card]
    assert sum(ahead) == 1, "all but one entry are less accurate than their trained ReLU baseline"
    wanted = {"network": "msnn_resnet12", "precision": "bf16", "contender": speed.SHIPPED, "isa": "amx"}
    (row,) = (row for row in read("train_cpu.csv") if wanted.items() <= row.items())
    assert float(row["speed_relative_to_twin_median"]) > 0.95, "a training step takes as long as the ReLU baseline's"
    assert max(zoo.info(name)["top1"] for name in OWN if name.endswith(".c100")) < 72.31, "the paper is not reached"
    assert f"lightning_msnn {__version__} |" in README
    assert len([line for line in README.splitlines() if not line.startswith("| `")]) <= 93, "beside the entries"


# Figures in sentences

NUMBER = r"\d[\d,]*(?:\.\d+)?"
WORDS = "(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|half an?|an?)"
UNITS = r"(?:%|times|points?|[pµmu]?J|Mi?B|ms|s|seconds?|minutes?|hours?|images/s)"
FIGURE = re.compile(
    rf"(?<![\w.-])(?:{NUMBER} ?%|{NUMBER} {UNITS}(?!\w)|\d+\.\d+(?![\d.]*\w)"
    rf"|{WORDS} (?:minutes?|hours?|seconds?|points?|times)\b)|\b(?:a third|a quarter|an eighth|half of)\b"
)
"""What looks like a measurement: a number with a unit or a decimal point, or such a thing in words."""


def text(page: str) -> str:
    """What a page says in sentences and tables of its own: no code, no blocks between marks, no addresses."""
    whole = (ROOT / page).read_text(encoding="utf-8").replace(table(OWN), "")
    whole = re.sub(r"^( *)```.*?^\1```$", "", whole, flags=re.MULTILINE | re.DOTALL)
    whole = re.sub(r"\]\([^)]*\)", "]", re.sub(MARKED, "", whole))
    return re.sub(r"`[^`]*`", "`", " ".join(whole.split()))


def numbers(found: Any) -> Iterator[float]:
    """All numbers in text, or in lists and values of dictionaries."""
    if isinstance(found, bool):
        return
    if isinstance(found, int | float):
        yield float(found)
    elif isinstance(found, str):
        yield from (float(number.replace(",", "")) for number in re.findall(NUMBER, found))
    elif isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from numbers(part)


def said(figure: str, known: Iterable[float | str]) -> bool:
    """Whether a figure is one of those known, or its number is one of them rounded."""
    if not (number := re.match(NUMBER, figure)):
        return figure in known
    digits, value = len(number[0].partition(".")[2]), float(number[0].replace(",", ""))
    return any(abs(x - value) <= 0.5001 * 10**-digits for x in known if not isinstance(x, str))


@cache
def cards() -> list[float]:
    """Accuracies, energies in microjoules, lengths and hours of trainings, and how entries are to their baselines."""
    found: list[float] = []
    for name in OWN:
        card = zoo.info(name)
        found += [card[key] for key in ("top1", "top1_ann_twin", "epochs", "top1_images") if key in card]
        found += [float(hours) for hours in re.findall(r"[\d.]+(?= hours)", str(card.get("hardware")))]
        for key in (key for key in card if key.startswith("energy_joules") and not key.endswith("_ann_twin")):
            both = 1e6 * card[key], 1e6 * card.get(f"{key}_ann_twin", 0.0)
            found += [*both, both[1] / both[0]]
    return found


def graded() -> list[float]:
    """Operations of entries in millions, how far they are from the baseline, and what a digit is worth."""
    found = [*cards(), 100 / 359]
    for card in map(zoo.info, OWN):
        found += [card[key] / 1e6 for key in ("accumulates", "graded_products", "multiply_accumulates") if key in card]
        found.append(zoo.info("msnn_resnet12.c100_relu_whitened")["top1"] - card["top1"])
    return found


def results(name: str, **wanted: str) -> list[float]:
    """Numbers in rows of a file of results; of accuracies and shares in percent too, of speeds how much is taken."""
    found = [x for row in read(name) if wanted.items() <= row.items() for x in numbers(list(row.values()))]
    return [y for x in found for y in (x, 100 * x, 1 / x if x else 0.0)]


def mean(file: str, data: str, name: str, field: str = "val") -> float:
    """Mean over the seeds, in percent."""
    return statistics.mean(100 * float(r[field]) for r in read(f"{file}.csv") if (r["data"], r["name"]) == (data, name))


def experiments() -> list[float]:
    """How far apart settings of docs/experiments.md are."""
    first, final = "before: SGD, lr 0.1, decay 5e-4, steps from the start", "from {} and taught by it, its blocks too"
    muon = ", Muon, lr 0.02, batch 512"
    taught, by_muon = final.format("the baseline"), final.format("Muon's baseline") + muon
    pairs = [("recipe", taught, first), ("recipe", by_muon, first), ("recipe", "the ReLU baseline" + muon, by_muon)]
    pairs += [("recipe", "the ReLU baseline" + muon, "the ReLU baseline")]
    pairs += [("digits", "projection sine theta 0.25", f"projection sine theta {theta}") for theta in (0.7, 0.9)]
    pairs += [("cifar100_tenth", "family msnn_vit12", "default"), ("cifar100_tenth", "default", "family msnn_rnn12")]
    hours = [float(r["seconds"]) / 3600 for r in read("experiments.csv") if r["data"] == "cifar100" and r["seconds"]]
    errors = [100 * (p * (1 - p) / n) ** 0.5 for p, n in ((0.487, 5000), (0.92, 2500))]
    apart = [mean("experiments", data, a) - mean("experiments", data, b) for data, a, b in pairs]
    # The ReLU baseline by Muon has the seeds of what it teaches.
    return [*apart, *hours, *errors, (32 / 24) ** 2, *results("experiments.csv", data="recipe"), *cards()]


def beyond_images() -> list[float]:
    """What other networks take and reach than the one with windows."""
    rows = read("beyond_images.csv")
    first = {(r["data"], r["name"]): float(r["energy_uj"]) for r in rows if r["seed"] == "0" and r["energy_uj"]}
    shares = [joules / first[data, "windows"] for (data, _), joules in first.items()]
    tests = {key: mean("beyond_images", *key, "test") for key in {(r["data"], r["name"]) for r in rows}}
    apart = [tests[data, "ReLU baseline"] - top1 for (data, name), top1 in tests.items() if name == "windows"]
    more = [
        tests["ArrowHead, differences too", name] - tests["ArrowHead", name] for name in ("windows", "ReLU baseline")
    ]
    more += [tests["saccaded digits", "four steps"] - tests["saccaded digits", "windows"]]
    return [*shares, *(100 * (1 - share) for share in shares), *apart, *more]


def dial() -> list[float]:
    """What 8 bits take with additions of 32, and the ReLU baseline priced alike: microjoules, and multiples."""
    (last,) = (row for row in read("frontier.csv") if row["name"] == "entry in 8 bits")
    own = MEASURED["columns"]["network"]["counts"]["multiply_accumulates"]
    baseline, joules = MEASURED["columns"]["ANN twin"], float(last["energy_uj"])
    macs, zeros_out = (baseline["counts"][f"{which}multiply_accumulates"] for which in ("", "effective_"))
    wide, narrow = (PROFILES[name].prices["multiply_accumulates"] / 1e6 for name in ("cmos_45nm", "cmos_45nm_int8"))
    rest = 1e6 * baseline["energies"]["arithmetic"] - wide * macs + wide * own
    priced = [rest + narrow * (number - own) for number in (macs, zeros_out)]
    return [joules + float(last["accumulates"]) * (0.1 - 0.03) / 1e6, *(each / joules for each in priced)]


def convert() -> list[float]:
    """Shares of operations that receive spikes, in networks of timm's; random weights have the same."""

    def share(name: str, **arguments: Any) -> float:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            plan = trace(timm.create_model(name, num_classes=10, **arguments).eval(), torch.zeros(1, 3, 32, 32))
        return 100 * sum(row.operations for row in plan.spiking) / sum(row.operations for row in plan.rows)

    names = ["resnet18", "resnet50", "regnetx_002", "densenet121", "vgg11_bn", "mobilenetv2_100", "efficientnet_b0"]
    top1 = {line["label"]: line["top1"][0] for line in TRAININGS if line["page"] == "convert.md"}
    apart = [abs(a - b) for a in top1.values() for b in top1.values()]
    made, source = zoo.info("spiking.resnet18_cifar_c100"), zoo.info("resnet18_cifar.c100")
    shares = [share(name) for name in (*names, "convnext_femto")] + [share("vit_tiny_patch16_224", img_size=32)]
    return [*shares, *apart, *cards(), source["top1"] - made["top1"], 100 * (0.25 / 2500) ** 0.5]


def paper() -> list[float]:
    """What LIF neurons with four steps take beside a network, and trainings with and without windows."""
    (lif,) = (one for name, one in MEASURED["columns"].items() if "T = 4" in name)
    own = MEASURED["columns"]["network"]["energies"]
    return [
        *(lif["energies"][way] / own[way] for way in own),
        *energy(),
        *numbers([line for line in TRAININGS if line.get("label", "").startswith("windows ")]),
        *cards(),
    ]


def energy() -> list[float]:
    """Megabytes of weights, and the energy of LIF neurons whose weights are read once for all time steps."""
    own, lif = MEASURED["columns"]["network"], MEASURED["columns"]["SNN twin, T = 4"]
    weights = own["counts"]["weights_read"]
    again = (lif["counts"]["weights_read"] - weights) * 4 * PROFILES["cmos_45nm_sram"].prices["weight_bytes"] / 1e12
    once = (lif["energies"]["memory"] - again) / own["energies"]["memory"]
    return [weights * 4 / 1e6, once, *cards(), *numbers(PROFILES["cmos_45nm"].prices)]


def memory() -> list[float]:
    """Memory of a training step, as a multiple of the ReLU baseline's."""
    rows = [row for row in read("memory_cpu.csv") if (row["precision"], row["batch"]) == ("bf16", "512")]
    found = {(row["network"], row["contender"]): float(row["MiB"]) for row in rows}
    return [found[name, speed.SHIPPED] / found[name, "ReLU baseline"] for name, _ in found]


def benchmarks() -> list[float]:
    """Speeds and memory of the convolutional network beside others."""
    wanted = {"network": "msnn_resnet12", "precision": "bf16"}
    memory = {
        (r["batch"], r["contender"]): float(r["MiB"]) for r in read("memory_cpu.csv") if wanted.items() <= r.items()
    }
    shares = [memory[batch, speed.SHIPPED] / memory[batch, speed.BEFORE] for batch in ("128", "512")]
    return [*shares, *results("train_cpu.csv", precision="bf16"), *results("infer_cpu.csv", **wanted)]


def minutes() -> list[str]:
    """How long trainings by hand took, in words."""
    words = {1: "a minute", 2: "two minutes", 3: "three minutes"}
    return [words[round(line["minutes"])] for line in TRAININGS if "minutes" in line]


SOURCES: dict[str, Callable[[], list[Any]]] = {
    "README.md": lambda: [*cards(), *minutes()],
    "benchmarks/README.md": benchmarks,
    "docs/beyond-images.md": beyond_images,
    "docs/convert.md": convert,
    "docs/dial.md": dial,
    "docs/distil.md": lambda: results("callbacks.csv"),
    "docs/energy.md": energy,
    "docs/experiments.md": experiments,
    "docs/export.md": lambda: [
        *results("eight_bits.csv"),
        *(float(r["other_class"]) / 100 for r in read("eight_bits.csv")),
    ],
    "docs/fine-tune.md": lambda: [100 / 359, *(statistics.mean(line["top1"]) for line in TRAININGS)],
    "docs/getting-started.md": minutes,
    "docs/graded-spikes.md": graded,
    "docs/own-images.md": minutes,
    "docs/paper.md": paper,
    "docs/runs.md": minutes,
    "docs/training.md": lambda: [*cards(), *minutes(), *memory()],
    "docs/zoo.md": cards,
}
"""What else a page's figures come from than its own tables and trainings."""

SETTINGS: dict[str, str] = {
    "README.md": r"Norse \d\.\d\.\d",
    "CHANGELOG.md": r"torch \d\.\d+|torchvision 0\.27|[Ww]ith 2\.10 and 2\.11|before 2\.10|Lemaire et al",
    "CONTRIBUTING.md": r"version 1\.0|up to 100 MB|five (?:minutes|seconds)|in 20 minutes",
    "SECURITY.md": "20 times its size|before 1\\.0",
    "benchmarks/README.md": r"at 1\.\d+ times the speed|with 0\.8 times|\(three times as many",
    "docs/beyond-images.md": r"CC BY-SA 4\.0|for a second of sound|half of the 95 % interval",
    "docs/cluster.md": r"arXiv\s+(?:1706\.02677|2205\.10287)",
    "docs/concepts.md": r"threshold \(0\.5\)|from 0\.1;|program uses 0\.25",
    "docs/convert.md": "over 60 % of the steps|half of the batches",
    "docs/dial.md": r"first 40 % of the|at most 3 % above|half of its operations",
    "docs/energy.md": r"a cache of 1 MB|NeuroBench 2\.3 and SpikingJelly 2\.0",
    "docs/experiments.md": r"fixed at 0\.4|default of 0\.1|theta 0\.3|at 0\.7 and 0\.9|theta is 0\.25|0\.1 to 0\.9"
    r"|a rate of 0\.02|A threshold of 1\.0|which have 0\.5|a quarter of|four times as many|at a rate of 0\.002",
    "docs/export.md": r"more than 5 %|\] 2\.0 and \[Norse\] 1\.1|snnTorch 1\.0",
    "docs/getting-started.md": r"Python 3\.11",
    "docs/own-images.md": "more than a few minutes",
    "docs/paper.md": r"arXiv 2401\.10843|\| (?:72\.41|72\.31) %|\| a third|theta 0\.3|at 0\.7 and 0\.9"
    r"|channel from 0\.1|a fixed 0\.4|` from 0\.1\)|70\.15 % with a VGG|69\.45 % \(\[Xu",
    "docs/rates.md": r"fell by 0\.0003|start at 0\.1|a rate of 0\.3085",
    "docs/training.md": r"smoothing 0\.1|half of the (?:batches|images)|10 to 15 seconds of one core",
    "docs/try.md": "17 MB",
    "docs/zoo.md": r"explains: 1 %, of accuracies 0\.1 points",
}
"""What looks like a measurement and is none: settings, targets, versions, and figures of the paper's."""


@pytest.mark.parametrize("page", rest_is_slow(PAGES, {*PAGES} - {"docs/convert.md"}))
def test_a_page_has_no_figure_without_a_source(page: str) -> None:
    whole = (ROOT / page).read_text(encoding="utf-8")
    known = [*SOURCES.get(page, list)(), *numbers([block for _, block in MARKED.findall(whole)])]
    known += numbers([line for line in TRAININGS if line["page"] == Path(page).name])
    left = re.sub(SETTINGS[page], " ", text(page)) if page in SETTINGS else text(page)
    found = [left[max(0, m.start() - 40) : m.end() + 20] for m in FIGURE.finditer(left) if not said(m[0], known)]
    assert not found, "no file has these: a source above, a setting, or not on the page"


@pytest.mark.parametrize("wrong", ["it takes 12.5 µJ", "by 3 %", "in two hours", "is at 0.71", "2,100 images/s"])
def test_a_figure_is_seen(wrong: str) -> None:
    """And what is none is not."""
    (figure,) = (m[0] for m in FIGURE.finditer(wrong))
    assert not said(figure, [12.0, 2.4, 0.69, 2099.0, "two minutes"])
    assert not FIGURE.search("maps of 32x32, CIFAR-100, 5 epochs on 2 cores, msnn_resnet12.c100, lightning_msnn 0.2.0")
    assert said("38.7 %", [38.74])
