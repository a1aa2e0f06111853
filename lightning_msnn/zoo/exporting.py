"""A zoo entry made of a Lightning checkpoint, and its figures measured."""

import datetime
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import safetensors.torch
import timm
import torch
import torchvision
from lightning.pytorch import LightningDataModule
from timm.models._hub import save_config_for_hf

from lightning_msnn import __version__
from lightning_msnn import data as data_sets
from lightning_msnn.data.arrays import OF_THE_MACHINE
from lightning_msnn.energy.pictures import draw_energy, png
from lightning_msnn.entries import CONFIG_FILE, FACTS, TAG, WEIGHTS_FILE, find, read_config
from lightning_msnn.errors import ConfigurationError, UnknownNameError
from lightning_msnn.models.registry import default_cfg, imported, is_ours
from lightning_msnn.runs.checkpoints import is_checkpoint, write_whole
from lightning_msnn.trained import Trained, load_trained
from lightning_msnn.zoo.card import A_CHECKPOINT, PICTURE, write_card
from lightning_msnn.zoo.storing import stored
from lightning_msnn.zoo.verification import figures, test_data

__all__ = ["export", "measure"]

_NOT_SETTINGS = {"network", "num_classes", "in_chans", "network_kwargs", "pretrained", "init_from", "teacher", "seed"}
"""Hyper-parameters that an entry says elsewhere."""

_OF_TRAINING = {"batch_size", "val_fraction", "seed"}
"""Arguments of data that a test does not depend on."""


def _public(source: str | None) -> str | None:
    """Return the name of an entry or a network; of a checkpoint, which is a file of this machine, no path."""
    return A_CHECKPOINT if source is not None and is_checkpoint(source) else source


def _facts(trained: Trained, checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    content = trained.info
    hparams, data = content.get("hyper_parameters", {}), content.get("datamodule_hyper_parameters") or {}
    of_data: dict[str, Any] = {"class_path": trained.data or "unknown"}
    kind = imported(trained.data, data_sets.ArrayDataModule)
    ours = trained.data.startswith(f"{data_sets.__name__}.")
    if kind is not None and not (ours and issubclass(kind, data_sets.ImageDataModule)):  # those have their size alone
        arguments = kind.arguments_from(data, None)
        of_data["init_args"] = {key: v for key, v in arguments.items() if key not in _OF_TRAINING}
    seeds = [part["shuffle_seed"] for part in content.values() if isinstance(part, Mapping) and "shuffle_seed" in part]
    settings = {**data, **hparams}
    facts = {
        "data": of_data,
        "init_from": _public(content.get("started_from")),
        "teacher": _public(content.get("teacher") or hparams.get("teacher")),
        "epochs": content["loops"]["fit_loop"]["epoch_progress"]["total"]["started"] if "loops" in content else None,
        "steps": content.get("global_step"),
        "seed": seeds[0] if seeds else None,
        "date": datetime.date.fromtimestamp(Path(checkpoint).stat().st_mtime).isoformat(),
        "settings": {k: v for k, v in settings.items() if k not in _NOT_SETTINGS | OF_THE_MACHINE and v is not None},
    }
    return {key: value for key, value in facts.items() if value is not None}


def _read(checkpoint: str | Path, name: str) -> Trained:
    """Read the checkpoint that an entry of that name is made of."""
    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture) or not is_ours(architecture):
        raise UnknownNameError(
            f"an entry is named <architecture>.<tag>, of this package or of a module of yours, not {name!r}",
            "" if timm.is_model(architecture) else "network",
            architecture,
        )
    if not TAG.fullmatch(tag):
        raise ConfigurationError(f"the tag of an entry must be of letters, digits and any of '_.-', not {tag!r}")
    if not is_checkpoint(str(checkpoint)):
        raise ConfigurationError(f"{str(checkpoint)!r} is no checkpoint: its name must end in .ckpt")
    trained = load_trained(checkpoint)
    if not hasattr(trained.network, "num_features"):
        raise ConfigurationError(f"{str(checkpoint)!r} is of a class that timm's registry lacks, which an entry needs")
    if not trained.mean:
        raise ConfigurationError(
            f"{str(checkpoint)!r} must say mean and std of its images: train on data that has them"
        )
    if trained.architecture != architecture:
        raise ConfigurationError(f"{str(checkpoint)!r} is of network {trained.architecture!r}, not of {architecture!r}")
    return trained


def export(
    checkpoint: str | Path, name: str, folder: str | Path = "zoo", dtype: str = "float32", **fields: Any
) -> Path:
    """Make a zoo entry of a Lightning checkpoint, with a card of what the run knows; nothing is measured.

    The weights are those that the checkpoint evaluates with: the moving average where there is one.

    Args:
        checkpoint: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`.
        name: timm name of the entry, ``<architecture>.<tag>``, with any tag.
        folder: Folder of the zoo.
        dtype: Type of the weights in the file, one of :data:`lightning_msnn.zoo.storing.DTYPES`; the network that
            loads them computes in float32.
        **fields: Further facts for ``config.json``, such as command, recipe, hardware and license; plain values.

    Returns:
        The folder of the entry.

    Raises:
        ConfigurationError: If the checkpoint cannot be read or is of another network, a weight is not finite or beyond
            the type, nothing receives spikes in int8, or the entry exists.
    """
    if own := sorted({"sha256", "weights"} & fields.keys()):
        raise ConfigurationError(f"{own[0]} must not be among the fields: the file of weights decides it")
    trained, target = _read(checkpoint, name), Path(folder) / name
    if target.exists():
        raise ConfigurationError(f"{target} exists: remove it to make the entry anew")
    architecture, _, tag = name.partition(".")
    weights = safetensors.torch.save(stored(trained.network, dtype, repr(str(checkpoint))), {"format": "pt"})
    trained.network.pretrained_cfg = default_cfg(  # type: ignore[assignment]
        trained.input_size, len(trained.class_names), getattr(trained.network, "arguments", None),
        mean=tuple(trained.mean), std=tuple(trained.std), architecture=architecture, tag=tag,
        license=fields.pop("license", None),
    )  # fmt: skip
    facts = {"sha256": hashlib.sha256(weights).hexdigest(), "weights": dtype, **_facts(trained, checkpoint), **fields}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
            made = Path(temporary) / name
            made.mkdir()
            (made / WEIGHTS_FILE).write_bytes(weights)
            save_config_for_hf(trained.network, made / CONFIG_FILE, {"label_names": trained.class_names, FACTS: facts})
            write_card(made)
            made.rename(target)
    except OSError as error:
        raise ConfigurationError(f"cannot write to the folder {str(folder)!r}: {error.strerror}") from error
    return target


def measure(
    entry: str | Path, data: str | Path | LightningDataModule | None = None, device: str | torch.device | None = None
) -> dict[str, Any]:
    """Measure an entry on its test set, and write figures, picture and card into its folder.

    Args:
        entry: Name of the entry, in either spelling, or its folder.
        data: Folder of the data set; digits need none. Or the data module itself.
        device: Device to measure on.

    Returns:
        The figures, by the name that ``config.json`` has for them.

    Raises:
        ConfigurationError: If there is no such entry or data.
    """
    folder = entry if isinstance(entry, Path) else find(entry)
    config = read_config(folder)
    # In the memory format that entries are loaded in: another one rounds differently, which moves a few images.
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    found, summary = figures(config, network, test_data(folder, data), device)
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    modules = {"torch": torch, "torchvision": torchvision, "lightning": lightning, "timm": timm}
    versions = {"lightning_msnn": __version__, **{name: m.__version__.split("+")[0] for name, m in modules.items()}}
    content[FACTS] |= found | {"versions": versions}
    write_whole(f"{json.dumps(content, indent=2)}\n".encode(), folder / CONFIG_FILE)
    write_whole(png(draw_energy(summary)), folder / PICTURE)
    write_card(folder)
    return found
