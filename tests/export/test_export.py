"""Exports: the file of each format, run by its own runtime, against the network that it was made of."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

import lightning_msnn
from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.entries import FACTS, entries, read_weights
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import FORMATS, Format, export, exporting, load_weights, read_source, samples
from lightning_msnn.models.msnn_rnn import CELLS, Recurrence
from lightning_msnn.nn.integer import IntegerConv2d, to_integers
from lightning_msnn.zoo.storing import synapses
from tests.conftest import rest_is_slow

TINY = [name for name in entries() if name.endswith("_tiny.digits")]
LARGE = [name for name in entries() if zoo.info(name)["data"]["class_path"].endswith(".CIFAR100")]
DIGITS = "msnn_resnet12_tiny.digits"
QUICK = rest_is_slow(TINY, [DIGITS])
"""Entries of which an ONNX file is made, which takes longest of all."""

DATA = os.environ.get("LIGHTNING_MSNN_DATA")
SMALL = {"depths": (1, 1), "widths": (16, 24), "in_chans": 1, "num_classes": 3}
TINIEST = {"depths": (1,), "widths": (16,)}


@pytest.fixture(scope="module")
def digits():
    """Test digits as the entries take them, ``(359, 1, 16, 16)``, and their classes."""
    data = Digits(batch_size=512, image_size=16)
    data.setup("test")
    return data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Export a zoo entry, once for all tests."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def make(name, to, dtype="float32"):
        if (name, to, dtype) not in done:
            out = folder / f"{name}.{to}.{dtype}{FORMATS[to].suffix}"
            done[name, to, dtype] = export(name, to=to, out=out, dtype=dtype, data=DATA if name in LARGE else None)
        return done[name, to, dtype]

    yield make
    assert sorted(p for p in folder.iterdir()) == sorted(report.path for report in done.values()), "and nothing else"


def checkpoint(folder, network="msnn_resnet12_tiny", size=8, half=False, **arguments):
    """Write a checkpoint as the task does, of a network that has learnt nothing."""
    model = timm.create_model(network, **arguments)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.weight, -1.0, 1.5)
        nn.init.normal_(norm.bias)
    state = {f"network.{k}": v.half() if half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    named = {"num_classes": arguments["num_classes"], "in_chans": arguments["in_chans"]}
    colours = arguments["in_chans"]
    seen = {"data": "Mine", "image_size": size, "mean": [0.5] * colours, "std": [0.25] * colours} if size else {}
    content = {
        "state_dict": state,
        "hyper_parameters": {"network": network, "network_kwargs": {}, **named},
        "network_arguments": model.arguments,
        "class_names": ["a", "b", "c"],
        "preprocessing": seen,
    }
    torch.save(content, folder / "mine.ckpt")
    return folder / "mine.ckpt"


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# Every entry

WAYS = [(to, dtype) for to, form in FORMATS.items() for dtype in form.dtypes if to != "nir"]
"""Formats and types."""

FEW = 20
"""Images for networks that are not tiny ones, where there are no real ones."""


@pytest.fixture
def some(monkeypatch):
    """How many images a zoo entry's file is run on: 500 real ones, all digits, or a few random ones."""

    def number(name):
        if name not in TINY and (DATA is None or name not in LARGE):
            monkeypatch.setattr(samples, "DRAWN", FEW)
            return FEW
        return 359 if zoo.info(name)["data"]["class_path"].endswith(".Digits") else samples.NUMBER

    return number


def _quick(to, dtype, name):
    if to == "weights":
        return dtype == "int8" or name in TINY
    return dtype == "float32" and name == DIGITS


EVERY = [(to, dtype, name) for to, dtype in WAYS for name in entries()]


@pytest.mark.parametrize(
    ("to", "dtype", "name"),
    [pytest.param(*case, marks=() if _quick(*case) else pytest.mark.slow) for case in EVERY],
)
def test_every_entry_through_every_format(name, to, dtype, made, tmp_path, some):
    out, spiking = tmp_path / f"x{FORMATS[to].suffix}", "spike_rate" in zoo.info(name)
    images = some(name)
    twin = zoo.info(name)["model_args"].get("spiking") is False  # whose weights meet what stands for spikes
    if dtype == "int8" and not spiking and not (twin and to == "weights"):
        with pytest.raises(
            ConfigurationError, match=r"int8 is for weights that meet spikes|integer weights are for s(pikes|ynapses)"
        ):
            export(name, to=to, out=out, dtype=dtype)
        return
    report = made(name, to, dtype)
    assert report.images == images
    assert (report.top1 is None) == (images == FEW)
    if dtype == "float32":
        assert report.differ <= max(1, report.images // 200), "of spikes next to a threshold"
        assert report.top1 is None or report.top1[0] == pytest.approx(report.top1[1], abs=100 / report.images)
    elif report.top1 is not None:
        assert report.top1[1] > report.top1[0] - (4 if dtype == "int8" and name not in TINY else 2)


@pytest.mark.parametrize("name", TINY)
def test_entries_of_windows_are_not_written_as_nir(name, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{name} cannot be written as NIR: "):
        export(name, to="nir", out=tmp_path / "x.nir")


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if "spike_rate" in zoo.info(name)])
def test_8_bits_find_the_classes_of_integers(name, made, some, monkeypatch):
    """The weights of an 8-bit file, added up in float32 and in integers, on the images of the file or twice as many."""
    count = some(name)
    network = load_weights(made(name, "weights", "int8").path)
    if count == FEW:
        count = 2 * FEW  # of which one may be next to a threshold
        monkeypatch.setattr(samples, "DRAWN", count)
    found = samples.find_samples(read_source(name), DATA if name in LARGE else None)
    wide = torch.cat([network(images) for images in found.images.split(64)])
    exact = to_integers(network)
    narrow = torch.cat([exact(images) for images in found.images.split(64)])
    assert len(wide) == count
    # A membrane next to its threshold moves the logits of its image, and where two classes are level, the class.
    assert (wide.argmax(1) != narrow.argmax(1)).sum() <= 1
    assert ((wide - narrow).abs().amax(1) > 1e-3).double().mean() < 0.05


# ONNX


@pytest.mark.parametrize("name", QUICK)
def test_onnx_finds_the_classes_of_the_network(name, made, digits):
    report, network = made(name, "onnx"), zoo.load(name)
    images, targets = digits
    with torch.no_grad():
        ours = network(images)
    run, first, theirs = session(report.path), 0, []
    for size in (1, 3, 128, 7, 220):  # of any batch size
        theirs.append(torch.from_numpy(run.run(None, {"image": images[first : first + size].numpy()})[0]))
        first += size
    theirs = torch.cat(theirs)
    assert len(theirs) == len(images) == report.images
    assert report.differ == (ours.argmax(1) != theirs.argmax(1)).sum() <= 2
    moved = (ours - theirs).abs().amax(1)
    assert (moved > 1e-3).double().mean() < 0.05, "of the others, no spike is another one"
    assert report.top1[1] == pytest.approx(100 * (theirs.argmax(1) == targets).double().mean().item())
    assert report.top1[0] == pytest.approx(zoo.info(name)["top1"], abs=0.6)


@pytest.mark.parametrize("name", QUICK)
def test_onnx_says_what_images_it_takes(name, made):
    path, config = made(name, "onnx").path, zoo.info(name)
    model = onnx.load(path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    for key in ("class_names", "mean", "std", "input_size"):
        assert json.loads(said[key]) == config[key]
    assert json.loads(said["in_chans"]) == config["input_size"][0]
    assert (said["source"], said["architecture"]) == (name, config["architecture"])
    assert said == session(path).get_modelmeta().custom_metadata_map
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    batch, *shape = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [side.dim_value for side in shape] == config["input_size"]
    assert str(Path(lightning_msnn.__file__).parent).encode() not in path.read_bytes(), "no path of this machine"


@pytest.mark.parametrize("name", QUICK)
def test_spikes_stay_binary_in_onnx(name, made, digits):
    """Every convolution that meets spikes in the network meets 0 and 1 in the graph, and no batch norm follows it."""
    model = onnx.load(made(name, "onnx").path)
    entering = [node.input[0] for node in model.graph.node if node.op_type in ("Conv", "LSTM")]
    names = sorted(set(entering) - {"image"})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(x) for x in names)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(names, run.run(names, {"image": digits[0][:5].numpy()}), strict=True))
    binary = sum(bool(np.isin(values[x], (0.0, 1.0)).all()) for x in entering if x != "image")
    network = zoo.load(name)
    cells = sum(isinstance(m, Recurrence) for m in network.modules())
    assert binary == len(synapses(network)) - cells  # a cell has weights of two directions
    assert sum(n.op_type == "BatchNormalization" for n in model.graph.node) <= 1 + 12 * (cells > 0 or "vit" in name)


@pytest.mark.parametrize("name", QUICK)
def test_onnx_adds_up_integers(name, made, digits):
    """Each sum, by a product of integers in NumPy, and the classes of the network in integers."""
    report, network = made(name, "onnx", "int8"), zoo.load(name, integer=True)
    images = digits[0]
    theirs = torch.from_numpy(session(report.path).run(None, {"image": images.numpy()})[0])
    ours = network(images)
    assert (ours.argmax(1) != theirs.argmax(1)).sum() <= 1, "but for rounding at thresholds"
    assert ((ours - theirs).abs().amax(1) > 1e-3).double().mean() < 0.05
    assert report.size < (0.9 if "rnn" in name else 0.6) * made(name, "onnx").size, "cells stay in float32"

    model = onnx.load(report.path)
    onnx.checker.check_model(model)
    sums = [node for node in model.graph.node if node.op_type == "ConvInteger"]
    integers = {n: m for n, m in network.named_modules() if isinstance(m, IntegerConv2d)}
    assert len(sums) == len(integers)
    weights = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    stored = {name.removesuffix(".weight.integers"): w for name, w in weights.items() if name.endswith(".integers")}
    for name, own in integers.items():
        found = stored[f"{name}.conv" if own.fires else name].astype(int) - 128
        rows, columns = ((a - b) // 2 for a, b in zip(own.weight.shape[2:], found.shape[2:], strict=True))
        whole = own.weight.numpy()[:, :, rows : own.weight.shape[2] - rows, columns : own.weight.shape[3] - columns]
        assert np.array_equal(found, whole), "of a kernel that meets one row or pixel, its middle alone"
    seen = [name for node in sums for name in (node.input[0], node.input[1], node.output[0]) if name not in weights]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(x) for x in seen)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = weights | dict(zip(seen, run.run(seen, {"image": images[:3].numpy()}), strict=True))
    for node in sums:
        spikes, weight, found = (values[name] for name in (node.input[0], node.input[1], node.output[0]))
        assert spikes.dtype == np.uint8
        assert spikes.max() <= 1
        rows, columns = (side // 2 for side in weight.shape[2:])
        padded = np.pad(spikes.astype(np.int64), ((0, 0), (0, 0), (rows, rows), (columns, columns)))
        windows = sliding_window_view(padded, weight.shape[2:], (2, 3))
        of = "bchwij,cij->bchw" if weight.shape[1] < spikes.shape[1] else "bchwij,ocij->bohw"
        weight = weight.astype(np.int64) - 128
        expected = np.einsum(of, windows, weight[:, 0] if "ocij" not in of else weight, optimize=True)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (1, 13), "context": "isolated", "norm": False},
        {"windows": "grid", **TINIEST},
        {"network": "msnn_rnn12_tiny", "cell": "spiking_gru", "mlp": "gelu"},
    ],
    ids=str,
)
def test_onnx_in_integers_of_every_kind(arguments, tmp_path):
    source = checkpoint(tmp_path, **{**SMALL, **arguments})
    report = export(source, to="onnx", out=tmp_path / "x.onnx", dtype="int8")
    kinds = [node.op_type for node in onnx.load(report.path).graph.node]
    integers = [m for m in to_integers(read_source(source).network).modules() if isinstance(m, IntegerConv2d)]
    assert kinds.count("ConvInteger") == len(integers) > 0


# torch.export


def test_programs_load_without_this_package(made, digits, tmp_path):
    report, name = made(DIGITS, "torch"), DIGITS
    torch.save(digits[0][:5], tmp_path / "images.pt")
    code = """
import sys
sys.modules["lightning_msnn"] = None  # importing it fails
import json, torch
files = {"lightning_msnn.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files)
images = torch.load(sys.argv[2])
torch.save((json.loads(files["lightning_msnn.json"]), [program.module()(images[:n]) for n in (1, 5)]), sys.argv[3])
"""
    arguments = [str(report.path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=300)
    said, (one, five) = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        ours = zoo.load(name, fuse=True)(digits[0][:5])
    torch.testing.assert_close(five, ours, rtol=0, atol=1e-3)
    torch.testing.assert_close(one, ours[:1], rtol=0, atol=1e-3)
    assert json.loads(said["class_names"]) == zoo.info(name)["class_names"]
    assert report.differ <= 2


# Weights


def by_hand(weight):
    """The weights that an 8-bit file stands for, channel by channel."""
    found = np.empty_like(weight)
    for channel, row in enumerate(weight):
        scale = np.float32(np.abs(row).max()) / np.float32(127)
        found[channel] = np.rint(row / scale).astype(np.int8).astype(np.float32) * scale if scale else 0
    return found


@pytest.mark.parametrize("name", TINY)
def test_8_bits_are_a_plain_loop(name, made, monkeypatch, tmp_path):
    path = made(name, "weights", "int8").path
    weights, stored, back = read_weights(entries()[name]), load_file(path), load_weights(path).state_dict()
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        if stored[key].dtype == torch.int8:
            expected = by_hand(weight.numpy())
        elif weight.dim() > 1:
            expected = weight.numpy().astype(np.float16).astype(np.float32)
        else:
            expected = weight.numpy()
        assert np.array_equal(back[key].numpy(), expected), key
    assert path.stat().st_size < 0.55 * made(name, "weights", "float32").path.stat().st_size

    # As weights of an entry they are read alike.
    folder = tmp_path / "zoo" / name
    shutil.copytree(entries()[name], folder)
    shutil.copy(path, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config[FACTS]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    entry = zoo.load(name).state_dict()
    assert all(torch.equal(entry[key], value) for key, value in back.items())


@pytest.mark.parametrize("name", TINY)
def test_8_bits_are_for_weights_that_meet_spikes(name, made, digits):
    """Found by looking at what each layer is given."""
    network, found = zoo.load(name), set()

    def look(module, args):
        if bool(((args[0] == 0) | (args[0] == 1)).all()):
            label = names[module]
            both = [f"{label}.weight_ih_l0", f"{label}.weight_ih_l0_reverse"]
            found.update(both if isinstance(module, Recurrence) else [f"{label}.weight"])

    names = {m: label for label, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | Recurrence)}
    for module in names:
        module.register_forward_pre_hook(look)
    with torch.no_grad():
        network(digits[0][:64])
    stored = load_file(made(name, "weights", "int8").path)
    assert found == {key for key, value in stored.items() if value.dtype == torch.int8}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_weights_rebuild_the_network(dtype, made, digits):
    report = made(DIGITS, "weights", dtype)
    with torch.no_grad():
        ours, theirs = zoo.load(DIGITS)(digits[0]), load_weights(report.path)(digits[0])
    assert torch.equal(ours, theirs) == (dtype != "int8"), "the entry's own weights have 16 bits"
    assert report.differ == (ours.argmax(1) != theirs.argmax(1)).sum() <= 8
    with safe_open(report.path, "pt") as opened:
        said = opened.metadata()
    assert (said["dtype"], said["architecture"]) == (dtype, "msnn_resnet12_tiny")


def spoilt(source, folder, change, facts=None):
    """Copy a file of weights with other tensors or facts."""
    with safe_open(source, "pt") as opened:
        said = {**opened.metadata(), **(facts or {})}
    state = load_file(source)
    change(state)
    save_file(state, folder / "spoilt.safetensors", said)
    return folder / "spoilt.safetensors"


def _set_scale(value):
    def change(state):
        key = next(k for k in state if k.endswith("conv.weight_scale"))
        state[key][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        (_set_scale(0.0), {}, "has 8 bits, and a finite scale above 0 is needed"),
        (_set_scale(-1.0), {}, "has 8 bits, and a finite scale above 0 is needed"),
        (_set_scale(float("nan")), {}, "has 8 bits, and a finite scale above 0 is needed"),
        (_set_scale(float("inf")), {}, "has 8 bits, and a finite scale above 0 is needed"),
        (_set_scale(3e38), {}, "has 8 bits, and a finite scale above 0 is needed"),
        (lambda s: s.pop(next(k for k in s if k.endswith("weight_scale"))), {}, "a finite scale above 0 is needed"),
        (lambda s: s["head.fc.bias"][:1].fill_(float("nan")), {}, "head.fc.bias has values that are not finite"),
        (_set_scale(0.5), {}, "is damaged"),
        (lambda s: s["head.fc.bias"].add_(1), {}, "is damaged"),
        (lambda s: None, {"architecture": "msnn_vit12_tiny"}, "does not fit network 'msnn_vit12_tiny'"),
        (lambda s: None, {"architecture": "resnet18"}, "of network 'resnet18', which is refused"),
        (lambda s: None, {"arguments": '{"pretrained_cfg": {}}'}, "it gives the network pretrained_cfg"),
        (lambda s: None, {"arguments": '{"widths": [100000, 1, 1, 1]}'}, "its weights are not those of widths"),
        (lambda s: None, {"arguments": '{"depths": [300, 300, 300, 300]}'}, "its weights are not those of depths"),
        (lambda s: None, {"arguments": '{"widths": [90, 90, 90, 90]}'}, "weights are missing, too many or of another"),
        (lambda s: None, {"arguments": "{"}, "does not say what network it is of"),
    ],
)
def test_spoilt_weights_are_refused(change, facts, message, made, tmp_path):
    path = spoilt(made(DIGITS, "weights", "int8").path, tmp_path, change, facts)
    with pytest.raises(ConfigurationError, match=message):
        load_weights(path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"PK" + b[2:], lambda b: b""])
def test_damaged_files_are_refused(damage, made, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(made(DIGITS, "weights", "int8").path.read_bytes()))
    with pytest.raises(ConfigurationError, match="is not a safetensors file"):
        load_weights(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a safetensors file"):
        load_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(ConfigurationError, match="give a file of lightning-msnn export"):
        load_weights(entries()[DIGITS] / "model.safetensors")
    for to in ("onnx", "torch"):
        (tmp_path / f"x{FORMATS[to].suffix}").write_bytes(b"nothing")
        with pytest.raises(ConfigurationError, match="cannot read"):
            FORMATS[to].run(tmp_path / f"x{FORMATS[to].suffix}")


# Networks of checkpoints


SHIPPED = ("lstm", "spiking_gru")
"""Cells of the entries."""
KINDS = [
    ("onnx", {"norm": False, "mlp": "gelu", "learn_theta": True, "learn_threshold": True}),
    ("onnx", {"spiking": False}),
    *(("onnx", {"network": "msnn_rnn12_tiny", "cell": cell}) for cell in SHIPPED),
    ("torch", {"network": "msnn_rnn12_tiny", "context": "isolated"}),
    # Series, maps of one row, and spectrograms, which are cut in time.
    ("onnx", {"size": (6, 9), "windows": "time_dilated", "context": "isolated"}),
    ("torch", {"size": (1, 13), "windows": "time_grid", "network": "msnn_vit12_tiny", "widths": (24, 24)}),
]
MORE = [
    ("onnx", {"windows": "grid"}),
    ("onnx", {"context": "isolated", "windows": "dilated"}),
    *(("onnx", {"network": "msnn_rnn12_tiny", "cell": cell}) for cell in CELLS if cell not in SHIPPED),
    ("onnx", {"size": (1, 13), "windows": "alternate"}),
    ("onnx", {"size": (1, 16), "windows": "grid", "network": "msnn_rnn12_tiny"}),
    ("onnx", {"size": (5, 8), "windows": "time", "network": "msnn_vit12_tiny", "widths": (24, 24)}),
]


@pytest.mark.parametrize(
    ("to", "arguments"), [*KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_networks_of_every_kind(to, arguments, tmp_path):
    source = checkpoint(tmp_path, **{**SMALL, **arguments})
    report = export(source, to=to, out=tmp_path / f"x{FORMATS[to].suffix}")
    assert (report.what, report.top1) == ("random images (seed 0), since no real ones were given", None)
    assert report.images == 64
    assert report.differ <= 1


def test_a_converted_network(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    converted = lightning_msnn.convert(network, torch.rand(8, 1, 16, 16), windows="grid")
    arguments = {
        "source": "test_resnet",
        "layers": lightning_msnn.conversion.converted_layers(converted),
    }
    source = checkpoint(tmp_path, "spiking", 16, num_classes=3, in_chans=1, **arguments)
    for to, dtype in (("onnx", None), ("onnx", "int8"), ("weights", "int8")):
        report = export(source, to=to, out=tmp_path / f"{dtype}{FORMATS[to].suffix}", dtype=dtype)
        assert report.differ <= (2 if dtype is None else 16)
    whole, eighth = read_source(source).network, load_weights(tmp_path / "int8.safetensors")
    name, layer = next((n, m) for n, m in eighth.named_modules() if n in arguments["layers"])
    expected = by_hand(whole.get_submodule(name).scaled_weight().detach().numpy())
    assert np.array_equal(layer.scaled_weight().detach().numpy(), expected), "what a spike stands for is in the weight"


def test_a_checkpoint_in_half_precision_and_of_own_data(tmp_path):
    source = checkpoint(tmp_path, size=None, half=True, **SMALL)
    with pytest.raises(ConfigurationError, match="does not say how large its images are: give --image_size"):
        export(source, to="weights", out=tmp_path / "x.safetensors")
    with pytest.raises(ConfigurationError, match="image_size must be an integer of at least 1, not 0"):
        export(source, to="weights", out=tmp_path / "x.safetensors", image_size=0)
    report = export(source, to="onnx", out=tmp_path / "x.onnx", image_size=12)
    said = session(report.path).get_modelmeta().custom_metadata_map
    assert (said["source"], said["mean"], said["class_names"]) == ("mine.ckpt", "[]", '["a", "b", "c"]')
    assert json.loads(said["input_size"]) == [1, 12, 12]


def test_the_example_of_the_docs_needs_no_torch(made, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = page.split("## Without torch")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 22
    pixels = (255 / 16 * load_digits().images[0]).astype(np.uint8)  # noise can be another class by one grey level
    Image.fromarray(pixels).resize((20, 30)).save(tmp_path / "image.png")
    blocked = "import sys\nsys.modules['torch'] = sys.modules['lightning_msnn'] = None\n"
    arguments = [str(made(DIGITS, "onnx").path), str(tmp_path / "image.png")]
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    with torch.no_grad():
        best = zoo.load(DIGITS)(zoo.transforms(DIGITS)(Image.open(tmp_path / "image.png"))[None]).argmax()
    assert done.stdout.strip() == zoo.info(DIGITS)["class_names"][best]


def test_images_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    report = export(DIGITS, to="weights", out=tmp_path / "x.safetensors", images=tmp_path / "images")
    assert (report.images, report.top1, report.differ, report.largest) == (3, None, 0, 0.0)


# Refusals


def test_what_the_other_side_does_not_confirm_is_not_written(tmp_path, monkeypatch):
    def run(file):
        return lambda images: load_weights(file)(images).roll(1, 1)

    monkeypatch.setitem(FORMATS, "mine", Format(".mine", FORMATS["weights"].write, run, "a runtime"))
    with pytest.raises(ConfigurationError, match=r"finds another class in \d+ of 359 images, \d+ of them not"):
        export(DIGITS, to="mine", out=tmp_path / "x.mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({"global_pool": ""}, {}, "mine.ckpt itself cannot run on random images"),
        ({}, {"class_names": ["a", "b"]}, r"mine.ckpt names 2 classes, but returns \(3,\) for an image"),
        ({"num_classes": 0}, {"class_names": []}, r"mine.ckpt names 0 classes, but returns \(24,\) for an image"),
        ({}, {"state_dict": 3e38}, "mine.ckpt itself finds logits that are not finite in random images"),
    ],
)
def test_networks_that_do_not_run_are_refused_before_any_work(to, arguments, change, message, tmp_path, monkeypatch):
    source = checkpoint(tmp_path, **{**SMALL, **arguments})
    content = torch.load(source)
    if isinstance(change.get("state_dict"), float):
        content["state_dict"]["network.head.fc.weight"].fill_(change["state_dict"])
    else:
        content |= change
    torch.save(content, source)
    monkeypatch.setitem(FORMATS, to, FORMATS[to]._replace(write=None))
    with pytest.raises(ConfigurationError, match=message) as stop:
        export(source, to=to, out=tmp_path / f"x{FORMATS[to].suffix}")
    assert "\n" not in str(stop.value)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.ckpt"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preprocessing", {"image_size": [60000, 60000]}, "must have at most 16777216 pixels, not 60000 x 60000"),
        (
            "datamodule_hyper_parameters",
            {"time_steps": 10**9},
            "has data of 1000000000 time steps, and its network has 1",
        ),
    ],
)
def test_a_stranger_s_checkpoint_takes_no_memory(field, value, message, tmp_path):
    source = checkpoint(tmp_path, **SMALL)
    content = torch.load(source)
    content[field] = value
    torch.save(content, source)
    with pytest.raises(ConfigurationError, match=message):
        export(source, to="weights", out=tmp_path / "x.safetensors")


def test_large_images_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_VALUES", 5 * 64)
    assert export(checkpoint(tmp_path, **SMALL), to="weights", out=tmp_path / "x.safetensors").images == 5


def test_a_forecaster_is_refused(tmp_path):
    source = checkpoint(tmp_path, **SMALL)
    content = torch.load(source)
    content["hyper_parameters"]["season"] = 12
    torch.save(content, source)
    with pytest.raises(ConfigurationError, match=r"mine.ckpt' is of a forecaster, .* allowed are classifiers"):
        export(source, to="onnx", out=tmp_path / "x.onnx")


def test_rounding_at_a_threshold_is_told_from_a_mistake():
    network = zoo.load(DIGITS)
    images = torch.randn(16, 1, 16, 16)
    with torch.no_grad():
        logits = network(images)
    found = exporting._at_threshold(network, images, logits)
    assert found.double().mean() < 0.5
    logits[0, logits[0].topk(2).indices] = logits[0].max()
    assert exporting._at_threshold(network, images, logits)[0], "two classes are level"


def _bernoulli(folder):
    return {"source": checkpoint(folder, coding="bernoulli", **SMALL)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onx"}, "unknown format 'onx': allowed are aoti, nir, onnx, torch, weights; did you mean 'onnx'"),
        ({"out": "x.pt"}, "out must end with .onnx for onnx, not be 'x.pt'"),
        ({"out": None}, "out must be the path of a file, not None"),
        ({"out": "~nobody_of_this_name/x.onnx"}, "out must be the path of a file, not '~nobody_of_this_name/x.onnx'"),
        ({"out": "\udcff.onnx"}, r"out must be the path of a file, not '\\udcff.onnx'"),
        ({"out": "x\0.onnx"}, r"out must be a name that a disk can hold, not 'x\\x00.onnx'"),
        ({"out": "x" * 251 + ".onnx"}, "out must be a name that a disk can hold, not 'xxx"),
        ({"out": "there.onnx"}, "'there.onnx' exists, and nothing is overwritten"),
        ({"out": "link.onnx"}, "'link.onnx' exists, and nothing is overwritten"),
        ({"out": "there.onnx/x.onnx"}, "there.onnx' is not a folder"),
        ({"dtype": "float16"}, "dtype of onnx must be float32 or int8, not 'float16'"),
        ({"to": "weights", "out": "x.safetensors", "dtype": "int4"}, "must be float32 or float16 or int8, not 'int4'"),
        ({"source": "msnn_resnet12_tiny_digit"}, "unknown zoo entry 'msnn_resnet12_tiny_digit': allowed are"),
        ({"source": "there.onnx"}, "'there.onnx' is no source: give a checkpoint"),
        ({"source": "x.ckpt"}, "no checkpoint at 'x.ckpt'"),
        ({"source": None}, "a source must be a checkpoint or the name of a zoo entry, not None"),
        ({"image_size": 9}, "image_size is 9, but msnn_resnet12_tiny.digits is for 16 x 16"),
        ({"data": ".", "images": "."}, "data and images must not both be given"),
        ({"images": "nowhere"}, "cannot read the folder 'nowhere'"),
        ({"images": "."}, "holds no image"),
        (_bernoulli, "draws its spikes at random .* allowed is weights"),
        (lambda f: {"source": checkpoint(f, **SMALL), "data": "."}, "data must not be given: mine.ckpt is of data"),
        (
            {"source": "resnet18_cifar.c100", "to": "weights", "out": "x.safetensors", "dtype": "int8"},
            "int8 is for weights that meet spikes, and resnet18_cifar.c100 has none",
        ),
    ],
)  # fmt: skip
def test_refusals(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_bytes(b"mine")
    Path("link.onnx").symlink_to("nowhere")
    given = arguments(tmp_path) if callable(arguments) else arguments
    with pytest.raises(ConfigurationError, match=message):
        export(**{"source": DIGITS, "to": "onnx", "out": "x.onnx", **given})
    assert Path("there.onnx").read_bytes() == b"mine"
    assert {p.name for p in tmp_path.iterdir()} - {"mine.ckpt"} == {"there.onnx", "link.onnx"}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    out, write = tmp_path / "new" / "x.safetensors", FORMATS["weights"].write

    def slow(*args):
        write(*args)
        out.parent.mkdir()
        out.write_bytes(b"mine")

    monkeypatch.setitem(FORMATS, "weights", FORMATS["weights"]._replace(write=slow))
    with pytest.raises(ConfigurationError, match="exists, and nothing is overwritten"):
        export(DIGITS, to="weights", out=out)
    assert out.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.os, "access", lambda *_: False)
    with pytest.raises(ConfigurationError, match=r"cannot write .*x.onnx': .* is read-only"):
        export(DIGITS, to="onnx", out=tmp_path / "x.onnx")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "weights", FORMATS["weights"]._replace(write=full))
    with pytest.raises(ConfigurationError, match=r"cannot write .*x.safetensors': No space left on device"):
        export(DIGITS, to="weights", out=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# The command line


def test_the_verb(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    main(["export", "msnn_resnet12_tiny_digits", "--to", "weights", "--dtype", "int8", "--out", str(out)])
    told = capsys.readouterr().out
    assert f"msnn_resnet12_tiny_digits written as weights to {out}" in told
    assert "run again by lightning_msnn on 359 test images of Digits: " in told
    assert "top-1 of them 98." in told
    assert load_weights(out).num_classes == 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: source, --to, --out"),
        ([DIGITS, "--to", "onnx", "--out", "x.onnx", "--dtyp", "int8"], "unrecognized arguments: --dtyp int8"),
        ([DIGITS, "--to", "onnx", "--out", "x.pt"], "out must end with .onnx"),
        ([DIGITS, "--to", "onnx", "--out", "x.onnx", "--image_size", "a"], "--image_size: invalid int value: 'a'"),
    ],
)
def test_one_clear_error(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", *args])
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("lightning-msnn: error: ")
    assert message in complaint
    assert complaint.count("\n") == 1


def test_help_names_the_verb_and_its_options(capsys):
    for args, names in ((["export", "--help"], ["--to", "--dtype", *FORMATS]), (["--help"], ["lightning-msnn export"])):
        with pytest.raises(SystemExit) as stop:
            main(args)
        told = capsys.readouterr().out
        assert not stop.value.code
        assert all(name in told for name in names)
    with pytest.raises(SystemExit):
        main(["exprot"])
    assert "did you mean 'export'" in capsys.readouterr().err


def test_importing_exports_does_not_import_lightning():
    code = "import sys, lightning_msnn.export; sys.exit('lightning' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
