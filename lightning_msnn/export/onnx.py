"""ONNX: batch norm folded, any batch size, standard operators alone, metadata inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.samples import facts
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.trained import Trained

__all__ = ["OPSET", "run", "write"]

OPSET = 18
"""Version of ONNX's operators; runtimes from 2023 on know it."""


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch exports with it
    except ImportError as error:
        raise ConfigurationError(
            f"onnx needs onnx, onnxscript and onnxruntime ({error}): pip install 'lightning-msnn[export]'"
        ) from error
    return onnx, onnxruntime


def write(trained: Trained, file: Path, shape: torch.Size) -> None:
    """Write a network as ONNX, from input ``image`` ``(batch, *shape)`` to output ``logits`` ``(batch, classes)``.

    Args:
        trained: The network.
        file: The file.
        shape: Shape of one input.

    Raises:
        ConfigurationError: If a package is missing, or the network has an operation that ONNX does not have.
    """
    onnx, _ = _packages()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                fold_batch_norm(trained.network),
                (torch.zeros(2, *shape),),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
        except Exception as error:  # whatever stops the exporter
            reason = brief(error.__cause__ or error)
            raise ConfigurationError(f"{trained.name} cannot be written as ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    _strip(model)
    for key, value in facts(trained).items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.doc_string = "lightning_msnn", f"{trained.name}: {trained.architecture}"
    onnx.checker.check_model(model)
    if foreign := {node.domain for node in _nodes(model)} - {"", "ai.onnx"}:
        raise ConfigurationError(f"{trained.name} needs operators that ONNX lacks: {', '.join(sorted(foreign))}")
    file.write_bytes(model.SerializeToString())


def _nodes(model: Any) -> list[Any]:
    """Return the nodes of a model, of its functions and of the graphs inside loops and branches."""
    found = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in found:  # which grows
        for attribute in node.attribute:
            found += [inner for graph in (attribute.g, *attribute.graphs) for inner in graph.node]
    return found


def _strip(model: Any) -> None:
    """Remove the exporter's notes for debugging: lines and paths of the code."""
    graph = model.graph
    for noted in (*_nodes(model), *graph.value_info, *graph.input, *graph.output, *graph.initializer, graph, model):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that onnxruntime computes.

    Args:
        file: A file that :func:`write` has written.

    Raises:
        ConfigurationError: If a package is missing, or onnxruntime cannot read the file.
    """
    _, onnxruntime = _packages()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise ConfigurationError(f"onnxruntime cannot read {file.name!r}: {brief(error)}") from error

    def logits(images: Tensor) -> Tensor:
        found = session.run(["logits"], {"image": np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(np.asarray(found))

    return logits
