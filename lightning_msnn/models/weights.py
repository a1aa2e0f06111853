"""Zoo entries on disk: where they lie, what their ``config.json`` says, and weights read only if their hash is right.

An entry is a folder named as timm names the network, ``<architecture>.<tag>``, with ``model.safetensors`` and
``config.json``. Folders are looked for in ``$LIGHTNING_MSNN_ZOO``, in ``zoo/`` of a checkout and in the installed
package, in this order; the first that has a name wins. Weights that are not in the folder are fetched from the ``url``
in ``config.json``, if there is one, into the cache of ``torch.hub``.
"""

import hashlib
import http.client
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, suggestion

__all__ = [
    "CONFIG_FILE",
    "NUMBERS",
    "WEIGHTS_FILE",
    "entries",
    "find",
    "fitting",
    "read_config",
    "read_weights",
    "resolve",
    "warm_start",
    "zoo_folders",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

NUMBERS = {"projection": ("theta", "theta_logit"), "decay": ("tau", "logit")}
"""Numbers that arguments of a network give, by the module that holds them: their names where fixed and where learnt."""

_REQUIRED = {
    "architecture": str,
    "tag": str,
    "num_classes": int,
    "input_size": list,
    "mean": list,
    "std": list,
    "class_names": list,
    "network_kwargs": dict,
    "sha256": str,
}

_SCHEMES = ("https://", "http://", "file://")  # the hash, not the way, says what is trusted


def zoo_folders() -> list[Path]:
    """Return the folders that exist and may hold entries, first choice first."""
    package = Path(__file__).resolve().parents[1]
    folders = [package.parent / "zoo", package / "_zoo"]
    if environment := os.environ.get("LIGHTNING_MSNN_ZOO"):
        folders.insert(0, Path(environment))
    return [folder for folder in folders if folder.is_dir()]


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an entry.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If it is missing, is not JSON, or lacks a field.
    """
    file = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{folder} is not a zoo entry: it has no {CONFIG_FILE}") from error
    except (ValueError, RecursionError) as error:  # JSON, encoding, or lists in lists without end
        raise ConfigurationError(f"{file} is not JSON: {error}") from error
    for field, kind in _REQUIRED.items():
        if not isinstance(config, dict) or not isinstance(config.get(field), kind):
            raise ConfigurationError(f"{file} has no field {field!r} of type {kind.__name__}")
    shape, colours = config["input_size"], [*config["mean"], *config["std"]]
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        raise ConfigurationError(f"{file} has input_size {shape!r}, and [channels, height, width] is needed")
    if len(config["mean"]) != len(config["std"]) or not all(type(value) in (int, float) for value in colours):
        raise ConfigurationError(
            f"{file} has mean {config['mean']!r} and std {config['std']!r}, and numbers are needed"
        )
    if config["num_classes"] != len(config["class_names"]):
        raise ConfigurationError(
            f"{file} has num_classes {config['num_classes']}, but names {len(config['class_names'])} classes"
        )
    if f"{config['architecture']}.{config['tag']}" != folder.name:
        raise ConfigurationError(f"{file} is of {config['architecture']}.{config['tag']}, not of {folder.name}")
    url = config.get("url")
    if url is not None and not (isinstance(url, str) and url.startswith(_SCHEMES)):
        raise ConfigurationError(f"{file} has url {url!r}, and one that starts with {', '.join(_SCHEMES)} is needed")
    return config


def entries() -> dict[str, Path]:
    """Return the folders of all entries by timm name; a broken ``config.json`` is left out with a warning."""
    found: dict[str, Path] = {}
    for root in zoo_folders():
        for file in sorted(root.glob(f"*/{CONFIG_FILE}")):
            folder = file.parent
            if folder.name in found:
                continue
            try:
                read_config(folder)
            except ConfigurationError as error:
                warnings.warn(f"zoo entry left out: {error}", stacklevel=2)
                continue
            found[folder.name] = folder
    return found


def find(name: str) -> Path:
    """Return the folder of an entry; its name is timm's spelling ``<architecture>.<tag>``.

    Args:
        name: ``"msnn_resnet12.c100"`` or ``"msnn_resnet12_c100"``.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    known = entries()
    spellings = {entry.replace(".", "_"): folder for entry, folder in known.items()}
    if isinstance(name, str) and name.replace(".", "_") in spellings:
        return spellings[name.replace(".", "_")]
    raise ConfigurationError(
        f"unknown zoo entry {name!r}: allowed are {', '.join(known) or 'none'}{suggestion(str(name), known)}"
    )


def resolve(name: str) -> str:
    """Return timm's spelling ``<architecture>.<tag>`` of an entry's name.

    Args:
        name: ``"msnn_resnet12.c100"`` or ``"msnn_resnet12_c100"``.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return find(name).name


def _weights_file(folder: Path, config: dict[str, Any]) -> Path:
    """Return where the weights of an entry lie, after fetching them if they have to be."""
    file, url = folder / WEIGHTS_FILE, config.get("url")
    if url is None or file.exists():
        return file
    cached = Path(torch.hub.get_dir(), "checkpoints", f"{folder.name}-{config['sha256'][:16]}.safetensors")
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), config["sha256"])
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
            raise ConfigurationError(
                f"weights of {folder.name} are not at {file} and cannot be fetched from {url}: {error}"
            ) from error
    return cached


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an entry on the CPU after checking their hash.

    Args:
        folder: Folder of the entry.

    Returns:
        Tensors by name.

    Raises:
        ConfigurationError: If the file is missing and cannot be fetched, its sha256 is not the one in
            ``config.json``, or it is no safetensors file.
    """
    config = read_config(folder)
    expected = config["sha256"]
    file = _weights_file(folder, config)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"weights of {folder.name} cannot be read at {file}: {error.strerror}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise ConfigurationError(f"{file} is refused: its sha256 is {actual}, {CONFIG_FILE} says {expected}")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ConfigurationError(f"{file} is not a safetensors file: {error}") from error


def fitting(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those weights that a network has too, in the same shape.

    Args:
        weights: Tensors by name.
        state: Tensors of the network by name.
    """
    return {name: value for name, value in weights.items() if name in state and state[name].shape == value.shape}


def warm_start(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> int:
    """Give a network those weights of another that fit by name and shape, and leave the others as they are.

    The families differ in the token mixer alone, so stem, patch merging and channel mixers of one are a start for
    another; a network and its twin share all but the neurons. A theta or tau that is not learnt is an argument of the
    network, not a weight, and stays.

    Args:
        model: The network, changed in place.
        weights: Weights of the other by name.
        source: Where they are from, for the message.

    Returns:
        Number of the parameters that were taken over.

    Raises:
        ConfigurationError: If no parameter fits.
    """
    parameters = dict(model.named_parameters())
    arguments = tuple(f".{module}.{fixed}" for module, (fixed, _) in NUMBERS.items())
    mine = {name: value for name, value in model.state_dict().items() if not name.endswith(arguments)}
    fits = fitting(weights, mine)
    taken = sum(value.numel() for name, value in fits.items() if name in parameters)
    if not taken:
        raise ConfigurationError(f"no parameter of {source} fits {type(model).__name__} by name and shape")
    model.load_state_dict(fits, strict=False)
    return taken
