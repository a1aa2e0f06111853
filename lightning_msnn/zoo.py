"""The zoo: trained networks by name, verified by hash, and their export from a Lightning checkpoint.

>>> from lightning_msnn import zoo
>>> zoo.load("msnn_resnet12_tiny_digits").num_classes
10
"""

import hashlib
import json
import shutil
import tempfile
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn

from lightning_msnn.errors import ConfigurationError, suggestion
from lightning_msnn.models.backbone import MSNN, PRESETS
from lightning_msnn.models.weights import CONFIG_FILE, WEIGHTS_FILE, entries, read_config

__all__ = ["export", "info", "list_models", "load", "resolve", "transforms"]


def resolve(name: str) -> str:
    """Return timm's spelling ``<architecture>.<tag>`` of an entry's name.

    Args:
        name: ``"msnn_resnet12.c100"`` or ``"msnn_resnet12_c100"``.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    known = entries()
    spellings = {entry.replace(".", "_"): entry for entry in known}
    if isinstance(name, str) and name.replace(".", "_") in spellings:
        return spellings[name.replace(".", "_")]
    raise ConfigurationError(
        f"unknown zoo entry {name!r}: allowed are {', '.join(known) or 'none'}{suggestion(str(name), known)}"
    )


def list_models(filter: str = "*", pretrained: bool = True) -> list[str]:
    """List the networks of the zoo.

    Args:
        filter: Pattern of shell wildcards that a name must match.
        pretrained: List the entries with weights; else every registered architecture too.
    """
    names = list(entries())
    if not pretrained:
        names += timm.list_models("msnn*")
    return sorted(name for name in names if fnmatch(name, filter) or fnmatch(name.replace(".", "_"), filter))


def info(name: str) -> dict[str, Any]:
    """Return the ``config.json`` of an entry: its network, recipe and measured figures.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return read_config(entries()[resolve(name)])


def load(
    name: str,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a network of the zoo in eval mode.

    Args:
        name: Name of the entry, in either spelling.
        pretrained: Whether to load its weights, whose sha256 is checked.
        num_classes: Classes of a new read-out; by default the entry's own, with its weights.
        in_chans: Channels of the images; by default the entry's own. The stem is adapted as timm adapts its own.
        device: Device to move the network to.
        **kwargs: Further arguments of the network.

    Raises:
        ConfigurationError: If there is no such entry, its files are not what they should be, or an argument is not
            allowed.
    """
    model: nn.Module = timm.create_model(
        resolve(name), pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs
    )
    return model.eval().to(device)


def transforms(name: str) -> Any:
    """Return the preprocessing of an entry, a function from a PIL image to the network's input ``(C, H, W)``.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return create_transform(**resolve_data_config(timm.get_pretrained_cfg(resolve(name)).to_dict()))


def _pinned() -> dict[str, Any]:
    """Return the defaults that decide what a network computes, so that later ones leave an entry as it is."""
    free = {"mixer", "in_chans", "num_classes", "global_pool", "depths", "widths", "drop_rate", "drop_path_rate"}
    return {name: p.default for name, p in signature(MSNN).parameters.items() if name not in free}


def export(checkpoint: str | Path, name: str, folder: str | Path = "zoo", **fields: Any) -> Path:
    """Make a zoo entry of a Lightning checkpoint.

    The weights are those that the checkpoint evaluates with: the moving average where there is one.

    Args:
        checkpoint: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`.
        name: timm name of the entry, ``<architecture>.<tag>``.
        folder: Folder of the zoo.
        **fields: Further fields of ``config.json``, such as recipe and figures; plain values.

    Returns:
        The folder of the entry.

    Raises:
        ConfigurationError: If the checkpoint cannot be read or is of another network, or the entry exists.
    """
    from lightning_msnn.cli import read_checkpoint  # Lightning is needed to export, not to load

    content = read_checkpoint(checkpoint)
    hparams, data = content.get("hyper_parameters", {}), content.get("preprocessing", {})
    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture):
        raise ConfigurationError(f"an entry is named <architecture>.<tag>, not {name!r}")
    if hparams.get("network") != architecture or not data:
        raise ConfigurationError(
            f"{str(checkpoint)!r} is of network {hparams.get('network')!r}, not of {architecture!r}"
        )
    target = Path(folder) / name
    if target.exists():
        raise ConfigurationError(f"{target} exists: remove it to make the entry anew")
    given = dict(hparams.get("network_kwargs") or {})
    prefix = "network."
    state = {k[len(prefix) :]: v.contiguous() for k, v in content["state_dict"].items() if k.startswith(prefix)}
    weights = safetensors.torch.save(state, {"format": "pt"})
    config = {
        "architecture": architecture,
        "tag": tag,
        "num_classes": hparams["num_classes"],
        "input_size": [hparams["in_chans"], data["image_size"], data["image_size"]],
        "mean": data["mean"],
        "std": data["std"],
        "class_names": content["class_names"],
        "network_kwargs": _pinned() | PRESETS[given.pop("preset", "default")] | given,
        "sha256": hashlib.sha256(weights).hexdigest(),
        **fields,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        made = Path(temporary) / name
        made.mkdir()
        (made / WEIGHTS_FILE).write_bytes(weights)
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.move(made, target)
    return target
