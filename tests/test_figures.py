"""Every figure on a page that was measured is that of a file which a command writes.

What a page says in a sentence is made anew here from cards, results and trainings; what it has between marks
(``<!-- x -->``) is made anew in ``test_measured.py``. What then still looks like a measurement is a setting, or
the figure of another, and is listed.
"""

import math
import re
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

from benchmarks import beyond_images, experiments, speed
from benchmarks.trainings import read
from lightning_msnn import zoo
from lightning_msnn.conversion.tracing import trace
from lightning_msnn.energy import PROFILES
from lightning_msnn.zoo.card import table
from tests.conftest import ROOT
from tests.test_measured import OWN, TRAININGS, flat, paper

PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results"

NUMBER = r"\d[\d,]*(?:\.\d+)?"
WORDS = "(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|half an?|an?)"
UNITS = r"(?:%|times|points?|[pµm]?J|Mi?B|ms|s|seconds?|minutes?|hours?|images/s)"
MEASURED = re.compile(
    rf"(?<![\w.-])(?:{NUMBER} ?%|{NUMBER} {UNITS}(?!\w)|\d+\.\d+(?![\d.]*\w)"
    rf"|{WORDS} (?:minutes?|hours?|seconds?|points?|times)\b)|\b(?:a third|a quarter|an eighth|half of)\b"
)
"""What looks like a measurement: a number with a unit or a decimal point, or such a thing in words."""


def text(page: str) -> str:
    """What a page says in sentences and tables of its own: no blocks of code, no blocks between marks, no addresses."""
    whole = (ROOT / page).read_text(encoding="utf-8")
    whole = re.sub(r"^( *)```.*?^\1```$", "", whole, flags=re.MULTILINE | re.DOTALL)
    whole = re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", whole, flags=re.DOTALL)
    return flat(re.sub(r"\]\([^)]*\)", "]", whole))


def found_in(name: str, **wanted: str) -> dict[str, str]:
    """The row of a file of results with these values."""
    (row,) = (row for row in read(RESULTS / name) if wanted.items() <= row.items())
    return row


def resnet(name: str, **wanted: str) -> dict[str, str]:
    return found_in(name, network="msnn_resnet12", precision="bf16", **wanted)


# Sentences by page


def benchmarks() -> list[str]:
    shipped = {"contender": speed.SHIPPED}
    amx, avx = (resnet("train_cpu.csv", isa=isa, **shipped) for isa in ("amx", "avx512"))
    floor = resnet("train_cpu.csv", isa="avx512", contender=speed.FLOOR)
    low, middle, high = (f"{float(amx[f'speed_relative_to_before_{part}']):.2f}" for part in ("q1", "median", "q3"))
    cell = {name: [c.strip() for c in line.split("|")[1:-1]] for name, line in training_rows().items()}
    many, grid = (
        resnet("infer_cpu.csv", batch="256", contender=contender) for contender in (speed.SHIPPED, "grid windows")
    )
    one = resnet("infer_cpu.csv", batch="1", contender=speed.SHIPPED)

    def memory(batch: int) -> str:
        own, before = (
            float(resnet("memory_cpu.csv", batch=str(batch), contender=contender)["MiB"])
            for contender in (speed.SHIPPED, speed.BEFORE)
        )
        return f"{own / before:.2f}"

    def twin(row: dict[str, str]) -> str:
        return f"{float(row['speed_relative_to_twin_median']):.2f}"

    return [
        f"with AMX: {middle} (quartiles {low} and {high})",
        f"with AVX-512 alone: {float(avx['speed_relative_to_before_median']):.2f}.",
        f"takes {1 / float(floor['speed_relative_to_shipped_median']):.2f} of a step",
        f"of the ReLU twin: {cell[speed.OWN][1]} of the twin with torch's own layers; {twin(amx)} of the twin that has",
        f"batch 256: {twin(many)}. With grid windows, which do not overlap, {twin(grid)}.",
        f"batch 1: {twin(one)}.",
        f"batch 128: {memory(128)} ({memory(512)} at 512).",
    ]


def training_rows() -> dict[str, str]:
    """Lines of the page's table of training, which is compared with its file elsewhere."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("| Training step")[2]
    return {line.split("|")[1].strip(): line for line in page.partition("\n\n")[0].splitlines()[2:]}


def convert() -> list[str]:
    """Of networks of timm's with random weights: which layers receive spikes does not hang on them."""

    def share(name: str, size: int, **arguments: Any) -> float:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, num_classes=10, **arguments).eval()
            plan = trace(model, torch.zeros(1, 3, size, size))
        return 100 * sum(row.operations for row in plan.spiking) / sum(row.operations for row in plan.rows)

    most = [share(name, 32) for name in ("resnet18", "resnet50", "regnetx_002", "densenet121")]
    vit = share("vit_tiny_patch16_224", 32, img_size=32)
    made, source = zoo.info("spiking.resnet18_cifar_c100"), zoo.info("resnet18_cifar.c100")
    tried = [line for line in TRAININGS if line["page"] == "convert.md"]
    error = max(100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / 2500) for line in tried for top1 in line["top1"])
    top = {line["label"]: line["top1"][0] for line in tried}
    three = top["converted, 3 epochs, teacher weight 0.9"]
    exact = top["converted, 3 epochs, teacher weight 0.9, exact spikes from the first step"]
    scratch = top["not converted: spikes from the start, 12 epochs, no teacher"]
    twin = top["source, `msnn_resnet12.c100_relu`, 55 epochs"]
    spiking = top["converted, 5 epochs, teacher weight 0.9, `teacher_features` 2"]
    return [
        f"is {twin - spiking:.1f} points above what became of it",
        f"what annealing gave, {three - exact:.1f} points",
        f"are {three - scratch:.1f} points behind the latter",
        *(f"| {line['label']} | {top1} % |" for line in tried for top1 in line["top1"]),
        f"standard error of each figure is {error:.1f} points",
        f"{source['top1'] - made['top1']:.1f} points below its source, for "
        f"{made['energy_joules_ann_twin'] / made['energy_joules']:.1f} times less energy by arithmetic alone, "
        f"{made['energy_joules_memory_zeros_skipped_ann_twin'] / made['energy_joules_memory_zeros_skipped']:.1f} with",
        f"all but stem and read-out | {min(most):.0f} to {max(most):.0f} %",
        f"behind an average | {share('vgg11_bn', 32):.0f} %",
        f"the one behind it | {share('mobilenetv2_100', 32):.0f} %",
        f"squeeze-and-excitation (SiLU) | {share('efficientnet_b0', 32):.0f} %",
        f"MLP (GELU) | {share('convnext_femto', 32):.0f} %, {vit:.0f} %",
    ]


def test_the_table_that_a_dry_run_prints() -> None:
    """Lines of the page's table, all but one for those left out."""
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    shown = page.partition("```\nlayer ")[2].partition("```")[0].splitlines()[2:]
    with torch.no_grad():
        plan = trace(timm.create_model("resnet18").eval(), torch.zeros(1, 3, 224, 224))
    printed = [line.split() for line in str(plan).splitlines()]
    assert len(shown) > 4
    assert not [line for line in shown if line != "..." and line.split() not in printed]


def experiment(data: str, name: str, field: str = "top1") -> float:
    """Mean over the seeds."""
    return statistics.mean(line[field] for line in experiments.lines() if (line["data"], line["name"]) == (data, name))


def ahead(name: str, other: str) -> float:
    """How far a recipe is ahead of another, over the seeds that both have."""
    first, second = (
        {line["seed"]: line["top1"] for line in experiments.lines() if (line["data"], line["name"]) == ("recipe", one)}
        for one in (name, other)
    )
    return statistics.mean(first[seed] - second[seed] for seed in first.keys() & second.keys())


def experiments_page() -> list[str]:
    digits, tenth, large = "digits", "cifar100_tenth", "cifar100"
    sine = "projection sine theta {}"
    hours = [line["seconds"] / 3600 for line in experiments.lines() if line["data"] == large and line["seconds"]]
    lost = [experiment(digits, sine.format(0.25)) - experiment(digits, sine.format(theta)) for theta in (0.7, 0.9)]
    falls = [experiment(tenth, sine.format(theta)) for theta in (0.25, 0.7, 0.9)]
    resnet12, vit12, rnn12 = (experiment(tenth, name) for name in ("default", "family msnn_vit12", "family msnn_rnn12"))
    single, grid, alternate = (experiment(large, f"windows {w}") for w in ("single", "alternate_grid", "alternate"))
    error = 100 * math.sqrt(single / 100 * (1 - single / 100) / 5000)
    rising = [experiment(tenth, sine.format(theta), "spike_rate") for theta in (0.1, 0.9)]
    named = list(experiments.recipes())
    before, final = (next(n for n in named if part in n) for part in ("before:", "its blocks too"))
    first, twin = experiment("recipe", before), experiment("recipe", experiments.TWIN)
    taught, weights, both, exact, stronger = (
        experiment("recipe", name)
        for name in (
            "taught by the twin, weight 0.5, temperature 2", "from the twin", "from the twin and taught by it",
            "from the twin and taught by it, steps from the start",
            "taught by the stronger twin, weight 0.5, temperature 2",
        )
    )  # fmt: skip
    rates = [experiment("recipe", name, "spike_rate") for name in (before, final)]
    soft, ramp, graded, short, long = (
        experiment("recipe", f"annealed {how}")
        for how in ("from a rectifier over 60 %", "from ramp", "from graded", "over 30%", "over 90%")
    )
    assert ramp < experiment("recipe", "steps from the start")
    muons = [experiment("recipe", f"Muon, lr {lr}, batch 512") for lr in (0.02, 0.05, 0.004)]
    by_muon = "from {} and taught by it, its blocks too, Muon, lr 0.02, batch 512"
    old, best = (experiment("recipe", by_muon.format(name)) for name in ("the twin", "Muon's twin"))
    muon_twin = experiment("recipe", experiments.MUON_TWIN)
    of_thresholds = [
        experiment("recipe", name, field)
        for name in ("threshold 1.0", named[0], "threshold 0.25")
        for field in ("top1", "spike_rate")
    ]
    decays = [experiment("recipe", f"weight decay {decay}") for decay in (0.02, 0.3)]
    mixed = [
        experiment("recipe", name)
        for name in ("cutmix on half of the batches", "mixup on half of the batches", "AutoAugment", "erasing 0.25")
    ]
    rates += [experiment("recipe", by_muon.format("Muon's twin"), "spike_rate")]
    gap = ahead(experiments.MUON_TWIN, by_muon.format("Muon's twin"))
    trained = [line for line in TRAININGS if line["page"] == "experiments.md"]
    of_cifar10 = [line["top1"][0] for line in trained if line["data"].startswith("cifar10,")]
    kept, recurrent, of_vit, of_rnn, of_resnet = (line for line in trained if "best" in line)
    assert of_resnet["test"] == [float(found_in("eight_bits.csv", entry="msnn_resnet12.c100")["top1_float32"])]
    return [
        f"at {of_cifar10[1]} % of 2,500 held-out images after 16 epochs of Muon",
        f"by AdamW at {of_cifar10[0]} % after 10",
        f"at a rate of 0.002, ends at {of_cifar10[2]} %",
        f"ends at {of_cifar10[3]} % after 24 epochs",
        f"the weights after the {kept['best_epoch']}th, with {kept['best'][0]} %, the best",
        f"ends at {of_cifar10[4]} % after 12 epochs, and the network from it at {of_cifar10[5]} % after 22",
        f"ends at {of_cifar10[6]} % after 12; its entry has the weights after the {recurrent['best_epoch']}th, "
        f"with {recurrent['best'][0]} %; its twin, from the same weights and for as long, at {of_cifar10[7]} %",
        f"ends at {of_vit['top1'][0]} % of held-out images after 20 epochs, after {of_vit['best_epoch']} it had "
        f"{of_vit['best'][0]}; that of `msnn_rnn12`, by the command of its entry and from the entry's weights, at "
        f"{of_rnn['top1'][0]} % after 14, after {of_rnn['best_epoch']} it had {of_rnn['best'][0]}",
        f"ends at {of_resnet['top1'][0]} % after 22 epochs, after {of_resnet['best_epoch']} it had "
        f"{of_resnet['best'][0]}; of these, 13 are annealed, in which it comes from {of_resnet['curve'][0][1]} to "
        f"{of_resnet['curve'][12][1]} %",
        f"Its weights after the {of_resnet['best_epoch']}th have {of_resnet['test'][0]} % of the test images, as "
        "many as the entry's in float32",
        f"one standard error is {100 * math.sqrt(0.92 * 0.08 / 2500):.1f} points",
        "annealed network ends at {:.1f} %, by 0.05 at {:.1f}, by 0.004 at {:.1f}".format(*muons),
        f"The twin comes to {muon_twin:.1f} %, {muon_twin - twin:.1f} points above",
        f"from that twin, and taught by it, the network comes to {best:.1f} %, {best - first:.1f} points above",
        f"{gap:.1f} below its twin, with {rates[2]:.2f} spikes per neuron",
        f"the twin of AdamW it is {old:.1f} %",
        "cutmix {:.1f} %, mixup {:.1f}, AutoAugment {:.1f}, erasing {:.1f}, in the place of".format(*mixed)
        + f" {soft:.1f}",
        f"annealed network at {experiment('recipe', 'SGD, lr 0.1, decay 5e-4'):.1f} %",
        f"end at {first:.1f} %, AdamW at {experiment('recipe', 'steps from the start'):.1f} %, "
        f"annealed from a rectifier at {experiment('recipe', named[0]):.1f} %. "
        f"Taught by the rectifier twin, itself at {twin:.1f} %, it is {taught:.1f} %; from the twin's "
        f"weights, five epochs more, {weights:.1f} %, and with its answers and "
        f"blocks as teacher {experiment('recipe', final):.1f} %, over three seeds "
        f"{experiment('recipe', final) - first:.1f} points above",
        f"{both:.1f} % with, {exact:.1f} % with exact spikes",
        f"at {experiment('recipe', experiments.STRONGER):.1f} %, better than the twin: {stronger:.1f} %",
        f"from {rates[0]:.2f} to {rates[1]:.2f} spikes per neuron",
        "{:.1f} % with {:.2f} spikes per neuron in the place of {:.1f} with {:.2f}; one of 0.25 ends at {:.1f} % with "
        "{:.2f}".format(*of_thresholds),
        "rectangular, sigmoid and arctan end at {:.1f}, {:.1f} and {:.1f} %".format(
            *(experiment("recipe", f"surrogate {name}") for name in ("rectangular", "sigmoid", "arctan"))
        ),
        "64 images a step end at {:.1f} %, 256 at {:.1f}, 512 at {:.1f}".format(
            *(experiment("recipe", f"batch {n}") for n in (64, 256, 512))
        ),
        "`single` and `alternate_grid` end at {:.1f} and {:.1f} %, in the place of {:.1f}.".format(
            *(experiment("recipe", f"windows {name}") for name in ("single", "alternate_grid")), soft
        ),
        "with a weight of 0.5, 0.8 and 1.0 it is {:.1f}, {:.1f} and {:.1f} %".format(
            *(experiment("recipe", f"taught by the twin, weight {w}, temperature 2") for w in (0.5, 0.8, "1.0"))
        ),
        "Temperatures of 1, 2 and 4 end at {:.1f}, {:.1f} and {:.1f} %".format(
            *(experiment("recipe", f"taught by the twin, weight 0.5, temperature {t}") for t in (1, 2, 4))
        ),
        f"in the place of 24, {(32 / 24) ** 2:.1f} times the operations, end at "
        f"{experiment('recipe', '32 pixels'):.1f} %, and of 16 and 20 in the first epochs at "
        f"{experiment('recipe', 'sizes 16, 20 and 24 by epoch'):.1f} %, in the place of {soft:.1f}.",
        f"label smoothing** it is {experiment('recipe', 'label smoothing 0'):.1f}",
        f"along a cosine {experiment('recipe', 'annealed along a cosine'):.1f}",
        "0.02 and 0.3 end at {:.1f} and {:.1f} %, in the place of {:.1f} with 0.1".format(*decays, soft),
        f"{soft:.1f} and {graded:.1f} %; from a ramp it is {ramp:.1f} %",
        f"Over 30, 60 or 90 % of the steps: {short:.1f}, {soft:.1f}, {long:.1f} %",
        f"{min(hours):.1f} to {max(hours):.1f} hours a training",
        f"it loses {lost[0]:.0f} and {lost[1]:.0f} points on digits",
        f"falls from {falls[0]:.1f} to {falls[1]:.1f} and {falls[2]:.1f} % on a tenth of CIFAR-100",
        f"is at {single:.1f} %, `alternate_grid` at {grid:.1f} and `alternate` at {alternate:.1f}",
        f"on 5,000 images is {error:.1f} points",
        f"by {vit12 - resnet12:.1f} points, the recurrent network behind by {resnet12 - rnn12:.1f}",
        f"rises from {rising[0]:.3f} to {rising[1]:.3f} as theta",
        f"is at {experiment(large, 'windows alternate', 'spike_rate'):.2f} after 10 epochs",
    ]


def energy() -> list[str]:
    prices = PROFILES["cmos_45nm"].prices
    tiny = [zoo.info(name) for name in zoo.list_models("*_tiny*")]
    shrunk = [card["energy_joules_memory_ann_twin"] / card["energy_joules_memory"] for card in tiny]
    return [
        f"({prices['multiply_accumulates']:g} pJ a multiply-accumulate, {prices['accumulates']:g} pJ an accumulate",
        f"for the tiny networks to between {min(shrunk):.1f} and {max(shrunk):.1f}",
    ]


def rates_page() -> list[str]:
    described = read(RESULTS / "describe_cpu.csv")
    off = {
        unit: [float(row[f"said_{unit}"]) / float(row[f"measured_{unit}"]) - 1 for row in described]
        for unit in ("mib", "s")
    }
    assert max(off["mib"]) <= 0
    return [
        f"the memory that it says was at most {-100 * min(off['mib']):.0f} % less than the peak, and the time of a "
        f"step at most {100 * max(map(abs, off['s'])):.0f} % off",
    ]


def distil_page() -> list[str]:
    rows = read(RESULTS / "recipe_cost.csv")
    annealed, taught = (
        [float(row["added_percent"]) for row in rows if row["what"] == what] for what in ("annealed", "taught")
    )
    return [
        f"A training step takes {min(annealed)} to {max(annealed)} % longer while spikes are annealed",
        f"and {min(taught)} to {max(taught)} % longer with a teacher",
    ]


def export_page() -> list[str]:
    row = found_in("eight_bits.csv", entry="msnn_resnet12.c100")
    vit, rnn = (found_in("eight_bits.csv", entry=f"msnn_{family}12.c100") for family in ("vit", "rnn"))
    images, other = int(row["images"]), int(row["other_class"])
    return [
        f"of {images:,} test images of CIFAR-100, `msnn_resnet12.c100` in `int8` ({float(row['MB']):.0f} MB) gives "
        f"{100 * other / images:.0f} % another class than in `float16`, and {row['top1_int8']} % the right one, where "
        f"it was {row['top1_float32']} %: a difference with a standard error of {row['standard_error']} points",
        f"`msnn_vit12.c100` ({vit['MB']} MB) and `msnn_rnn12.c100` ({rnn['MB']} MB), with "
        f"{vit['top1_int8']} % and {rnn['top1_int8']} %, where float32 weights of the same trainings have "
        f"{vit['top1_float32']} % and {rnn['top1_float32']} %",
    ]


def hours(name: str) -> str:
    """How long an entry was trained, as its card says."""
    found = re.search(r"[\d.]+(?= hours)", zoo.info(name)["hardware"])
    assert found, f"the card of {name} does not say how long"
    return found[0]


def training() -> list[str]:
    return [
        f"were trained, the latter in {hours('msnn_resnet12.c100')} hours on one CPU core",
        f"in {hours('msnn_rnn12.c100')} hours on one CPU core, as `msnn_vit12.c100` was trained in "
        f"{hours('msnn_vit12.c100')} hours",
    ]


def by_hand(page: str) -> list[str]:
    """Trainings that a page has by hand."""
    return [
        figure
        for line in TRAININGS
        if line["page"] == page
        for figure in (
            f"{', '.join(f'{top1}' for top1 in line['top1'])} %",
            *([f"{statistics.mean(line['top1']):.2f} %"] if len(line["top1"]) > 1 else []),
        )
    ]


def sequences() -> list[str]:
    rows = read(RESULTS / "beyond_images.csv")
    joules = {(row["data"], row["variant"]): float(row["energy_uj"]) for row in rows if row["seed"] == "0"}
    shares = {
        variant: [
            joules[data, variant] / joules[data, "windows"] for data in beyond_images.SETS if (data, variant) in joules
        ]
        for variant in ("single", "four steps")
    }
    single, four = shares["single"], [share for share in shares["four steps"] if share > 2]
    (parts,) = {f"{share:.1f}" for share in shares["four steps"] if share <= 2}
    means = {
        key: statistics.mean(100 * float(row["test"]) for row in rows if (row["data"], row["variant"]) == key)
        for key in {(row["data"], row["variant"]) for row in rows}
    }
    return [
        *by_hand("beyond-images.md"),
        f"the one without takes {100 * (1 - max(single)):.0f} to {100 * (1 - min(single)):.0f} % less energy",
        f"take {min(four):.1f} to {max(four):.1f} times the energy",
        f"take {parts} times as much",
        "ahead by {:.1f}, {:.1f}, {:.1f} and {:.1f} points".format(
            *(means[data, "twin"] - means[data, "windows"] for data in ("speech", "speakers", "events", "arrowhead"))
        ),
        "bring the network {:.1f} points on ArrowHead, and its twin {:.1f}".format(
            *(means["arrowhead-differences", key] - means["arrowhead", key] for key in ("windows", "twin"))
        ),
    ]


def dialled() -> list[str]:
    """What a network needed and knew after its dial was turned, as shares of that before; its twin in 8 bits."""
    floats = {row["entry"]: row["top1_float32"] for row in read(RESULTS / "eight_bits.csv")}

    def before(entry: str) -> object:
        return floats.get(entry, zoo.info(entry)["top1"])

    # Of the twin's products those whose inputs are spikes in the network, at the price of 8 bits.
    card = zoo.info("msnn_resnet12.c100")
    full, eight = (PROFILES[name].prices["multiply_accumulates"] * 1e-12 for name in ("cmos_45nm", "cmos_45nm_int8"))
    products = card["energy_joules_ann_twin"] / full - card["multiply_accumulates"]
    twin = 1e6 * (card["energy_joules_ann_twin"] - products * (full - eight))

    return [
        f"need about {round(twin, -1):.0f} µJ",
        *(
            figure
            for line in TRAININGS
            if line["page"] == "dial.md"
            for figure in (
                f"needs {100 * line['operations']:.1f} % of the accumulates",
                f"and {100 * line['energy']:.1f} % of its joules",
                f"Top-1 {line['top1'][0]} %, where the entry has {before(line['entry'])} %",
            )
        ),
    ]


def minutes(command: str) -> str:
    """How long a training by hand took, in words."""
    (line,) = (line for line in TRAININGS if line["command"] == command)
    return {1: "a minute", 2: "two minutes", 3: "three minutes"}[round(line["minutes"])]


QUICKSTART = "lightning-msnn fit --config quickstart"
(MINE,) = (line["command"] for line in TRAININGS if line["page"] == "own-images.md")

SENTENCES: dict[str, Callable[[], list[str]]] = {
    "README.md": lambda: [table(OWN), f"about {minutes(QUICKSTART)}, with no download"],
    "benchmarks/README.md": benchmarks,
    "docs/beyond-images.md": sequences,
    "docs/convert.md": convert,
    "docs/dial.md": dialled,
    "docs/distil.md": distil_page,
    "docs/energy.md": energy,
    "docs/experiments.md": experiments_page,
    "docs/export.md": export_page,
    "docs/fine-tune.md": lambda: [*by_hand("fine-tune.md"), f"One image is {100 / 359:.2f} points"],
    "docs/own-images.md": lambda: [*by_hand("own-images.md"), f"took {minutes(MINE)} of one core"],
    "docs/paper.md": lambda: [figure for row in paper().values() for figure in row],
    "docs/rates.md": rates_page,
    "docs/runs.md": lambda: [*by_hand("runs.md"), f"with AMX, {minutes(QUICKSTART)}, "],
    "docs/training.md": lambda: [*training(), f"about {minutes(QUICKSTART)} on 2 CPU cores"],
}
"""Figures on pages, as the files have them, in enough words to be found."""

SETTINGS: dict[str, str] = {
    "README.md": r"Norse \d\.\d\.\d",
    "CHANGELOG.md": r"torch \d\.\d+|torchvision 0\.27|[Ww]ith 2\.10 and 2\.11|before 2\.10|Lemaire et al",
    "CONTRIBUTING.md": "version 1\\.0|up to 100 MB",
    "SECURITY.md": "20 times its size|before 1\\.0",
    "benchmarks/README.md": r"at 1\.\d+ times the speed|with 0\.8 times|\(three times as many",
    "docs/beyond-images.md": r"CC BY-SA 4\.0|for a second of sound|half of the 95 % interval",
    "docs/concepts.md": r"threshold \(0\.5\)|from 0\.1;|program uses 0\.25",
    "docs/convert.md": "over 60 % of the steps",
    "docs/dial.md": r"first 40 % of the|at most 3 % above|cosine from 0\.002|teacher weight 0\.9|a rate of 0\.00[12]"
    "|half of their batches",
    "docs/distil.md": "the first 60 %",
    "docs/energy.md": r"NeuroBench 2\.3 and SpikingJelly 2\.0",
    "docs/experiments.md": r"fixed at 0\.4|default of 0\.1|theta 0\.3|at 0\.7 and 0\.9|theta is 0\.25|0\.1 to 0\.9"
    r"|a rate of 0\.02|A threshold of 1\.0|which have 0\.5",
    "docs/export.md": r"more than 5 %|\] 2\.0 and \[Norse\] 1\.1|snnTorch 1\.0",
    "docs/getting-started.md": r"Python 3\.11, 3\.12 or 3\.13",
    "docs/own-images.md": "more than a few minutes",
    "docs/paper.md": r"arXiv 2401\.10843|\| (?:72\.41|72\.31) %|\| a third|theta 0\.3|at 0\.7 and 0\.9"
    r"|channel from 0\.1|a fixed 0\.4",
    "docs/rates.md": r"fell by 0\.0003|the 95 % interval|a quarter of the operations|four times as many",
    "docs/training.md": r"smoothing 0\.1|half of the batches",
    "docs/zoo.md": r"explains: 1 %, of accuracies 0\.1 points",
}
"""What looks like a measurement and is none: settings, targets, versions, and figures of the paper's."""


@pytest.mark.parametrize("page", SENTENCES)
def test_a_page_says_what_was_measured(page: str) -> None:
    missing = [sentence for sentence in SENTENCES[page]() if flat(sentence) not in text(page)]
    assert not missing, "the files say so, and the page does not"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_other_figure(page: str) -> None:
    left = text(page)
    for sentence in SENTENCES.get(page, list)():
        left = left.replace(flat(sentence), " ")
    left = re.sub(r"`[^`]*`", "`", left)
    if page in SETTINGS:
        left = re.sub(SETTINGS[page], " ", left)
    found = [left[max(0, m.start() - 40) : m.end() + 20] for m in MEASURED.finditer(left)]
    assert not found, "no file has these: a sentence above, a setting, or not on the page"


@pytest.mark.parametrize(
    "wrong", ["it takes 12.5 µJ", "by 3 %", "in two hours", "is at 0.71", "2,100 images/s", "a third"]
)
def test_a_figure_is_seen(wrong: str) -> None:
    """And what is none is not."""
    assert MEASURED.search(wrong)
    assert not MEASURED.search(
        "maps of 32x32, CIFAR-100, 5 epochs on 2 cores, msnn_resnet12.c100, lightning_msnn 0.2.0"
    )
