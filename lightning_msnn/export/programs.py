"""Programs for any batch size, batch norm folded, that say what images they take: ONNX and ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_msnn.export.samples import facts
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.trained import Trained

__all__ = ["FACTS_FILE", "OPSET", "run_onnx", "run_torch", "write_onnx", "write_torch"]

FACTS_FILE = "lightning_msnn.json"
"""File inside a program that describes its images; ``torch.export.load(..., extra_files=...)`` reads it."""

OPSET = 18
"""Version of ONNX's operators; runtimes from 2023 on know it."""


@torch.no_grad()
def _program(trained: Trained, shape: torch.Size) -> torch.export.ExportedProgram:
    """Return the network, folded, as a program of torch's own operators."""
    batch = {0: torch.export.Dim("batch", min=1)}
    folded = fold_batch_norm(trained.network)
    program = torch.export.export(folded, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the code
    return program


def write_torch(trained: Trained, file: Path, shape: torch.Size) -> None:
    """Write a network as a program of torch, file ``.pt2``."""
    torch.export.save(_program(trained, shape), file, extra_files={FACTS_FILE: json.dumps(facts(trained), indent=2)})


def run_torch(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits of a file that :func:`write_torch` has written."""
    run: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return run


def write_onnx(trained: Trained, file: Path, shape: torch.Size) -> None:
    """Write a network as ONNX, from input ``image`` ``(batch, *shape)`` to output ``logits`` ``(batch, classes)``."""
    import onnx
    import onnxscript  # noqa: F401  # torch exports with it

    program = torch.onnx.export(
        _program(trained, shape),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
    )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    # The exporter's notes for debugging: lines and paths of the code.
    for noted in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, graph, model):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    for key, value in facts(trained).items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.doc_string = "lightning_msnn", f"{trained.name}: {trained.architecture}"
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())


def run_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that onnxruntime computes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        found = session.run(["logits"], {"image": np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(np.asarray(found))

    return logits
