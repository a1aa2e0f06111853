"""A zoo entry made of a Lightning checkpoint."""

import hashlib
import json
import shutil
import tempfile
from inspect import signature
from pathlib import Path
from typing import Any

import safetensors.torch
import timm

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.registry import PRESETS
from lightning_msnn.models.weights import CONFIG_FILE, WEIGHTS_FILE
from lightning_msnn.runs.checkpoints import network_state, read_checkpoint

__all__ = ["export"]


def _pinned() -> dict[str, Any]:
    """Return the defaults that decide what a network computes, so that later ones leave an entry as it is."""
    free = {"mixer", "in_chans", "num_classes", "global_pool", "depths", "widths", "drop_rate", "drop_path_rate"}
    return {name: p.default for name, p in signature(MSNN).parameters.items() if name not in free}


def export(checkpoint: str | Path, name: str, folder: str | Path = "zoo", half: bool = False, **fields: Any) -> Path:
    """Make a zoo entry of a Lightning checkpoint.

    The weights are those that the checkpoint evaluates with: the moving average where there is one.

    Args:
        checkpoint: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`.
        name: timm name of the entry, ``<architecture>.<tag>``.
        folder: Folder of the zoo.
        half: Whether to keep the weights in float16; the network that loads them still computes in float32.
        **fields: Further fields of ``config.json``, such as recipe and figures; plain values.

    Returns:
        The folder of the entry.

    Raises:
        ConfigurationError: If the checkpoint cannot be read or is of another network, a weight is beyond float16, or
            the entry exists.
    """
    content = read_checkpoint(checkpoint)
    hparams, data = content.get("hyper_parameters", {}), content.get("preprocessing", {})
    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture):
        raise ConfigurationError(f"an entry is named <architecture>.<tag>, not {name!r}")
    if str(hparams.get("network")).partition(".")[0] != architecture or not data:
        raise ConfigurationError(
            f"{str(checkpoint)!r} is of network {hparams.get('network')!r}, not of {architecture!r}"
        )
    target = Path(folder) / name
    if target.exists():
        raise ConfigurationError(f"{target} exists: remove it to make the entry anew")
    given = dict(hparams.get("network_kwargs") or {})
    given = PRESETS[given.pop("preset", "default")] | given | content.get("network_arguments", {})
    for stated in ("num_classes", "in_chans"):
        given.pop(stated, None)
    state = network_state(content)
    if half:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value.half()
                if not state[key].isfinite().all():
                    raise ConfigurationError(f"{key} of {str(checkpoint)!r} has values beyond float16")
    weights = safetensors.torch.save(state, {"format": "pt"})
    config = {
        "architecture": architecture,
        "tag": tag,
        "num_classes": hparams["num_classes"],
        "input_size": [hparams["in_chans"], data["image_size"], data["image_size"]],
        "mean": data["mean"],
        "std": data["std"],
        "class_names": content["class_names"],
        "network_kwargs": _pinned() | given,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "weights": "float16" if half else "float32",
    }
    # What it takes to make the entry includes what these took.
    origin = {"init_from": content.get("started_from"), "teacher": hparams.get("teacher")}
    config |= {key: name for key, name in origin.items() if name is not None}
    config |= fields
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        made = Path(temporary) / name
        made.mkdir()
        (made / WEIGHTS_FILE).write_bytes(weights)
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.move(made, target)
    return target
