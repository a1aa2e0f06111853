"""Weights in safetensors with all that it takes to rebuild the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lightning_msnn.entries import dequantised
from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.source import Source
from lightning_msnn.models.registry import check_arguments, create_with, is_ours, own_arguments
from lightning_msnn.zoo.storing import stored

__all__ = ["load_weights", "run", "write"]


def _digest(state: Mapping[str, Tensor]) -> str:
    """Hash of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write the weights of a network.

    Args:
        source: The network.
        file: The file.
        shape: Not used; every format takes the same arguments.
        dtype: One of :data:`lightning_msnn.zoo.storing.DTYPES`.

    Raises:
        ConfigurationError: As :func:`lightning_msnn.zoo.storing.stored`.
    """
    state = stored(source.network, dtype, source.name)
    facts = source.facts() | {"arguments": json.dumps(dict(source.arguments)), "dtype": dtype}
    file.write_bytes(safetensors.torch.save(state, {"format": "pt", "sha256": _digest(state), **facts}))


def load_weights(file: str | Path) -> nn.Module:
    """Rebuild the network of a file of weights, in evaluation mode and float32.

    Args:
        file: A file of the format ``weights``, whatever its type.

    Raises:
        ConfigurationError: If it is no such file, is damaged, has a scale that is not a finite number above 0, or its
            weights are not those of the network that it names.
    """
    path = Path(file)
    try:
        with safetensors.safe_open(path, "pt") as opened:
            facts = opened.metadata() or {}
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigurationError(f"{str(path)!r} is not a safetensors file: {error}") from error
    try:
        architecture, expected, arguments = facts["architecture"], facts["sha256"], json.loads(facts["arguments"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r} does not say what network it is of: give a file of lightning-msnn export --to weights"
        ) from error
    state = dequantised(stored, repr(str(path)))
    if _digest(stored) != expected:
        raise ConfigurationError(f"{str(path)!r} is damaged: its weights are not those that were written")
    if not timm.is_model(architecture) or not is_ours(architecture) or not isinstance(arguments, dict):
        raise ConfigurationError(
            f"{str(path)!r} is of network {architecture!r}, which is refused: allowed are "
            f"{', '.join(timm.list_models('msnn*'))} and networks of modules that you have imported"
        )
    check_arguments(arguments, own_arguments(architecture), repr(str(path)), state)
    try:
        network = create_with(architecture, arguments, state)
    except Exception as error:  # whatever the values in a file make torch raise
        reason = brief(error)
        raise ConfigurationError(f"{str(path)!r} does not fit network {architecture!r}: {reason}") from error
    return network.eval()


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a file of weights, a function from images to logits."""
    network: Callable[[Tensor], Tensor] = load_weights(file)
    return network
