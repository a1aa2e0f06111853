"""Model cards of the zoo, in the format of the Hugging Face hub, from what ``config.json`` says."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lightning_msnn import data as data_sets
from lightning_msnn.energy import FACTORS
from lightning_msnn.entries import find, read_config
from lightning_msnn.models.msnn_rnn import SPIKING_CELLS
from lightning_msnn.models.registry import entry_cfg, imported
from lightning_msnn.runs.checkpoints import write_whole
from lightning_msnn.zoo.loading import info

__all__ = ["A_CHECKPOINT", "ENERGIES", "PICTURE", "data_set", "ranked", "results", "table", "write_card"]

PICTURE = "energy.png"
"""File of an entry with its energy by layer."""

A_CHECKPOINT = "a checkpoint"
"""What an entry says in the place of a checkpoint's path."""

ENERGIES = {f"energy_joules{way.removeprefix('arithmetic').replace('memory', '_memory')}": way for way in FACTORS}
"""Energies of one image in joules, and how each is counted. Those of the ReLU baseline end in ``_ann_twin``."""

_HUB_DATA = {
    "CIFAR10": "uoft-cs/cifar10",
    "CIFAR100": "uoft-cs/cifar100",
    "SpeechCommands": "google/speech_commands",
    "TinyImageNet200": "zh-plus/tiny-imagenet",
}
"""Names of data sets on the hub, by class of :mod:`lightning_msnn.data`."""


def _hub_data(config: dict[str, Any], kind: type, name: str) -> ModelCardData:
    """Return what the hub reads of a card: licence, task, data set and results."""
    task = f"{'audio' if issubclass(kind, data_sets.AudioDataModule) else 'image'}-classification"
    accuracies = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
    data, named = _HUB_DATA.get(kind.__name__), f"{config['architecture']}.{config['tag']}"
    results = [
        EvalResult(
            task_type=task, task_name=task.replace("-", " ").title(), dataset_type=data or name.lower(),
            dataset_name=name, dataset_split="test", metric_type="accuracy", metric_name=title,
            metric_value=config[field],
        )
        for field, title in accuracies.items() if field in config
    ]  # fmt: skip
    return ModelCardData(
        library_name="timm",
        license=config.get("license"),
        pipeline_tag=task,
        tags=[task, "timm", *(["spiking-neural-network"] if _spikes(config) else [])],
        datasets=[data] if data else None,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
        model_name=named if results else None,
    )


def _micro(joules: float) -> str:
    return f"{float(f'{joules * 1e6:.3g}'):g} µJ"  # three digits, and no exponent


def _times(config: dict[str, Any], name: str) -> str:
    """How many times an entry's energy its ReLU baseline with the same weights takes."""
    own, baseline = config.get(name), config.get(f"{name}_ann_twin")
    return f"{baseline / own:.1f}" if own and baseline else "-"


def _spikes(config: dict[str, Any]) -> bool:
    """Whether the network of an entry has spikes: as it was counted, or as its arguments say."""
    return "spike_rate" in config if "accumulates" in config else bool(config["model_args"].get("spiking", True))


def _analogue(config: dict[str, Any]) -> str:
    """Name the parts of a network whose inputs are not spikes."""
    arguments = config["model_args"]
    if not _spikes(config):
        return "all of them: neurons are rectifiers"
    if "layers" in arguments:  # of a converted network
        return f"all but the {len(arguments['layers'])} layers that `config.json` names"
    recurrent = config["architecture"].startswith("msnn_rnn") and arguments.get("cell") not in SPIKING_CELLS
    cells = ["state of the recurrent cells"] if recurrent else []
    mixers = ["channel mixers"] if arguments.get("mlp") == "gelu" else []
    return ", ".join(["stem", "patch merging", *cells, *mixers, "read-out"])


def _run(config: dict[str, Any]) -> str:
    """Recipe, length and seed of the training."""
    numbers = [(config[unit], unit) for unit in ("epochs", "steps") if unit in config]
    length = " and ".join(f"{number} {unit.removesuffix('s' * (number == 1))}" for number, unit in numbers)
    parts = [config.get("recipe"), length and f"weights after {length}"]
    parts += [f"seed {config['seed']}"] if "seed" in config else []
    return ", ".join(part for part in parts if part)


def _named(source: object) -> str:
    return str(source) if source == A_CHECKPOINT else f"`{source}`"


def write_card(folder: Path) -> None:
    """Write the model card of an entry, ``README.md``, from its ``config.json``.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If its ``config.json`` is broken.
    """
    config = read_config(folder)
    (channels, height, width), of_data = config["input_size"], config.get("data", {})
    path = str(of_data.get("class_path", "-"))
    kind = imported(path, data_sets.ArrayDataModule) or object
    noun, made = getattr(kind, "noun", "images"), of_data.get("init_args") or {}
    one = noun if noun == "series" else noun.removesuffix("s")
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    rate = {"rate": f"{kind.rate} Hz"} if hasattr(kind, "rate") else {}
    card = ModelCard.from_template(
        _hub_data(config, kind, path.rpartition(".")[2]),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        entry=config,
        name=f"{config['architecture']}.{config['tag']}",
        what=f"{height}x{width} {colours} images" if noun == "images" else f"{noun}, {channels}x{height}x{width} each",
        noun=noun,
        one=one,
        of_one=f"{'an' if one[0] in 'aeiou' else 'a'} {one}",
        analogue=_analogue(config),
        init_from=_named(config.get("init_from")),
        teacher=_named(config.get("teacher")),
        run=_run(config),
        preprocessing={**rate, **made, "mean": config["mean"], "std": config["std"]} if made else {},
        data=path,
        energies=[
            (FACTORS[way], _micro(config[name]), _micro(twin) if twin else "-", _times(config, name))
            for name, way in ENERGIES.items()
            if name in config
            for twin in [config.get(f"{name}_ann_twin")]
        ],
        root=f" --root <folder of {path.rpartition('.')[2]}>" if getattr(kind, "needs_root", True) else "",
        picture=PICTURE if (folder / PICTURE).is_file() else "",
    )
    write_whole(f"{str(card).rstrip()}\n".encode(), folder / "README.md")


def results(names: list[str]) -> str:
    """Return the figures of entries as CSV in the form of timm's results; a field that nobody measured is empty.

    Args:
        names: Names of the entries.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        config, cfg = info(name), entry_cfg(find(name))
        _, height, width = config["input_size"]
        row: dict[str, Any] = {"model": name}
        for top in ("top1", "top5"):
            row |= {top: config.get(top), f"{top}_err": round(100 - config[top], 2) if top in config else None}
        row |= {"param_count": f"{config['parameters'] / 1e6:.2f}" if "parameters" in config else None}
        row |= {"img_size": height if height == width else f"{height}x{width}"}
        row |= {"crop_pct": cfg.crop_pct, "interpolation": cfg.interpolation, "spike_rate": config.get("spike_rate")}
        for field, column in {"energy_joules": "energy_uj", "energy_joules_ann_twin": "baseline_energy_uj"}.items():
            row |= {column: f"{config[field] * 1e6:.6g}" if field in config else None}
        rows.append(row | {"baseline_top1": config.get("top1_ann_twin")})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def data_set(config: dict[str, Any]) -> str:
    """Return the name of the data set that an entry was trained on, ``"-"`` if it names none."""
    path: str = config.get("data", {}).get("class_path", "-")
    return path.rpartition(".")[2]


def ranked(names: list[str]) -> list[str]:
    """Sort entries by data set, then by accuracy, the best first; those that nobody measured come last."""
    configs = {name: info(name) for name in names}
    return sorted(names, key=lambda name: (data_set(configs[name]), -configs[name].get("top1", 0.0), name))


def table(names: list[str]) -> str:
    """Return accuracy, spike rate and energy of entries as a Markdown table, in the order of :func:`ranked`.

    Args:
        names: Names of the entries.
    """
    head = ["entry", "data", "parameters", "size", "top-1", "baseline's top-1", "spike rate", "energy", "factor"]
    rows = [[*head, "with memory traffic"], ["---"] * 10]
    for name in ranked(names):
        config = info(name)
        accuracies = [config.get("top1"), config.get("top1_ann_twin")]
        rows.append(
            [
                f"`{name}`",
                data_set(config),
                f"{config['parameters'] / 1e6:.2f} M" if "parameters" in config else "-",
                "{1}x{2}".format(*config["input_size"]),
                *("-" if top1 is None else f"{top1} %" for top1 in accuracies),
                str(config.get("spike_rate", "-")),
                _micro(config["energy_joules"]) if "energy_joules" in config else "-",
                *(_times(config, field) for field in ("energy_joules", "energy_joules_memory")),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
