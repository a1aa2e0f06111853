"""Zoo entries on disk: where they lie, what their ``config.json`` says, and weights read only if their hash is right.

An entry is a folder named as timm names the network, ``<architecture>.<tag>``, with ``model.safetensors`` and a
``config.json`` as timm writes it, so that ``timm.create_model("local-dir:<folder>")`` reads it too. Under
:data:`FACTS` it has what timm does not know: the hash of the weights, the data, how they were made, measured figures.
Folders are looked for in ``$LIGHTNING_MSNN_ZOO``, in ``zoo/`` of a checkout and in the installed package, in this
order; the first that has a name wins. Weights that are not in the folder are fetched from the ``url`` among the facts,
if there is one, into the cache of ``torch.hub``.
"""

import hashlib
import http.client
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
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
    "NUMBERS",
    "SCALE",
    "WEIGHTS_FILE",
    "dequantise_own",
    "dequantised",
    "entries",
    "find",
    "fitting",
    "is_entry",
    "read_config",
    "read_weights",
    "resolve",
    "warm_start",
    "zoo_folders",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

FACTS = "lightning_msnn"
"""Key of ``config.json`` under which an entry says what timm does not know."""

NUMBERS = {"projection": ("theta", "theta_logit"), "decay": ("tau", "logit")}
"""Numbers that arguments of a network give, by the module that holds them: their names where fixed and where learnt."""

SCALE = "_scale"
"""What the name of a weight in 8 bits is followed by in the name of its scales."""

_REQUIRED: dict[tuple[str, ...], dict[str, type]] = {
    (): {"architecture": str, "num_classes": int, "label_names": list, "model_args": dict, "pretrained_cfg": dict},
    ("pretrained_cfg",): {"tag": str, "input_size": list, "mean": list, "std": list},
    (FACTS,): {"sha256": str},
}

_OPTIONAL: dict[str, tuple[type | tuple[type, ...], str]] = {
    "a number of at least 0": (
        (int, float),
        "top1* parameters time_steps spike_rate accumulates multiply_accumulates energy_joules* energy_images top5 "
        "epochs steps seed",
    ),
    "text": (
        str,
        "weights command* recipe hardware date data_licence notes init_from teacher energy_sampling url",
    ),
    "an object": (dict, "data settings versions"),
    "a list": (list, "logits_of_fixed_images"),
}
"""Facts that an entry may have: what each must be, and patterns of their names."""

TAG = re.compile(r"\w[\w.-]*", re.ASCII)

_SHA256 = re.compile("[0-9a-f]{64}")

_SCHEMES = ("https://", "http://", "file://")  # the hash, not the way, says what is trusted

_LARGEST = 1e30
"""A bound of all numbers, so that none overflows."""

_MAX_BYTES = 2**24
"""Bytes of a ``config.json`` beyond which it is not read."""


def zoo_folders() -> list[Path]:
    """Return the folders that may hold entries, first choice first; the environment's even if it is not there."""
    package = Path(__file__).resolve().parents[1]
    folders = [folder for folder in (package.parent / "zoo", package / "_zoo") if os.path.isdir(folder)]
    if environment := os.environ.get("LIGHTNING_MSNN_ZOO"):
        folders.insert(0, Path(environment))
    return folders


def _own() -> str:
    """The folder that the environment names, as it is among those above."""
    return str(Path(os.environ.get("LIGHTNING_MSNN_ZOO", "")))


def _content(folder: Path) -> Any:
    """Read the JSON of a ``config.json``."""
    file = folder / CONFIG_FILE
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:  # a pipe would never end
            raise OSError(0, "no file of at most 16 MiB")
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{folder} is not a zoo entry: it has no {CONFIG_FILE}") from error
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSON, encoding, or lists in lists without end
        raise ConfigurationError(f"{file} is not JSON: {error}") from error


def is_entry(folder: Path) -> bool:
    """Whether a folder is an entry of ours, and not one that timm alone has written.

    Raises:
        ConfigurationError: If its ``config.json`` cannot be read.
    """
    content = _content(folder)
    return isinstance(content, dict) and FACTS in content


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an entry.

    Args:
        folder: Folder of the entry.

    Returns:
        ``architecture``, ``tag``, ``num_classes``, ``class_names``, ``input_size``, ``mean``, ``std``, ``model_args``,
        ``license`` if it has one, and the facts, in one dictionary.

    Raises:
        ConfigurationError: If it is missing, is not JSON, or lacks a field or has one of another type.
    """
    file, content = folder / CONFIG_FILE, _content(folder)
    for path, fields in _REQUIRED.items():
        part = content
        for key in path:
            part = part.get(key)
        for field, kind in fields.items():
            if not isinstance(part, dict) or not isinstance(part.get(field), kind) or isinstance(part[field], bool):
                raise ConfigurationError(f"{file} has no field {'.'.join((*path, field))!r} of type {kind.__name__}")
    cfg, facts, names = content["pretrained_cfg"], content[FACTS], content["label_names"]
    for allowed, (kinds, optional) in _OPTIONAL.items():
        for field, value in facts.items():
            if not any(fnmatchcase(field, pattern) for pattern in optional.split()):
                continue
            in_range = not isinstance(value, int | float) or (0 <= value < _LARGEST and not isinstance(value, bool))
            if not isinstance(value, kinds) or not in_range:
                raise ConfigurationError(f"{file} has {field} {value!r}, and {allowed} is needed")
    shape, colours = cfg["input_size"], [*cfg["mean"], *cfg["std"]]
    if len(shape) != 3 or not all(type(side) is int and 0 < side < 2**16 for side in shape):
        raise ConfigurationError(f"{file} has input_size {shape!r}, and [channels, height, width] is needed")
    numbers = all(type(value) in (int, float) and abs(value) < _LARGEST for value in colours) and 0 not in cfg["std"]
    if not numbers or not len(cfg["mean"]) == len(cfg["std"]) == shape[0]:
        raise ConfigurationError(
            f"{file} has mean {cfg['mean']!r} and std {cfg['std']!r}, and a number for each of {shape[0]} channels "
            "is needed"
        )
    if content["num_classes"] != len(names) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{file} has num_classes {content['num_classes']}, but names {len(names)} classes")
    if not TAG.fullmatch(cfg["tag"]):
        raise ConfigurationError(f"{file} has tag {cfg['tag']!r}, and letters, digits, '_', '-' and '.' are allowed")
    if not _SHA256.fullmatch(facts["sha256"]):
        raise ConfigurationError(f"{file} has sha256 {facts['sha256']!r}, and 64 hexadecimal digits are needed")
    url = facts.get("url")
    if url is not None and not url.startswith(_SCHEMES):
        raise ConfigurationError(f"{file} has url {url!r}, and one that starts with {', '.join(_SCHEMES)} is needed")
    own = {key: content[key] for key in ("architecture", "num_classes", "model_args")}
    own |= {key: cfg[key] for key in ("tag", "input_size", "mean", "std")}
    if isinstance(cfg.get("license"), str):
        own["license"] = cfg["license"]
    return {**facts, **own, "class_names": names}


def _may_be_entry(folder: Path) -> bool:
    try:
        os.lstat(folder / CONFIG_FILE)
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)
    return True


def _scan() -> tuple[dict[str, Path], dict[str, ConfigurationError]]:
    """Look for entries: their folders, and what is wrong with those that cannot be read, by timm name.

    Of several folders with entries of one name the first counts, also if that entry cannot be read.
    """
    found: dict[str, Path] = {}
    broken: dict[str, ConfigurationError] = {}
    for root in zoo_folders():
        try:
            folders = sorted(folder for folder in root.iterdir() if _may_be_entry(folder))
        except OSError as error:
            said = "LIGHTNING_MSNN_ZOO: " if str(root) == _own() else ""
            broken[str(root)] = ConfigurationError(f"{said}folder {str(root)!r} cannot be read: {error.strerror}")
            continue
        for folder in folders:
            if folder.name in found or folder.name in broken:
                continue
            try:
                config = read_config(folder)
                name = f"{config['architecture']}.{config['tag']}"
                if name != folder.name:
                    raise ConfigurationError(f"{folder / CONFIG_FILE} is of {name}, not of {folder.name}")
            except ConfigurationError as error:
                broken[folder.name] = error
                continue
            found[folder.name] = folder
    return found, broken


def entries() -> dict[str, Path]:
    """Return the folders of all entries by timm name; what cannot be read is left out with a warning."""
    found, broken = _scan()
    for error in broken.values():
        warnings.warn(f"left out of the zoo: {error}", stacklevel=2)
    return found


def find(name: str) -> Path:
    """Return the folder of an entry; its name is timm's spelling ``<architecture>.<tag>``.

    Args:
        name: ``"msnn_resnet12.c100"`` or ``"msnn_resnet12_c100"``.

    Raises:
        ConfigurationError: If there is no such entry, or it cannot be read, or ``$LIGHTNING_MSNN_ZOO`` cannot.
    """
    known, broken = _scan()
    if error := broken.get(_own()):
        raise error
    there = (*known, *broken)
    alike = [x for x in there if isinstance(name, str) and x.replace(".", "_") == name.replace(".", "_")]
    if len(alike) > 1 and name not in alike:
        raise ConfigurationError(f"the zoo has several entries {name!r}: give one of {', '.join(alike)}")
    for entry in [name] if name in alike else alike:
        if entry in known:
            return known[entry]
        raise broken[entry]
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
        Tensors by name; those that are stored in 16 or 8 bits are float32.

    Raises:
        ConfigurationError: If the file is missing and cannot be fetched, its sha256 is not the one in
            ``config.json``, it is no safetensors file, a weight is not finite, or a scale of weights in 8 bits is not
            allowed.
    """
    config = read_config(folder)
    expected = config["sha256"]
    file = _weights_file(folder, config)
    try:
        if file.exists() and not file.is_file():
            raise OSError(0, "no file")
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"weights of {folder.name} cannot be read at {file}: {error.strerror}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise ConfigurationError(f"{file} is refused: its sha256 is {actual}, {CONFIG_FILE} says {expected}")
    try:
        state = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a type that torch has not
        raise ConfigurationError(f"{file} is not a safetensors file: {error}") from error
    return dequantised(state, file)


def dequantised(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return weights in float32; those in 8 bits are integers times the scale of their output channel.

    Args:
        state: Tensors by name. With each of int8, one whose name ends with :data:`SCALE` has a scale for each output
            channel, float32.
        source: Where they are from, for the message.

    Raises:
        ConfigurationError: If a weight is not finite, or a scale is missing, of another shape, not finite, or not
            above 0.
    """
    made, scales = {}, {name + SCALE for name, value in state.items() if value.dtype == torch.int8}
    for name, value in state.items():
        if value.dtype == torch.int8:
            scale = state.get(name + SCALE)
            fits = scale is not None and scale.dtype == torch.float32 and scale.shape == value.shape[:1] != ()
            if scale is None or not fits or not bool(((scale > 0) & (scale * 128).isfinite()).all()):
                raise ConfigurationError(
                    f"{source} is refused: {name} has 8 bits, and a finite scale above 0 is needed for each of its "
                    "output channels"
                )
            made[name] = value.float() * scale.view(-1, *[1] * (value.dim() - 1))
        elif name not in scales:
            made[name] = value.float() if value.is_floating_point() else value
            if not made[name].isfinite().all():
                raise ConfigurationError(f"{source} is refused: {name} has values that are not finite")
    return made


def dequantise_own(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Put floats in the place of a module's weights that a state dict has in 8 bits, unless the module has them so too.

    Args:
        module: What is about to load the state dict.
        state: The state dict, changed in place.
        prefix: What its names begin with.

    Raises:
        ConfigurationError: As :func:`dequantised`.
    """
    own = (prefix + name for name, value in module.named_parameters() if value.is_floating_point())
    names = [name for name in own if name in state and state[name].dtype == torch.int8]
    pairs = {key: state.pop(key) for name in names for key in (name, name + SCALE) if key in state}
    state |= dequantised(pairs, "the state_dict")


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
