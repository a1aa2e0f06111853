"""NIR: convolutions, integrate-and-fire neurons and sums that other spiking libraries and neuromorphic chips read.

NIR (Pedersen et al., Nature Communications 2024) says what a network computes as a graph of a few nodes; several edges
into a node are their sum. A neuron of one window and one step is NIR's integrate-and-fire neuron in its first step:
membrane 0, no leak, fires where the current exceeds its threshold. Batch norm is folded, since NIR has none: after a
synapse into its weights, before spikes that leave the stream into a 1x1 convolution to a threshold of 0, and before
the read-out into its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.source import Source
from lightning_msnn.models.msnn import MSNN, Stage
from lightning_msnn.models.msnn_resnet import ConvMixer
from lightning_msnn.models.msnn_rnn import MSNNRNN
from lightning_msnn.models.msnn_vit import MSNNViT
from lightning_msnn.nn import MLP, Block, Encoder, Mixer, Spike, Synapse
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm

__all__ = ["refusal", "run", "write"]


_KNOWN = (Stage, Block, Encoder, ConvMixer, MLP, DropPath, nn.Identity)
"""What stages and blocks are made of, as :class:`_Graph` writes it."""


def _packages() -> tuple[Any, Any]:
    try:
        import nir
        import nirtorch
    except ImportError as error:
        raise ConfigurationError(f"nir needs nir and nirtorch ({error}): pip install 'lightning-msnn[nir]'") from error
    return nir, nirtorch


def refusal(network: nn.Module) -> str | None:
    """Return why NIR cannot say what a network computes, None if it can.

    Args:
        network: The network.
    """
    if not isinstance(network, MSNN):
        return f"{type(network).__name__} is not one of this package's own networks"
    if isinstance(network, MSNNViT):
        return "NIR has no spiking self-attention"
    if isinstance(network, MSNNRNN):
        cell = network.arguments.get("cell", "lstm")
        return f"NIR has no recurrent cell ({cell})"
    spikes = [module for module in network.modules() if isinstance(module, Spike)]
    if not spikes:
        return "its neurons are rectifiers, which NIR has not"
    windows = sorted({m.windows for m in network.modules() if isinstance(m, Mixer)} - {"single"})
    if windows:
        return f"its neurons visit windows ({', '.join(windows)}), which NIR has not: train with windows single"
    if network.arguments.get("mlp") == "gelu":
        return "NIR has no GELU"
    for stage in network.stages:
        for block in getattr(stage, "blocks", [stage]):
            for part in (stage, block, *block.children()):
                if type(part) not in _KNOWN:
                    return f"NIR has no {type(part).__name__}"
    if network.head.global_pool.pool_type != "avg" or not isinstance(network.head.fc, nn.Linear):
        return "its read-out is not the mean over the map and a linear layer"
    return None


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write a network as a NIR graph, from node ``input`` of that shape to node ``output`` of shape ``(classes,)``.

    Args:
        source: The network.
        file: The file.
        shape: Shape of one input.
        dtype: ``"float32"``.

    Raises:
        ConfigurationError: If a package is missing, or NIR cannot say what the network computes.
    """
    if reason := refusal(source.network):
        raise ConfigurationError(f"{source.name} cannot be written as NIR: {reason}")
    nir, _ = _packages()
    folded: Any = fold_batch_norm(source.network)
    graph = _Graph(nir, folded, tuple(shape))
    nir.write(file, nir.NIRGraph(graph.nodes, graph.edges, metadata=source.facts()))


class _Graph:
    """Nodes and edges of a network whose batch norms are folded, in the order in which they are computed.

    Some readers follow the edges of a node in their order, and compute a node when they first come to it: an edge that
    leads around a branch comes after the branch.
    """

    def __init__(self, nir: Any, network: MSNN, shape: tuple[int, ...]) -> None:
        self.nir = nir
        self.nodes: dict[str, Any] = {"input": nir.Input(np.array(shape))}
        self.edges: list[tuple[str, str]] = []
        x, shape = self.conv("stem", "input", shape, network.stem.conv)
        stages: Any = network.stages
        for i, stage in enumerate(stages):
            if not isinstance(stage.downsample, nn.Identity):
                x, shape = self.merge(f"stage{i}_merge", x, shape, stage.downsample.conv)
            for j, block in enumerate(stage.blocks):
                x = self.block(f"stage{i}_block{j}", x, shape, block)
        self.read_out(x, shape, network)

    def add(self, name: str, source: str, node: Any) -> str:
        """Add a node; return its name."""
        self.nodes[name] = node
        self.edges.append((source, name))
        return name

    def conv(
        self,
        name: str,
        source: str,
        shape: tuple[int, ...],
        conv: nn.Conv2d,
        weight: Tensor | None = None,
        padding: tuple[int, int] | None = None,
    ) -> tuple[str, tuple[int, ...]]:
        """Add a convolution; return its name and the shape of its output."""
        weight = conv.weight if weight is None else weight
        stride, bias = (conv.stride[0], conv.stride[1]), torch.zeros(len(weight)) if conv.bias is None else conv.bias
        pad = (int(conv.padding[0]), int(conv.padding[1])) if padding is None else padding
        node = self.nir.Conv2d(shape[1:], _array(weight), stride, pad, (1, 1), conv.groups, _array(bias))
        self.add(name, source, node)
        return name, tuple(int(side) for side in node.output_type["output"])

    def pointwise(self, name: str, source: str, shape: tuple[int, ...], scale: Tensor, shift: Tensor) -> str:
        """Add ``scale x + shift`` by channel: a 1x1 convolution, since few readers have NIR's ``Scale``, or groups."""
        weight = torch.diag(scale)[:, :, None, None]
        return self.add(
            name, source, self.nir.Conv2d(shape[1:], _array(weight), (1, 1), (0, 0), (1, 1), 1, _array(shift))
        )

    def synapse(self, name: str, source: str, shape: tuple[int, ...], conv: nn.Conv2d) -> str:
        """Add a synapse of odd kernel, of which a map of one pixel meets the middle alone."""
        middle = conv.kernel_size[0] // 2
        reach = 0 if shape[1] == shape[2] == 1 else middle
        weight = conv.weight[:, :, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
        return self.conv(name, source, shape, conv, weight, (reach, reach))[0]

    def merge(self, name: str, source: str, shape: tuple[int, ...], conv: nn.Conv2d) -> tuple[str, tuple[int, ...]]:
        """Add patch merging. NIR pads a map all around: zeros in the kernel undo what is above and to the left."""
        if shape[1] % 2 == shape[2] % 2 == 0:
            return self.conv(name, source, shape, conv)
        return self.conv(name, source, shape, conv, nn.functional.pad(conv.weight, [1, 0, 1, 0]), (1, 1))

    def neurons(self, name: str, source: str, shape: tuple[int, ...], threshold: float) -> str:
        """Add integrate-and-fire neurons of one threshold: some readers take no others in a layer."""
        whole = np.full(shape, threshold, np.float32)
        return self.add(name, source, self.nir.IF(np.ones_like(whole), whole, np.zeros_like(whole)))

    def layer(self, name: str, source: str, shape: tuple[int, ...], synapse: Synapse, spike: Spike) -> str:
        """Add a synapse and its neurons; thresholds that are learnt are taken from its bias."""
        conv = synapse.conv
        current = self.synapse(f"{name}_synapse", source, shape, conv)
        threshold = spike.threshold
        if spike.level is not None:
            self.nodes[current].bias -= _array(spike.level.expand(conv.out_channels))
            threshold = 0.0
        return self.neurons(f"{name}_spikes", current, (conv.out_channels, *shape[1:]), threshold)

    def encode(self, name: str, x: str, shape: tuple[int, ...], encoder: nn.Module) -> str:
        """Add the spikes that leave the residual stream."""
        if isinstance(encoder, ThresholdEncoder):
            scale, level = encoder.sign, encoder.level
            fixed = level.isinf()  # a channel that always fires or never does
            scale, level = torch.where(fixed, 0.0, scale), torch.where(fixed, level.sign(), level)
        else:
            assert isinstance(encoder, Encoder)
            if encoder.spike.level is None:
                return self.neurons(f"{name}_spikes", x, shape, encoder.spike.threshold)
            level = encoder.spike.level.expand(shape[0])
            scale = torch.ones_like(level)
        return self.neurons(f"{name}_spikes", self.pointwise(f"{name}_norm", x, shape, scale, -level), shape, 0.0)

    def total(self, name: str, x: str, branch: str, shape: tuple[int, ...]) -> str:
        """Add a branch to the residual stream; what takes the sum takes it from a node of its own."""
        self.pointwise(name, x, shape, torch.ones(shape[0]), torch.zeros(shape[0]))
        self.edges.append((branch, name))
        return name

    def block(self, name: str, x: str, shape: tuple[int, ...], block: Any) -> str:
        """Add a block; return the stream after it."""
        mixer, mlp = block.mixer, block.mlp
        spikes = self.encode(f"{name}_encoder1", x, shape, block.encoder1)
        spikes = self.layer(f"{name}_mixer1", spikes, shape, mixer.synapse1, mixer.spike1)
        spikes = self.layer(f"{name}_mixer2", spikes, shape, mixer.synapse2, mixer.spike2)
        branch = self.synapse(f"{name}_mixer_project", spikes, shape, mixer.project.conv)
        x = self.total(f"{name}_mixer_sum", x, branch, shape)
        spikes = self.encode(f"{name}_encoder2", x, shape, block.encoder2)
        spikes = self.layer(f"{name}_mlp1", spikes, shape, mlp.fc1, mlp.spike)
        branch = self.synapse(f"{name}_mlp_project", spikes, shape, mlp.fc2.conv)
        return self.total(f"{name}_mlp_sum", x, branch, shape)

    def read_out(self, x: str, shape: tuple[int, ...], network: MSNN) -> None:
        """Add the mean over the map and the linear layer; the batch norm before them goes into its weights."""
        weight, bias = network.head.fc.weight.double(), network.head.fc.bias.double()
        norm = network.norm
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            bias = bias + weight @ (norm.bias.double() - norm.running_mean.double() * scale)
            weight = weight * scale
        if shape[1:] != (1, 1):
            sides = np.array(shape[1:])
            x = self.add("pool", x, self.nir.SumPool2d(sides, sides, np.array([0, 0])))
            weight = weight / (shape[1] * shape[2])
        # Some readers count the axis of the batch, and some do not; from the end all count alike.
        x = self.add("flatten", x, self.nir.Flatten({"input": np.array([shape[0], 1, 1])}, -3, -1))
        x = self.add("read_out", x, self.nir.Affine(_array(weight), _array(bias)))
        self.add("output", x, self.nir.Output(np.array([len(weight)])))


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    return value.detach().to(torch.float32).contiguous().numpy().copy()


class _Neurons(nn.Module):
    """Integrate-and-fire neurons in their first step."""

    threshold: Tensor

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.from_numpy(node.v_threshold / node.r))

    def forward(self, current: Tensor) -> Tensor:
        return (current >= self.threshold).to(current.dtype)


def _affine(node: Any) -> nn.Linear:
    made = nn.Linear(node.weight.shape[1], node.weight.shape[0])
    made.weight.data, made.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return made


def _check_order(nir: Any, graph: Any) -> None:
    """Check that all of a graph lies between one input and one output: in any other, readers look without end.

    Raises:
        ValueError: If it does not.
    """
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        before[target].append(source)
    TopologicalSorter(before).prepare()  # a ValueError where there is a circle
    first = [type(graph.nodes[name]) for name, sources in before.items() if not sources]
    last = [type(graph.nodes[name]) for name in graph.nodes.keys() - {source for source, _ in graph.edges}]
    if (first, last) != ([nir.Input], [nir.Output]) or any(type(n) is nir.NIRGraph for n in graph.nodes.values()):
        raise ValueError("its nodes do not all lie, each by itself, between one input and one output")


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that nirtorch wires up of the graph.

    Args:
        file: A file that :func:`write` has written.

    Raises:
        ConfigurationError: If a package is missing, or the file is no such graph.
    """
    nir, nirtorch = _packages()
    try:
        graph = nir.read(file)
        if not all(name.isidentifier() for name in graph.nodes):  # nirtorch makes code of them
            raise ValueError("its nodes have other names than letters, digits and '_'")
        _check_order(nir, graph)
        for name, node in graph.nodes.items():
            values = [value for value in vars(node).values() if isinstance(value, np.ndarray)]
            if not all(np.isfinite(value).all() for value in values) or (type(node) is nir.IF and not node.r.all()):
                raise ValueError(f"node {name} has values that are not finite, or a resistance of 0")
        module = nirtorch.nir_to_torch(graph, {nir.IF: _Neurons, nir.Affine: _affine}).eval()
    except Exception as error:  # whatever the bytes make h5py, nir and nirtorch raise
        reason = brief(error)
        raise ConfigurationError(f"nirtorch cannot read {file.name!r}: {reason}") from error

    def logits(images: Tensor) -> Tensor:
        found: Tensor = module(images)[0]
        return found

    return logits
