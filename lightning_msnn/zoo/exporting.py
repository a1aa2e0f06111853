"""A zoo entry made of a Lightning checkpoint, and its figures measured."""

import datetime
import hashlib
import json
import shutil
import tempfile
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
from lightning_msnn.energy.pictures import draw_energy, png
from lightning_msnn.entries import CONFIG_FILE, FACTS, TAG, WEIGHTS_FILE, find, read_config
from lightning_msnn.errors import ConfigurationError, UnknownNameError
from lightning_msnn.models.registry import default_cfg, is_ours
from lightning_msnn.runs.checkpoints import network_of, read_checkpoint
from lightning_msnn.zoo.card import OF_A_FILE, PICTURE, write_card
from lightning_msnn.zoo.storing import stored
from lightning_msnn.zoo.verification import BATCH, figures, test_data

__all__ = ["export", "measure"]

_NOT_SETTINGS = {
    *("network", "num_classes", "in_chans", "network_kwargs", "pretrained", "init_from", "teacher", "seed"),
    *("root", "folder", "download", "num_workers", "pin_memory"),
}
"""Hyper-parameters that an entry says elsewhere, or that are of the machine."""

_OF_TRAINING = {"batch_size", "val_fraction", "seed"}
"""Arguments of data that say nothing of what a network is given in a test."""


def _public(source: str | None) -> str | None:
    """Return the name of an entry or of a network; of a checkpoint, which is a file of the machine, that it is one."""
    return OF_A_FILE if source is not None and source.endswith(".ckpt") else source


def _run(content: dict[str, Any], checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint knows of the run that wrote it."""
    hparams, data = content.get("hyper_parameters", {}), content.get("datamodule_hyper_parameters") or {}
    name = str(content["preprocessing"].get("data"))
    of_data: dict[str, Any]
    if name in data_sets.__all__:
        name = f"{data_sets.__name__}.{name}"
    seeds = [part["shuffle_seed"] for part in content.values() if isinstance(part, dict) and "shuffle_seed" in part]
    settings = {key: v for key, v in {**data, **hparams}.items() if key not in _NOT_SETTINGS and v is not None}
    if hparams.get("teacher") is None:
        settings = {key: v for key, v in settings.items() if not key.startswith("teacher_")}
    kind, of_data = getattr(data_sets, name.rpartition(".")[2], None), {"class_path": name}
    if isinstance(kind, type) and issubclass(kind, data_sets.ArrayDataModule):  # images have a size, and no more
        init_args = kind.arguments_from(data, None)
        of_data["init_args"] = {key: v for key, v in init_args.items() if key not in _OF_TRAINING and v is not None}
    facts = {
        "data": of_data,
        # What it takes to make the entry includes what these took.
        "init_from": _public(content.get("started_from")),
        "teacher": _public(hparams.get("teacher")),
        "epochs": content["loops"]["fit_loop"]["epoch_progress"]["total"]["started"] if "loops" in content else None,
        "steps": content.get("global_step"),
        "seed": seeds[0] if seeds else None,
        "date": datetime.date.fromtimestamp(Path(checkpoint).stat().st_mtime).isoformat(),
        "settings": settings,
    }
    return {key: value for key, value in facts.items() if value is not None}


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
        **fields: Further facts for ``config.json``, such as command, recipe and hardware; plain values.

    Returns:
        The folder of the entry.

    Raises:
        ConfigurationError: If the checkpoint cannot be read or is of another network, a weight is not finite or
            beyond float16, nothing receives spikes in int8, a field is not allowed or of its type, or the entry
            exists.
    """
    if own := sorted({"sha256", "weights"} & fields.keys()):
        raise ConfigurationError(f"{own[0]} must not be among the fields: it is what the file of weights says")
    content = read_checkpoint(checkpoint)
    seen = content.get("preprocessing")
    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture) or not is_ours(architecture):
        raise UnknownNameError(
            f"an entry is named <architecture>.<tag>, not {name!r}",
            "" if timm.is_model(architecture) else "network",
            architecture,
        )
    network_name = content.get("hyper_parameters", {}).get("network")
    if "season" in content.get("hyper_parameters", {}):
        raise ConfigurationError(f"{str(checkpoint)!r} is of a forecaster, not of a classifier, as entries are")
    if str(network_name).partition(".")[0] != architecture or not seen:
        raise ConfigurationError(f"{str(checkpoint)!r} is of network {network_name!r}, not of {architecture!r}")
    if not TAG.fullmatch(tag):
        raise ConfigurationError(f"the tag of an entry must be of letters, digits and any of '_.-', not {tag!r}")
    target = Path(folder) / name
    if target.exists():
        raise ConfigurationError(f"{target} exists: remove it to make the entry anew")
    network = network_of(content, checkpoint)
    weights = safetensors.torch.save(stored(network, dtype, repr(str(checkpoint))), {"format": "pt"})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write to the folder {str(folder)!r}: {error.strerror}") from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        made = Path(temporary) / name
        made.mkdir()
        (made / WEIGHTS_FILE).write_bytes(weights)
        try:
            size, mean, std = seen["image_size"], tuple(seen["mean"]), tuple(seen["std"])
            height, width = (size, size) if isinstance(size, int) else size
            network.pretrained_cfg = default_cfg(  # type: ignore[assignment]
                height, len(content["class_names"]), len(mean), input_size=(len(mean), height, width), mean=mean,
                std=std, architecture=architecture, tag=tag,
            )  # fmt: skip
            facts = {
                "sha256": hashlib.sha256(weights).hexdigest(),
                "weights": dtype,
                **_run(content, checkpoint),
                **fields,
            }
            save_config_for_hf(network, made / CONFIG_FILE, {"label_names": content["class_names"], FACTS: facts})
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ConfigurationError(f"{str(checkpoint)!r} does not say what images it is for: {reason}") from error
        write_card(made)
        shutil.move(made, target)
    return target


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "torchvision": torchvision, "lightning": lightning, "timm": timm}
    return {"lightning_msnn": __version__, **{name: m.__version__.split("+")[0] for name, m in modules.items()}}


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
    # In the memory format that entries are loaded in: another one rounds otherwise, which moves a few images.
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    found, summary = figures(config, network, test_data(config, data, BATCH), device)
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    content[FACTS] |= found | {"versions": _versions()}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / PICTURE).write_bytes(png(draw_energy(summary)))
    write_card(folder)
    return found
