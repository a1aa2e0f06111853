"""``torch.export``: a program that torch loads without this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.samples import facts
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.trained import Trained

__all__ = ["FACTS_FILE", "run", "write"]

FACTS_FILE = "lightning_msnn.json"
"""File inside a program that describes its images; ``torch.export.load(..., extra_files=...)`` reads it."""


def write(trained: Trained, file: Path, shape: torch.Size) -> None:
    """Write a network, folded, as a program of torch's own operators for any batch size.

    Args:
        trained: The network.
        file: The file, with the ending ``.pt2``.
        shape: Shape of one input.

    Raises:
        ConfigurationError: If torch cannot export the network.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batch = {0: torch.export.Dim("batch", min=1)}
            folded = fold_batch_norm(trained.network)
            program = torch.export.export(folded, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
        except Exception as error:  # whatever stops the exporter
            raise ConfigurationError(f"{trained.name} cannot be exported by torch: {brief(error)}") from error
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    if foreign := {operator.namespace for operator in operators} - {"aten", "prim"}:
        raise ConfigurationError(
            f"{trained.name} needs operators that torch does not have: {', '.join(sorted(foreign))}"
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the code
    torch.export.save(program, file, extra_files={FACTS_FILE: json.dumps(facts(trained), indent=2)})


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
        raise ConfigurationError(f"torch cannot read {file.name!r}: {brief(error)}") from error
    return module
