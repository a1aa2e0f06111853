"""``torch.export``: a program that torch loads without this package."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.source import Source
from lightning_msnn.nn.folding import fold_batch_norm

__all__ = ["FACTS_FILE", "run", "trace", "write"]

FACTS_FILE = "lightning_msnn.json"
"""File inside a program with what is known of its images; ``torch.export.load(..., extra_files=...)`` reads it."""


def trace(source: Source, shape: torch.Size) -> torch.export.ExportedProgram:
    """Return a network, folded, as a program of torch's own operators for any batch size.

    Args:
        source: The network.
        shape: Shape of one input.

    Raises:
        ConfigurationError: If torch cannot export the network.
    """
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                fold_batch_norm(source.network), (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},)
            )
        except Exception as error:  # whatever stops the exporter
            reason = brief(error)
            raise ConfigurationError(f"{source.name} cannot be exported by torch: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the code
    foreign = {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prim")
    }
    if foreign:
        raise ConfigurationError(f"{source.name} needs operators that torch has not: {', '.join(sorted(foreign))}")
    return program


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write a network as a program.

    Args:
        source: The network.
        file: The file, with the ending ``.pt2``.
        shape: Shape of one input.
        dtype: ``"float32"``.

    Raises:
        ConfigurationError: If torch cannot export the network.
    """
    content = io.BytesIO()  # torch hides a full disk behind an error of its own
    facts = json.dumps(source.facts(), indent=2)
    torch.export.save(trace(source, shape), content, extra_files={FACTS_FILE: facts})
    file.write_bytes(content.getvalue())


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits.

    Args:
        file: A file that :func:`write` has written.

    Raises:
        ConfigurationError: If torch cannot read the file.
    """
    try:
        module: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    except Exception as error:  # whatever the bytes make torch raise
        reason = brief(error)
        raise ConfigurationError(f"torch cannot read {file.name!r}: {reason}") from error
    return module
