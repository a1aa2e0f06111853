"""NIR: convolutions, integrate-and-fire neurons and sums that other spiking libraries and neuromorphic chips read.

NIR (Pedersen et al., Nature Communications 2024) describes a network as a graph of a few kinds of nodes; several edges
into a node are added up. A neuron that visits one window is NIR's integrate-and-fire neuron in its first step: membrane
0, no leak, a spike where the current reaches the threshold. NIR has no batch norm: it is folded into the synapse before
it, or, before spikes that leave the residual stream, into a 1x1 convolution. NIR has no rectifier, so a whitened stem
cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export.samples import facts
from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.msnn_resnet import ConvMixer
from lightning_msnn.models.msnn_resnet9 import ConvBlock
from lightning_msnn.nn import Block
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm
from lightning_msnn.trained import Trained

__all__ = ["run", "write"]

_NEEDED = {
    "windows": "single", "spiking": True, "mlp": "spiking", "global_pool": "avg", "norm": True, "levels": 1,
    "learn_threshold": False, "stem": "convolution",
}  # fmt: skip
"""Arguments of a network that is written."""

_Node = tuple[str, tuple[int, ...]]
"""Name of a node and the shape of its output, without the batch."""


def write(trained: Trained, file: Path, shape: torch.Size) -> None:
    """Write a network as a NIR graph, from node ``input`` of that shape to node ``output`` of shape ``(classes,)``.

    Raises:
        ConfigurationError: If NIR cannot describe the network.
    """
    network, refused = trained.network, f"{trained.name} cannot be written as NIR"
    blocks = [block for stage in getattr(network, "stages", []) for block in stage.blocks]
    if not isinstance(network, MSNN) or not all(map(_is_convolutional, blocks)):
        raise ConfigurationError(f"{refused}: only the residual CNN families, msnn_resnet12 and msnn_resnet9, can")
    for argument, needed in _NEEDED.items():
        if (given := network.arguments.get(argument, needed)) != needed:
            raise ConfigurationError(f"{refused}: its {argument} must be {needed!r}, not {given!r}")
    import nir

    graph = _Graph(nir, fold_batch_norm(network), tuple(shape))
    nir.write(file, nir.NIRGraph(graph.nodes, graph.edges, metadata=facts(trained)))


def _is_convolutional(block: nn.Module) -> bool:
    return type(block) is ConvBlock or (type(block) is Block and type(block.mixer) is ConvMixer)


class _Graph:
    """Nodes and edges of a folded network, in the order in which they are computed.

    Some readers follow the edges of a node in their order, and compute a node when they first come to it: an edge that
    leads around a branch comes after the branch.
    """

    def __init__(self, nir: Any, network: Any, shape: tuple[int, ...]) -> None:
        self.nir, self.edges = nir, list[tuple[str, str]]()
        self.nodes: dict[str, Any] = {"input": nir.Input(np.array(shape))}
        x = self.conv("stem", ("input", shape), network.stem.conv)
        for i, stage in enumerate(network.stages):
            if not isinstance(stage.downsample, nn.Identity):
                x = self.merge(f"stage{i}_merge", x, stage.downsample.conv)
            for j, block in enumerate(stage.blocks):
                x = self.block(f"stage{i}_block{j}", x, block)
        self.read_out(x, network)

    def add(self, name: str, source: str, node: Any) -> str:
        """Add a node and the edge to it; return its name."""
        self.nodes[name] = node
        self.edges.append((source, name))
        return name

    def convolve(self, name: str, x: _Node, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> _Node:
        """Add a convolution."""
        bias = torch.zeros(len(weight)) if bias is None else bias
        node = self.nir.Conv2d(x[1][1:], _array(weight), (stride,) * 2, (padding,) * 2, (1, 1), 1, _array(bias))
        return self.add(name, x[0], node), tuple(int(side) for side in node.output_type["output"])

    def conv(self, name: str, x: _Node, conv: nn.Conv2d) -> _Node:
        """Add a convolution of ours."""
        return self.convolve(name, x, conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))

    def merge(self, name: str, x: _Node, conv: nn.Conv2d) -> _Node:
        """Add patch merging. NIR pads a map all around: zeros in the kernel undo what is above and to the left."""
        if all(side % 2 == 0 for side in x[1][1:]):
            return self.conv(name, x, conv)
        return self.convolve(name, x, nn.functional.pad(conv.weight, [1, 0, 1, 0]), conv.bias, 2, 1)

    def pointwise(self, name: str, x: _Node, scale: Tensor, shift: Tensor) -> _Node:
        """Add ``scale x + shift`` by channel: a 1x1 convolution, since few readers have NIR's ``Scale``, or groups."""
        return self.convolve(name, x, torch.diag(scale)[:, :, None, None], shift, 1, 0)

    def neurons(self, name: str, x: _Node, threshold: float) -> _Node:
        """Add integrate-and-fire neurons of one threshold: some readers take no others in a layer."""
        whole = np.full(x[1], threshold, np.float32)
        return self.add(f"{name}_spikes", x[0], self.nir.IF(np.ones_like(whole), whole, np.zeros_like(whole))), x[1]

    def layer(self, name: str, x: _Node, synapse: Any, spike: Any) -> _Node:
        """Add a synapse and its neurons."""
        return self.neurons(name, self.conv(f"{name}_synapse", x, synapse.conv), spike.threshold)

    def encode(self, name: str, x: _Node, encoder: ThresholdEncoder) -> _Node:
        """Add the spikes that leave the residual stream."""
        fixed = encoder.level.isinf()  # a channel that always fires or never does
        scale = torch.where(fixed, 0.0, encoder.sign)
        level = torch.where(fixed, encoder.level.sign(), encoder.level)
        return self.neurons(name, self.pointwise(f"{name}_norm", x, scale, -level), 0.0)

    def normed(self, name: str, x: _Node, norm: nn.BatchNorm2d, spike: Any) -> _Node:
        """Add a batch norm of the residual stream and the spikes behind it."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        x = self.pointwise(f"{name}_norm", x, scale, norm.bias - norm.running_mean * scale)
        return self.neurons(name, x, spike.threshold)

    def block(self, name: str, x: _Node, block: Any) -> _Node:
        """Add a block; return the residual stream after it."""
        if isinstance(block, ConvBlock):
            spikes = self.normed(f"{name}_1", x, block.norm, block.spike1)  # type: ignore[arg-type]
            spikes = self.layer(f"{name}_2", spikes, block.synapse1, block.spike2)
            return self.total(name, x, spikes, block.synapse2.conv)
        mixer, mlp = block.mixer, block.mlp
        spikes = self.encode(f"{name}_encoder1", x, block.encoder1)
        spikes = self.layer(f"{name}_mixer1", spikes, mixer.synapse1, mixer.spike1)
        spikes = self.layer(f"{name}_mixer2", spikes, mixer.synapse2, mixer.spike2)
        x = self.total(f"{name}_mixer", x, spikes, mixer.project.conv)
        spikes = self.encode(f"{name}_encoder2", x, block.encoder2)
        spikes = self.layer(f"{name}_mlp1", spikes, mlp.fc1, mlp.spike)
        return self.total(f"{name}_mlp", x, spikes, mlp.fc2.conv)

    def total(self, name: str, x: _Node, spikes: _Node, project: nn.Conv2d) -> _Node:
        """Add the last synapse of a branch, and its sum with the residual stream in a node of its own."""
        branch, shape = self.conv(f"{name}_project", spikes, project)
        total = self.pointwise(f"{name}_sum", x, torch.ones(shape[0]), torch.zeros(shape[0]))
        self.edges.append((branch, total[0]))
        return total

    def read_out(self, x: _Node, network: Any) -> None:
        """Add the mean over the map and the linear layer; the batch norm before them goes into its weights."""
        weight, bias, norm = network.head.fc.weight.double(), network.head.fc.bias.double(), network.norm.double()
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = bias + weight @ (norm.bias - norm.running_mean * scale)
        weight = weight * scale
        name, (channels, *sides) = x
        name = self.add("pool", name, self.nir.SumPool2d(np.array(sides), np.array(sides), np.array([0, 0])))
        # Some readers count the axis of the batch, and some do not; from the end all count alike.
        name = self.add("flatten", name, self.nir.Flatten({"input": np.array([channels, 1, 1])}, -3, -1))
        name = self.add("read_out", name, self.nir.Affine(_array(weight / (sides[0] * sides[1])), _array(bias)))
        self.add("output", name, self.nir.Output(np.array([len(weight)])))


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    return value.detach().to(torch.float32).contiguous().numpy().copy()


class _Neurons(nn.Module):
    """Integrate-and-fire neurons in their first step."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.threshold = torch.from_numpy(node.v_threshold / node.r)

    def forward(self, current: Tensor) -> Tensor:
        return (current >= self.threshold).to(current.dtype)


def _affine(node: Any) -> nn.Linear:
    """A linear layer with its bias, which nirtorch's own leaves as it was drawn."""
    made = nn.Linear(node.weight.shape[1], node.weight.shape[0])
    made.weight.data, made.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return made


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that nirtorch computes; it makes code of a file's names."""
    import nir
    import nirtorch

    module = nirtorch.nir_to_torch(nir.read(file), {nir.IF: _Neurons, nir.Affine: _affine}).eval()
    return lambda images: module(images)[0]
