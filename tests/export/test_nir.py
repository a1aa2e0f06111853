"""NIR: graphs of networks without windows, read and run by other spiking libraries and by a loop in NumPy."""

import json

import nir
import norse.torch
import numpy as np
import pytest
import timm
import torch
from numpy.lib.stride_tricks import sliding_window_view
from spikingjelly.activation_based.nir_exchange import import_from_nir
from torch import nn

from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import export
from lightning_msnn.export import nir as our_nir
from lightning_msnn.nn import Spike
from lightning_msnn.nn.folding import ThresholdEncoder, fold_batch_norm
from lightning_msnn.trained import Trained, load_trained
from tests.export.test_export import SMALL, checkpoint

SINGLE = {"windows": "single", **SMALL}


@pytest.fixture(scope="module")
def digits():
    """Test digits of 16x16, normalised, and their classes."""
    data = Digits(batch_size=512)
    data.setup("test")
    return data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)


@pytest.fixture(scope="module", params=["msnn_resnet12_tiny", "msnn_resnet9_tiny"])
def trained(request, tmp_path_factory):
    """A network without windows that has learnt digits for some seconds, and the report of its export."""
    name = request.param
    data, folder = Digits(batch_size=64), tmp_path_factory.mktemp("trained")
    data.setup("fit")
    torch.manual_seed(0)
    network = timm.create_model(
        name, windows="single", stem="convolution", depths=(1, 1), widths=(16, 32), in_chans=1, num_classes=10
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for batch in [*data.train_dataloader()] * 10:
        images, targets = data.on_after_batch_transfer(batch, 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "hyper_parameters": {"network": name, "network_kwargs": {}, "num_classes": 10, "in_chans": 1},
        "network_arguments": network.arguments,
        "class_names": data.class_names,
        "preprocessing": {"data": "Digits", "image_size": 16, "mean": list(data.mean), "std": list(data.std)},
    }
    torch.save(content, folder / "trained.ckpt")
    report = export(folder / "trained.ckpt", to="nir", out=folder / "trained.nir")
    return network.eval(), report


def spikes_of(network, images, neurons):
    """Run a network, and return its output and the spikes of its layers of neurons by name."""
    found = {}

    def keep(name):
        return lambda module, args, out: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    for name, module in network.named_modules():
        if isinstance(module, neurons):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        out = network(images)
    return (out[0] if isinstance(out, tuple) else out), found


def nodes_of(name):
    """The node of a graph that has the spikes of a layer of ours."""
    stage, block, part = name.removeprefix("stages.").replace(".blocks.", " ").replace(".", " ", 1).split(" ")
    part = {"spike1": "1", "spike2": "2"}.get(part, part)
    part = {"mixer.spike1": "mixer1", "mixer.spike2": "mixer2", "mlp.spike": "mlp1"}.get(part, part.partition(".")[0])
    return f"stage{stage}_block{block}_{part}_spikes"


def by_hand(graph, images):
    """Run a graph as NIR defines its nodes, in double precision: outputs of all nodes by name.

    Neurons integrate one step from 0; a threshold that is reached is exceeded.
    """
    values, sources = {"input": images.astype(np.float64)}, {}
    for source, target in graph.edges:
        sources.setdefault(target, []).append(source)
    while len(values) < len(graph.nodes):
        for name, node in graph.nodes.items():
            if name in values or not all(source in values for source in sources[name]):
                continue
            x = sum(values[source] for source in sources[name])
            match node:
                case nir.Conv2d():
                    assert node.groups == 1
                    (a, b), (rows, columns) = node.padding, node.weight.shape[2:]
                    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (a, a), (b, b))), (rows, columns), (2, 3))
                    windows = windows[:, :, :: node.stride[0], :: node.stride[1]]
                    x = np.einsum("bchwij,ocij->bohw", windows, node.weight, optimize=True)
                    x += node.bias[:, None, None]
                case nir.IF():
                    assert not node.v_reset.any()
                    assert x.shape[1:] == node.v_threshold.shape
                    x = (node.r * x >= node.v_threshold).astype(np.float64)
                case nir.SumPool2d():
                    assert tuple(node.kernel_size) == x.shape[2:]
                    x = x.sum((2, 3), keepdims=True)
                case nir.Flatten():
                    x = x.reshape(len(x), -1)
                case nir.Affine():
                    x = x @ node.weight.T + node.bias
                case nir.Output():
                    pass
                case _:
                    raise AssertionError(f"{name} is a {type(node).__name__}")
            values[name] = x
    return values


def test_a_trained_network_keeps_its_classes(trained, digits):
    network, report = trained
    images, targets = digits
    assert (report.what, report.images, report.differ, report.runtime) == ("test images of Digits", 359, 0, "nirtorch")
    assert report.top1[0] == report.top1[1] > 80
    with torch.no_grad():
        assert report.top1[0] == pytest.approx(100 * (network(images).argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("library", ["spikingjelly", "norse"])
def test_spikes_in_another_library(library, trained, digits):
    network, report = trained
    images = digits[0][:100]
    ours, own = spikes_of(fold_batch_norm(network), images, (Spike, ThresholdEncoder))
    if library == "norse":
        module, neurons = norse.torch.from_nir(nir.read(report.path), dt=1.0), norse.torch.IAFCell
    else:
        module = import_from_nir(report.path, dt=1.0)
        neurons = type(module.get_submodule(nodes_of(next(iter(own)))))
    theirs, found = spikes_of(module, images, neurons)
    assert {nodes_of(name) for name in own} == found.keys()
    assert all(torch.equal(found[nodes_of(name)], spikes) for name, spikes in own.items())
    assert 0.05 < sum(s.sum() for s in own.values()) / sum(s.numel() for s in own.values()) < 0.95
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_the_graph_says_what_images_it_takes(trained):
    graph = nir.read(trained[1].path)
    assert json.loads(graph.metadata["class_names"]) == [str(i) for i in range(10)]
    assert json.loads(graph.metadata["mean"]) == list(Digits.mean)
    assert graph.metadata["architecture"] == trained[0].architecture
    assert graph.nodes["input"].input_type["input"].tolist() == [1, 16, 16]
    assert graph.nodes["output"].output_type["output"].tolist() == [10]


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        (9, {"context": "isolated", "drop_path_rate": 0.2}),
        (1, {}),
        (10, {"threshold": 0.1, "in_chans": 3}),
        (10, {"network": "msnn_resnet9_tiny", "stem": "convolution", "threshold": 0.1}),
    ],
    ids=str,
)
def test_networks_of_every_kind(size, arguments, tmp_path):
    given = {**SINGLE, **arguments}
    source = checkpoint(tmp_path, size=size, **given)
    report = export(source, to="nir", out=tmp_path / "x.nir")
    assert report.differ <= 1
    network = load_trained(source).network
    images = torch.rand(16, given["in_chans"], size, size)
    ours, own = spikes_of(fold_batch_norm(network), images, (Spike, ThresholdEncoder))
    values = by_hand(nir.read(tmp_path / "x.nir"), images.numpy())
    spikes = {nodes_of(name): spikes.numpy() for name, spikes in own.items()}
    assert spikes.keys() == {name for name in values if name.endswith("_spikes")}
    other = sum((values[name] != found).sum() for name, found in spikes.items())
    assert other <= 1e-4 * sum(found.size for found in spikes.values()), "but for rounding at thresholds"
    if not other:
        np.testing.assert_allclose(values["output"], ours.numpy(), rtol=0, atol=1e-4)


def test_a_channel_that_always_or_never_fires(tmp_path):
    """Whose batch norm has a scale of 0, so that no threshold of the stream stands for it; and one that falls."""
    network = timm.create_model("msnn_resnet12_tiny", **SINGLE).eval()
    norm = network.stages[0].blocks[0].encoder1.norm
    with torch.no_grad():
        norm.weight[:3] = torch.tensor([0.0, 0.0, -1.0])
        norm.bias[:3] = torch.tensor([1.0, 0.0, 0.5])
    source = Trained("x", ["a", "b", "c"], (1, 8, 8), network=network)
    our_nir.write(source, tmp_path / "x.nir", torch.Size((1, 8, 8)))
    images = torch.randn(4, 1, 8, 8)
    values = by_hand(nir.read(tmp_path / "x.nir"), images.numpy())
    found = values["stage0_block0_encoder1_spikes"]
    assert found[:, 0].all()
    assert not found[:, 1].any()
    np.testing.assert_array_equal(found[:, 2], values["stem"][:, 2] <= 0)
    with torch.no_grad():
        np.testing.assert_allclose(values["output"], network(images).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "msnn_vit12_tiny", "widths": (24, 24)}, "only the residual CNN families, msnn_resnet12 and"),
        ({"windows": "alternate"}, "its windows must be 'single', not 'alternate'"),
        ({"stem": "whitened"}, "its stem must be 'convolution', not 'whitened'"),
        ({"learn_threshold": "channel"}, "its learn_threshold must be False, not 'channel'"),
    ],
    ids=str,
)
def test_what_nir_cannot_describe_is_refused(arguments, message, tmp_path):
    source = checkpoint(tmp_path, **{**SINGLE, "depths": (2, 2), **arguments})
    with pytest.raises(ConfigurationError, match=f"mine.ckpt cannot be written as NIR.*{message}"):
        export(source, to="nir", out=tmp_path / "x.nir")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.ckpt"]
