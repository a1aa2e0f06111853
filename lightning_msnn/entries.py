"""Entries of the zoo on disk: their folders, what ``config.json`` says, and weights whose hash is checked.

An entry is a trained network in a folder named as timm names it, ``<architecture>.<tag>``, with ``model.safetensors``
and a ``config.json`` as timm writes it, so that ``timm.create_model("local-dir:<folder>")`` reads it too. Under
:data:`FACTS` it says what timm does not know: the hash of the weights, the data, how they were trained, measured
figures. Entries are looked for in ``$LIGHTNING_MSNN_ZOO``, in ``zoo/`` of a checkout and in the installed package; the
first with a name wins.
"""

import hashlib
import json
import os
import re
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
    "FACTS",
    "SCALE",
    "WEIGHTS_FILE",
    "dequantised",
    "entries",
    "find",
    "fitting",
    "is_entry",
    "read_config",
    "read_weights",
    "warm_start",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

FACTS = "lightning_msnn"
"""Key of ``config.json`` under which an entry says what timm does not know."""

SCALE = "_scale"
"""Suffix of a weight's name that gives the name of its scales, where the weight has 8 bits."""

TAG = re.compile(r"\w[\w.-]*", re.ASCII)

_FIELDS: dict[str, type] = {
    "architecture": str, "num_classes": int, "label_names": list, "model_args": dict, "tag": str, "input_size": list,
    "mean": list, "std": list, "sha256": str,
}  # fmt: skip
"""What every ``config.json`` has, at its top, in timm's ``pretrained_cfg`` or under :data:`FACTS`."""


def _roots() -> list[Path]:
    """The folders that hold entries, first choice first."""
    package = Path(__file__).resolve().parent
    given = os.environ.get("LIGHTNING_MSNN_ZOO")
    own = [folder for folder in (package.parent / "zoo", package / "_zoo") if folder.is_dir()]
    return [*([Path(given)] if given else []), *own]


def entries() -> dict[str, Path]:
    """Return the folders of all entries by timm name. It reads the names of folders and opens no file."""
    found: dict[str, Path] = {}
    for root in _roots():
        for file in sorted(root.glob(f"*.*/{CONFIG_FILE}")):
            found.setdefault(file.parent.name, file.parent)
    return found


def find(name: str) -> Path:
    """Return the folder of an entry.

    Args:
        name: ``"msnn_resnet12.c100"``, as timm spells it, or ``"msnn_resnet12_c100"``.

    Raises:
        ConfigurationError: If there is no such entry, or several in the second spelling.
    """
    known = entries()
    alike = [x for x in known if x == name] or [x for x in known if x.replace(".", "_") == str(name).replace(".", "_")]
    if len(alike) == 1:
        return known[alike[0]]
    if alike:
        raise ConfigurationError(f"the zoo has several entries {name!r}: give one of {', '.join(alike)}")
    raise ConfigurationError(
        f"unknown zoo entry {name!r} in {', '.join(map(str, _roots()))}: "
        f"lightning-msnn zoo list names all{suggestion(str(name), known)}"
    )


def _content(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        if file.stat().st_size > 2**24:
            raise ValueError("it is larger than 16 MiB")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{folder} is not a zoo entry: {CONFIG_FILE}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def is_entry(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is an entry's, not one that timm alone has written."""
    return FACTS in _content(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an entry.

    Args:
        folder: Folder of the entry.

    Returns:
        ``architecture``, ``tag``, ``num_classes``, ``class_names``, ``input_size``, ``mean``, ``std``, ``model_args``,
        ``license`` if it has one, and the facts, in one dictionary.

    Raises:
        ConfigurationError: If it is missing, is not JSON, or lacks a field or has one of another type or length.
    """
    file, content = folder / CONFIG_FILE, _content(folder)
    timms, facts = content.get("pretrained_cfg"), content.get(FACTS)
    timms, facts = (part if isinstance(part, dict) else {} for part in (timms, facts))
    said = {**facts, **timms, **content}
    for field, kind in _FIELDS.items():
        if not isinstance(said.get(field), kind):
            raise ConfigurationError(f"{file} has no field {field!r} of type {kind.__name__}")
    own = {field: said[field] for field in _FIELDS}
    channels = own["input_size"][0] if own["input_size"] else 0
    lengths = {"input_size": 3, "mean": channels, "std": channels, "label_names": own["num_classes"]}
    for field, length in lengths.items():
        if len(own[field]) != length:
            raise ConfigurationError(f"{file} has {field} of length {len(own[field])}, and {length!r} is needed")
    for field in ("tag", "sha256"):  # parts of file names
        if not TAG.fullmatch(own[field]):
            raise ConfigurationError(f"{file} has {field} {own[field]!r}: letters, digits and '_-.' are allowed")
    own["class_names"] = own.pop("label_names")
    if isinstance(licence := timms.get("license"), str):
        own["license"] = licence
    return {**facts, **own}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an entry on the CPU after checking their hash.

    Args:
        folder: Folder of the entry.

    Returns:
        Tensors by name; what is stored in 16 or 8 bits is float32.

    Raises:
        ConfigurationError: If the file is missing, has another sha256 than ``config.json`` says, or is no safetensors.
    """
    config, file = read_config(folder), folder / WEIGHTS_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"weights of {folder.name} cannot be read at {file}: {error.strerror}; a wheel leaves out those of "
            "msnn_rnn12.c10, msnn_rnn12.c100, msnn_resnet9.c100_relu and msnn_resnet12.c100_relu_whitened: "
            "set LIGHTNING_MSNN_ZOO to the folder zoo of a checkout"
        ) from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != config["sha256"]:
        raise ConfigurationError(f"{file} is refused: its sha256 is {actual}, {CONFIG_FILE} says {config['sha256']}")
    try:
        state = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a type that torch has not
        raise ConfigurationError(f"{file} is not a safetensors file: {error}") from error
    return dequantised(state, file)


def dequantised(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return weights in float32; a weight in 8 bits is multiplied by the scales of its output channels.

    Args:
        state: Tensors by name; the scales of an int8 weight have its name with :data:`SCALE` after it.
        source: Where they are from, for the message.

    Raises:
        ConfigurationError: If scales are missing, or not one for each output channel.
    """
    scales = {name + SCALE: name for name, value in state.items() if value.dtype == torch.int8}
    made = {n: v.float() if v.is_floating_point() else v for n, v in state.items() if n not in scales}
    for key, name in scales.items():
        if key not in state or state[key].shape != state[name].shape[:1]:
            raise ConfigurationError(f"{source} is refused: {name} has 8 bits, and no scale for each output channel")
        made[name] = state[name].float() * state[key].view(-1, *[1] * (state[name].dim() - 1))
    return made


def fitting(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that have the name and shape of a tensor in a network's state."""
    return {name: value for name, value in weights.items() if name in state and state[name].shape == value.shape}


def warm_start(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> int:
    """Give a network those weights of another that fit by name and shape.

    The families differ in the token mixer alone, so one starts from the stem, patch merging and channel mixers of
    another; a network and its ReLU baseline share all but the neurons. A theta or tau that is not learnt is an argument
    of the network, not a weight, and stays.

    Args:
        model: The network, changed in place.
        weights: Weights of the other by name.
        source: Where they are from, for the message.

    Returns:
        Number of parameters taken over.

    Raises:
        ConfigurationError: If no parameter fits.
    """
    fixed = (".projection.theta", ".decay.tau")
    fits = fitting(weights, {name: value for name, value in model.state_dict().items() if not name.endswith(fixed)})
    taken = sum(value.numel() for name, value in model.named_parameters() if name in fits)
    if not taken:
        raise ConfigurationError(f"no parameter of {source} fits {type(model).__name__} by name and shape")
    model.load_state_dict(fits, strict=False)
    return taken
