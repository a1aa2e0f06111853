"""ONNX: batch norm folded, any batch size, standard operators alone, metadata inside; in floats or integers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.source import Source
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import IntegerConv2d, quantised, to_integers

__all__ = ["OPSET", "run", "write"]

_ZEROS = {"zero_of_spikes": np.uint8(0).reshape(()), "zero_of_weights": np.uint8(128).reshape(())}
"""Zero points of ``ConvInteger``."""

OPSET = 18
"""Version of ONNX's operators; runtimes from 2023 on know it."""


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # by which torch exports
    except ImportError as error:
        raise ConfigurationError(
            f"onnx needs onnx, onnxscript and onnxruntime ({error}): pip install 'lightning-msnn[export]'"
        ) from error
    return onnx, onnxruntime


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write a network as ONNX, from input ``image`` ``(batch, *shape)`` to output ``logits`` ``(batch, classes)``.

    Args:
        source: The network.
        file: The file.
        shape: Shape of one input.
        dtype: ``"float32"``, or ``"int8"`` for synapses that add up integers, see :func:`to_integers`.

    Raises:
        ConfigurationError: If a package is missing, the network has an operation that ONNX has not, or integers are
            not for it.
    """
    onnx, _ = _packages()
    folded = fold_batch_norm(source.network)
    integers = _round(folded, to_integers(source.network)) if dtype == "int8" else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                folded,
                (torch.zeros(2, *shape),),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
        except Exception as error:  # whatever stops the exporter
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ConfigurationError(f"{source.name} cannot be written as ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    _tidy(model)
    if integers:
        _add_up_integers(onnx, model.graph, integers)
    for key, value in source.facts().items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.doc_string = "lightning_msnn", f"{source.name}: {source.architecture}"
    onnx.checker.check_model(model)
    foreign = {node.domain for node in _nodes(model)} - {"", "ai.onnx"}
    if foreign:
        raise ConfigurationError(f"{source.name} needs operators that ONNX has not: {', '.join(sorted(foreign))}")
    file.write_bytes(model.SerializeToString())


def _round(folded: nn.Module, integer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the weights of a folded network that are integers in another.

    Returns:
        Integers and scales by their names, of convolutions; linear layers, of converted networks, add up the same in
        float32.
    """
    found = {}
    for name, module in integer.named_modules():
        label = f"{name}.conv" if getattr(module, "fires", False) else name  # neurons are part of it
        if isinstance(module, IntegerConv2d):
            layer: Any = folded.get_submodule(label)
            whole, scale = quantised(layer.weight)
            layer.weight.data = whole * scale.view(-1, *[1] * (whole.dim() - 1))
            if isinstance(layer, nn.Conv2d):
                found[f"{label}.weight"] = whole, scale
    if not found:
        raise ConfigurationError("int8 in ONNX is for convolutions that receive spikes, and none does: give float32")
    return found


def _add_up_integers(onnx: Any, graph: Any, integers: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put ``ConvInteger`` of spikes as bytes, the scale and the bias in the place of convolutions.

    Runtimes have it for weights of no sign alone: 128 is added to them, and is their zero point. Where a kernel meets a
    single row or pixel, a part of it is read.
    """
    made: list[Any] = []
    known = {name: onnx.numpy_helper.from_array(array, name) for name, array in _ZEROS.items()}
    arrays = {value.name: value for value in graph.initializer}
    slices = {node.output[0]: node for node in graph.node if node.op_type == "Slice"}

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made.append(onnx.helper.make_node(op, inputs, [output], **attributes))
        return output

    def keep(name: str, array: np.ndarray[Any, Any]) -> str:
        known[name] = onnx.numpy_helper.from_array(array, name)
        return name

    for node in graph.node:
        weight: str = node.input[1] if node.op_type == "Conv" else ""
        parts: list[Any] = []
        cut: tuple[slice, slice] | None = None
        while weight in slices:
            parts.append(slices[weight])
            weight = slices[weight].input[0]
        if weight in arrays and weight not in integers:
            weight, cut = _owner(onnx.numpy_helper.to_array(arrays[weight]), integers)
        if weight not in integers:
            made.append(node)
            continue
        (spikes, _, *bias), out = node.input, node.output[0]
        whole, scale = integers[weight]
        if cut is None:  # the exporter multiplies a batch norm behind a convolution into its weights
            scale = _scale(whole, torch.from_numpy(onnx.numpy_helper.to_array(arrays[weight]).copy()))
        whole = whole if cut is None else whole[:, :, cut[0], cut[1]]
        kept = keep(f"{weight}.integers", (whole.numpy().astype(np.int16) + 128).astype(np.uint8))
        for part in reversed(parts):
            kept = add("Slice", [kept, *part.input[1:]], f"{out}.{part.output[0]}")
        spikes = add("Cast", [spikes], f"{out}.bytes", to=onnx.TensorProto.UINT8)
        add("ConvInteger", [spikes, kept, *_ZEROS], f"{out}.sums")
        made[-1].attribute.extend(node.attribute)
        sums = add("Cast", [f"{out}.sums"], f"{out}.floats", to=onnx.TensorProto.FLOAT)
        scales = keep(f"{weight}.scale", scale.view(-1, 1, 1).numpy())
        if not bias:
            add("Mul", [sums, scales], out)
            continue
        scaled = add("Mul", [sums, scales], f"{out}.scaled")
        values = onnx.numpy_helper.to_array(arrays[bias[0]])
        add("Add", [scaled, keep(f"{bias[0]}.by_channel", values.reshape(-1, 1, 1))], out)
    used = {value.name for value in graph.output}
    left: list[Any] = []
    for node in reversed(made):  # without the slices and weights that nothing reads any more
        if node.op_type != "Slice" or node.output[0] in used:
            used.update(node.input)
            left.append(node)
    constants = [value for value in graph.initializer if value.name in used]
    for field, content in ((graph.node, left[::-1]), (graph.initializer, [*constants, *known.values()])):
        del field[:]
        field.extend(content)


def _scale(whole: Tensor, weight: Tensor) -> Tensor:
    """By how much the integers of each output channel are multiplied in a weight."""
    rows, products = whole.flatten(1).double(), (whole * weight).flatten(1).double()
    return (products.sum(1) / rows.square().sum(1).clamp(min=1.0)).float()


def _owner(
    array: np.ndarray[Any, Any], integers: dict[str, tuple[Tensor, Tensor]]
) -> tuple[str, tuple[slice, slice] | None]:
    """Find of which weight an array without a name of its own is the middle, cut out when the graph was made."""
    for name, (whole, scale) in integers.items():
        if whole.shape[:2] == array.shape[:2]:
            starts = [(a - b) // 2 for a, b in zip(whole.shape[2:], array.shape[2:], strict=True)]
            rows, columns = (slice(i, i + side) for i, side in zip(starts, array.shape[2:], strict=True))
            part = whole[:, :, rows, columns] * scale.view(-1, 1, 1, 1)
            if part.shape == array.shape and np.array_equal(part.numpy(), array):
                return name, (rows, columns)
    return "", None


def _nodes(model: Any) -> list[Any]:
    """Nodes of a model, of its functions and of what is inside loops and branches."""
    found: list[Any] = []
    open_ = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while open_:
        node = open_.pop()
        found.append(node)
        for attribute in node.attribute:
            open_ += attribute.g.node
            for graph in attribute.graphs:
                open_ += graph.node
    return found


def _tidy(model: Any) -> None:
    """Take out what the exporter notes for those who look for its mistakes: lines and paths of the code."""
    for node in _nodes(model):
        del node.metadata_props[:]
        node.doc_string = ""
    for values in (model.graph.value_info, model.graph.input, model.graph.output, model.graph.initializer):
        for value in values:
            del value.metadata_props[:]
            value.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that onnxruntime computes.

    Args:
        file: A file that :func:`write` has written.

    Raises:
        ConfigurationError: If a package is missing, onnxruntime cannot read the file, or it takes or returns something
            else than one that :func:`write` has written.
    """
    _, onnxruntime = _packages()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise ConfigurationError(f"onnxruntime cannot read {file.name!r}: {brief(error)}") from error
    ends = [[end.name for end in found] for found in (session.get_inputs(), session.get_outputs())]
    if ends != [["image"], ["logits"]]:
        raise ConfigurationError(f"{file.name!r} maps {ends[0]} to {ends[1]}, and 'image' to 'logits' is needed")

    def logits(images: Tensor) -> Tensor:
        found = session.run(["logits"], {"image": np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(np.asarray(found))

    return logits
