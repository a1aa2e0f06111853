"""Model cards of the zoo: figures measured into ``config.json``, and the page made of them."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from lightning_msnn import __version__
from lightning_msnn.energy import NETWORK, summarize
from lightning_msnn.energy.pictures import draw_energy, png
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.twins import twins
from lightning_msnn.models.weights import CONFIG_FILE, read_config, read_weights
from lightning_msnn.runs.checkpoints import network_state, read_checkpoint
from lightning_msnn.zoo.loading import fixed_images, info
from lightning_msnn.zoo.verification import DATA_OF_TAGS, evaluate, test_data

__all__ = ["complete", "table", "write_card"]

SAMPLES = 512
"""Test images on which spikes and operations are counted."""

HALF_COST = 0.1
"""Percentage points of top-1 that are too many for weights of half the size."""

PICTURE = "energy.png"


def _versions() -> dict[str, str]:
    import lightning
    import torchvision

    modules = {"torch": torch, "torchvision": torchvision, "lightning": lightning, "timm": timm}
    return {"lightning_msnn": __version__, **{name: m.__version__.split("+")[0] for name, m in modules.items()}}


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def complete(folder: Path, data: str | Path | None, checkpoint: str | Path) -> None:
    """Measure an entry on its test set, write the figures into its ``config.json``, and its card.

    Args:
        folder: Folder of the entry.
        data: Folder of the data set; digits need none.
        checkpoint: Checkpoint that the entry was made of, with the weights before they were cut to 16 bits.

    Raises:
        ConfigurationError: If the data is not there, or 16 bits cost :data:`HALF_COST` points of top-1 or more.
    """
    config = read_config(folder)
    architecture, classes, channels = config["architecture"], config["num_classes"], config["input_size"][0]
    # In the memory format that entries are loaded in: another one rounds otherwise, which moves a few images.
    network = timm.create_model(architecture, num_classes=classes, in_chans=channels, **config["network_kwargs"]).eval()
    network.load_state_dict(read_weights(folder))
    module = test_data(config, data, 250)
    found = evaluate(network, module)
    if config["weights"] != "float32":
        whole = copy.deepcopy(network)
        whole.load_state_dict(network_state(read_checkpoint(checkpoint)))
        config["top1_float32"] = round(evaluate(whole, module)["top1"], 2)
        if config["top1_float32"] - found["top1"] >= HALF_COST:
            raise ConfigurationError(
                f"{config['weights']} weights have a top-1 of {found['top1']:.2f} % and those of {str(checkpoint)!r} "
                f"of {config['top1_float32']:.2f} %: keep all 32 bits, for less than {HALF_COST} points may be lost"
            )
    batches = (module.on_after_batch_transfer(batch, 0)[0] for batch in module.test_dataloader())
    records, _ = compare(network, partial(twins, network), batches, SAMPLES)
    summaries = {column: summarize(record) for column, record in records.items()}
    own = summaries[NETWORK]
    counts = own["counts"]
    with torch.no_grad():
        logits = network(fixed_images(config))
    config |= {
        "top1": round(found["top1"], 2),
        "top5": round(found["top5"], 2),
        "top1_images": found["images"],
        "time_steps": getattr(network, "time_steps", 1),
        "parameters": own["parameters"],
        "accumulates": round(counts["accumulates"]),
        "multiply_accumulates": round(counts["multiply_accumulates"]),
        "energy_joules": own["energy"]["total"],
        "energy_images": records[NETWORK].samples,
        "energy_profile": "cmos_45nm",
        "versions": _versions(),
        "logits_of_fixed_images": [[round(v, 6) for v in row] for row in logits.tolist()],
    }
    if "ANN twin" in summaries:  # a twin has none, and no spikes
        config["spike_rate"] = round(own["spike_rate"], 4)
        config["energy_joules_ann_twin"] = summaries["ANN twin"]["energy"]["total"]
    _write(folder, config)
    (folder / PICTURE).write_bytes(png(draw_energy(own)))
    write_card(folder)


def _energy(config: dict[str, Any]) -> str:
    if "energy_joules" not in config:
        return "-"
    own, ann = config["energy_joules"], config.get("energy_joules_ann_twin")
    three_digits = float(f"{own * 1e6:.3g}")  # and no exponent
    return f"{three_digits:g} µJ" + ("" if ann is None else f" ({ann / own:.1f} times less than the ANN twin)")


def _analogue(config: dict[str, Any]) -> str:
    """Name the parts of a network whose inputs are no spikes."""
    if not config["network_kwargs"].get("spiking", True):
        return "all of them: neurons are rectifiers"
    parts = {
        "stem": True,
        "patch merging": True,
        "state of the recurrent cells": config["architecture"].startswith("msnn_rnn"),
        "channel mixers": config["network_kwargs"].get("mlp") == "gelu",
        "read-out": True,
    }
    return ", ".join(part for part, there in parts.items() if there)


def write_card(folder: Path) -> None:
    """Write the model card of an entry, ``README.md``, from its ``config.json``.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If it is no entry.
    """
    config = read_config(folder)
    channels, height, width = config["input_size"]
    colours = "grey" if channels == 1 else "RGB"
    whole = f" (with all 32 bits, top-1 is {config['top1_float32']} %)" if "top1_float32" in config else ""
    counted = f"on {config.get('energy_images')} test images"
    kind = DATA_OF_TAGS.get(config["tag"].partition("_")[0], "the data")
    data = "" if kind == "Digits" else f" --data <folder of {kind}>"
    rows = [
        ("test top-1", f"{config.get('top1')} % of {config.get('top1_images')} images that no training has seen"),
        ("test top-5", f"{config['top5']} %" if "top5" in config else "-"),
        ("time steps", str(config.get("time_steps", 1))),
        (
            "spike rate",
            f"{config['spike_rate']} spikes per neuron and image, {counted}" if "spike_rate" in config else "-",
        ),
        ("accumulates", f"{config['accumulates'] / 1e6:.2f} M for an image" if "accumulates" in config else "-"),
        (
            "multiply-accumulates",
            f"{config['multiply_accumulates'] / 1e6:.2f} M for an image ({_analogue(config)})"
            if "multiply_accumulates" in config
            else "-",
        ),
        ("energy, 45 nm CMOS", f"{_energy(config)}, {counted}" if "energy_joules" in config else "-"),
        ("weights", f"{config.get('weights', 'float32')}{whole}, sha256 `{config['sha256']}`"),
        ("made by", f"`{config.get('command')}`, then `python -m lightning_msnn.zoo export`"),
        ("started from", f"`{config['init_from']}`" if "init_from" in config else "-"),
        ("learnt also from", f"`{config['teacher']}`" if "teacher" in config else "-"),
        (
            "its twin with rectifiers, trained alike",
            f"{config['top1_ann_twin']} % top-1 (`{config['command_ann_twin']}`)" if "top1_ann_twin" in config else "-",
        ),
        ("recipe", f"{config.get('recipe')}, {config.get('epochs')} epochs, seed {config.get('seed')}"),
        ("on", f"{config.get('hardware')}, {config.get('date')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())),
        ("data", str(config.get("data_licence"))),
    ]
    lines = [
        f"# {folder.name}",
        "",
        f"`{config['architecture']}` for {config['num_classes']} classes of {height}x{width} {colours} images.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows if value != "-"),
        "",
        *([config["notes"], ""] if "notes" in config else []),
        f"Load it by `lightning_msnn.zoo.load({folder.name.replace('.', '_')!r})`, and check it by "
        f"`python -m lightning_msnn.zoo verify {folder.name}{data}`.",
        *(["", f"![Energy by layer]({PICTURE})"] if (folder / PICTURE).is_file() else []),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(names: list[str]) -> str:
    """Return accuracy, spike rate and energy of entries as a Markdown table.

    Args:
        names: Names of the entries.
    """
    rows = ["| entry | test top-1 | spike rate | energy, 45 nm CMOS | made on |", "|---|---|---|---|---|"]
    for name in names:
        config = info(name)
        rows.append(
            f"| `{name}` | {config.get('top1')} % of {config.get('top1_images')} | {config.get('spike_rate', '-')} | "
            f"{_energy(config)} | {config.get('hardware')}, {config.get('date')} |"
        )
    return "\n".join(rows)
