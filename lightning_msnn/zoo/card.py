"""Model cards of the zoo: pages made of what ``config.json`` says, in the format of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_msnn import data as data_sets
from lightning_msnn.energy import FACTORS
from lightning_msnn.entries import entries, read_config
from lightning_msnn.models.msnn_rnn import SPIKING_CELLS
from lightning_msnn.zoo.loading import info
from lightning_msnn.zoo.verification import ENERGIES

__all__ = ["OF_A_FILE", "PICTURE", "table", "write_card"]

PICTURE = "energy.png"
"""File of an entry with its energy by layer."""

OF_A_FILE = "a checkpoint"
"""What an entry says of a file that its network has learnt from."""

_ENERGIES = {field: FACTORS[way] for field, way in ENERGIES.items()}

_TABLE = "| energy of one {one}, 45 nm CMOS | network | ANN twin with these weights | times less |\n|---|---|---|---|"


_HUB_DATA = {
    "CIFAR10": "uoft-cs/cifar10",
    "CIFAR100": "uoft-cs/cifar100",
    "SpeechCommands": "google/speech_commands",
    "TinyImageNet200": "zh-plus/tiny-imagenet",
}
"""Names of data sets on the hub, by class of :mod:`lightning_msnn.data`."""

_HUB_TASKS: dict[type, str] = {
    data_sets.AudioDataModule: "audio-classification",
    data_sets.EventFrames: "video-classification",
    data_sets.TimeSeries: "time-series-classification",
}
"""Tasks of data that are no images."""

_NOT_OF_THE_HUB = {"time-series-classification"}
"""Tasks that the hub has no list of models for: a tag and the results say them."""


def _named(source: Any) -> str:
    """What a network has learnt from, as a card says it: an entry or a network by name, or a checkpoint."""
    return str(source) if source == OF_A_FILE else f"`{source}`"


def _hub_task(kind: Any) -> str:
    """The task of a class of data: that of images, also of data that are not known."""
    found = (task for base, task in _HUB_TASKS.items() if isinstance(kind, type) and issubclass(kind, base))
    return next(found, "image-classification")


def _front_matter(config: dict[str, Any], data: str, kind: Any) -> str:
    """What the hub reads of a card: licence, task, data set and results, in YAML."""
    spiking, task = _spikes(config), _hub_task(kind)
    matter: dict[str, Any] = {
        "library_name": "timm",
        "license": config.get("license"),
        "pipeline_tag": None if task in _NOT_OF_THE_HUB else task,
        "tags": [task, "timm", *(["spiking-neural-network"] if spiking else [])],
        "datasets": [_HUB_DATA[data]] if data in _HUB_DATA else None,
    }
    accuracies = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
    figures = [
        {"type": "accuracy", "name": title, "value": config[key]} for key, title in accuracies.items() if key in config
    ]
    if figures:
        result = {
            "task": {"type": task, "name": task.replace("-", " ").title()},
            "dataset": {"type": _HUB_DATA.get(data, data.lower()), "name": data, "split": "test"},
            "metrics": figures,
        }
        name = f"{config['architecture']}.{config['tag']}"
        matter |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}
    known = {key: value for key, value in matter.items() if value}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True))


def _micro(joules: float) -> str:
    return f"{float(f'{joules * 1e6:.3g}'):g} µJ"  # three digits, and no exponent


def _times(config: dict[str, Any], name: str) -> str:
    """How many times less a network takes than its ANN twin."""
    own, twin = config.get(name), config.get(f"{name}_ann_twin")
    return f"{twin / own:.1f}" if own and twin else "-"


def _spikes(config: dict[str, Any]) -> bool:
    """Whether the network of an entry has spikes: as it was counted, or as its arguments say."""
    return "spike_rate" in config if "accumulates" in config else bool(config["model_args"].get("spiking", True))


def _analogue(config: dict[str, Any]) -> str:
    """Name the parts of a network whose inputs are no spikes."""
    arguments = config["model_args"]
    if not _spikes(config):
        return "all of them: neurons are rectifiers"
    if "layers" in arguments:  # of a converted network
        return f"all but the {len(arguments['layers'])} layers that `config.json` names"
    parts = {
        "stem": True,
        "patch merging": True,
        "state of the recurrent cells": config["architecture"].startswith("msnn_rnn")
        and arguments.get("cell") not in SPIKING_CELLS,
        "channel mixers": arguments.get("mlp") == "gelu",
        "read-out": True,
    }
    return ", ".join(part for part, there in parts.items() if there)


def _preprocessing(config: dict[str, Any], kind: Any) -> str:
    """How inputs that are no images are made."""
    made = config.get("data", {}).get("init_args")
    if not isinstance(made, dict) or not made:
        return ""
    rate = {"rate": f"{kind.rate} Hz"} if hasattr(kind, "rate") else {}
    return _listed({**rate, **made, "mean": config["mean"], "std": config["std"]})


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def write_card(folder: Path) -> None:
    """Write the model card of an entry, ``README.md``, from its ``config.json``.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If its ``config.json`` is broken.
    """
    config = read_config(folder)
    given = config.get
    channels, height, width = config["input_size"]
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    kind = getattr(data_sets, str(config.get("data", {}).get("class_path")).rpartition(".")[2], None)
    noun = getattr(kind, "noun", "images")
    what = f"{height}x{width} {colours} images" if noun == "images" else f"{noun}, {channels}x{height}x{width} each"
    one = noun if noun == "series" else noun.removesuffix("s")
    of_one = f"{'an' if one[0] in 'aeiou' else 'a'} {one}"
    name, path = f"{config['architecture']}.{config['tag']}", str(config.get("data", {}).get("class_path", "-"))
    sampled = config.get("energy_sampling", "the first of the data set")
    length = " and ".join(
        f"{given(unit)} {unit.removesuffix('s' * (given(unit) == 1))}" for unit in ("epochs", "steps") if unit in config
    )
    run = [
        given("recipe"),
        f"weights after {length}" if length else None,
        f"seed {given('seed')}" if "seed" in config else None,
    ]
    counts = {field: f"{given(field, 0) / 1e6:.2f} M for {of_one}" for field in ("accumulates", "multiply_accumulates")}
    # A row is there if the field that it is about is.
    rows = [
        ("top1", "test top-1", f"{given('top1')} % of {given('top1_images')} {noun} that no training has seen"),
        ("top5", "test top-5", f"{given('top5')} %"),
        (
            "top1_ann_twin",
            "its twin with rectifiers, trained by itself",
            f"{given('top1_ann_twin')} % top-1 (`{given('command_ann_twin')}`)",
        ),
        ("time_steps", "time steps", f"{given('time_steps')}"),
        ("parameters", "parameters", f"{given('parameters', 0):,}"),
        ("spike_rate", "spike rate", f"{given('spike_rate')} spikes per neuron and {one}"),
        ("accumulates", "accumulates", counts["accumulates"]),
        ("multiply_accumulates", "multiply-accumulates", f"{counts['multiply_accumulates']} ({_analogue(config)})"),
        ("energy_images", "spikes and operations", f"counted on {given('energy_images')} test {noun}, {sampled}"),
        ("sha256", "weights", f"{given('weights', 'float32')}, sha256 `{given('sha256')}`"),
        ("command", "made by", f"`{given('command')}`, then `python -m lightning_msnn.zoo export`"),
        ("init_from", "started from", _named(given("init_from"))),
        ("teacher", "learnt also from", _named(given("teacher"))),
        (None, "recipe", ", ".join(part for part in run if part)),
        ("settings", "settings", _listed(given("settings", {}))),
        (None, "preprocessing", _preprocessing(config, kind)),
        (None, "on", ", ".join(config[part] for part in ("hardware", "date") if part in config)),
        ("versions", "measured with", _listed(given("versions", {}))),
        (None, "data", ", ".join(part for part in (f"`{path}`", given("data_licence")) if part)),
    ]
    energies = [
        f"| {title} | {_micro(config[field])} | {_micro(twin) if twin else '-'} | {_times(config, field)} |"
        for field, title in _ENERGIES.items()
        if field in config
        for twin in [given(f"{field}_ann_twin")]
    ]
    needed = getattr(kind, "needs_root", True)
    data = "" if not needed else f" --data <folder of {path.rpartition('.')[2]}>"
    lines = [
        "---",
        _front_matter(config, path.rpartition(".")[2], kind).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"`{config['architecture']}` for {config['num_classes']} classes of {what}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {text} |" for field, title, text in rows if text and (field is None or field in config)),
        "",
        *([_TABLE.format(one=one), *energies, ""] if energies else []),
        *([config["notes"], ""] if "notes" in config else []),
        f"Load it by `lightning_msnn.zoo.load({name.replace('.', '_')!r})`, and check it by "
        f"`python -m lightning_msnn.zoo verify {name}{data}`.",
        *(["", f"![Energy by layer]({PICTURE})"] if (folder / PICTURE).is_file() else []),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(names: list[str]) -> str:
    """Return accuracy, spike rate and energy of entries as a Markdown table.

    A twin that was trained is what the entry's facts say of it, or the entry of the same name with ``_relu``.

    Args:
        names: Names of the entries.
    """
    head = ["entry", "test top-1", "top-1 of its trained twin", "spike rate", "energy, 45 nm CMOS"]
    head += ["times less than the ANN twin", "zeros skipped", "with memory traffic", "both"]
    rows = [head, ["---"] * len(head)]
    for name in names:
        config, relu = info(name), f"{name}_relu"
        trained = info(relu) if relu in entries() else {}
        top1 = f"{config['top1']} % of {config.get('top1_images')}" if "top1" in config else "-"
        accuracy = config.get("top1_ann_twin", trained.get("top1"))
        twin = "-" if accuracy is None else f"{accuracy} %"
        energy = _micro(config["energy_joules"]) if "energy_joules" in config else "-"
        cells = [f"`{name}`", top1, twin, str(config.get("spike_rate", "-")), energy]
        rows.append([*cells, *(_times(config, field) for field in _ENERGIES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
