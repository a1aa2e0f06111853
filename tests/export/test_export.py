"""Exports: the file of each format, run by its own runtime, against the network that it was made of."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import lightning_msnn
from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import FORMATS, Format, export, samples
from lightning_msnn.models.msnn_rnn import CELLS, Recurrence
from lightning_msnn.trained import load_trained
from lightning_msnn.zoo.storing import synapses
from tests.conftest import rest_is_slow

DIGITS = "msnn_resnet12_tiny.digits"
SHALLOW = rest_is_slow(["msnn_resnet12_tiny", "msnn_rnn12_tiny", "msnn_vit12_tiny"], ["msnn_resnet12_tiny"])
FAMILIES = ["msnn_resnet12.c100", "msnn_rnn12_tiny.digits", "spiking.resnet18_cifar_c100"]
SMALL = {"depths": (1, 1), "widths": (16, 24), "in_chans": 1, "num_classes": 3}
TINIEST = {**SMALL, "depths": (1,), "widths": (16,)}


@pytest.fixture(scope="module")
def digits():
    """Test digits as the entries take them, ``(359, 1, 16, 16)``, and their classes."""
    data = Digits(batch_size=512, image_size=16)
    data.setup("test")
    return data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A shallow network that has learnt nothing, and its ONNX file, made once for all tests."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def make(network):
        if network not in done:
            source = shallow(tmp_path_factory.mktemp(network), network)
            done[network] = load_trained(source), export(source, to="onnx", out=folder / f"{network}.onnx")
        return done[network]

    yield make
    assert sorted(folder.iterdir()) == sorted(report.path for _, report in done.values()), "and nothing else"


def shallow(folder, network):
    """A checkpoint of two blocks for digits."""
    small = {"depths": (1, 1), "widths": (24, 24), "in_chans": 1, "num_classes": 10}
    source, data = checkpoint(folder, network, size=16, **small), Digits()
    seen = {"data": "Digits", "image_size": 16, "mean": list(data.mean), "std": list(data.std)}
    more = {"preprocessing": seen, "class_names": data.class_names, "datamodule_hyper_parameters": {"image_size": 16}}
    torch.save(torch.load(source) | more, source)
    return source


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


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


# ONNX


@pytest.mark.parametrize("name", SHALLOW)
def test_onnx_finds_the_classes_of_the_network(name, made, digits):
    (source, report), (images, targets) = made(name), digits
    with torch.no_grad():
        ours = source.network(images)
    run = session(report.path)
    parts = [run.run(None, {"image": part.numpy()})[0] for part in images.split((1, 3, 128, 7, 220))]
    theirs = torch.from_numpy(np.concatenate(parts))
    assert (report.what, report.images) == ("test images of Digits", len(images))
    assert report.differ == (ours.argmax(1) != theirs.argmax(1)).sum() <= 2
    assert ((ours - theirs).abs().amax(1) > 1e-3).double().mean() < 0.05, "of the others, no spike is another one"
    for found, logits in zip(report.top1, (ours, theirs), strict=True):
        assert found == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("name", SHALLOW)
def test_onnx_says_what_images_it_takes(name, made):
    source, report = made(name)
    model = onnx.load(report.path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["class_names"]) == source.class_names
    assert json.loads(said["input_size"]) == list(source.input_size)
    assert (json.loads(said["mean"]), json.loads(said["std"])) == (source.mean, source.std)
    assert (said["source"], said["architecture"]) == (source.name, source.architecture)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    batch, *shape = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert tuple(side.dim_value for side in shape) == source.input_size
    assert str(Path(lightning_msnn.__file__).parent).encode() not in report.path.read_bytes(), "no path of this machine"


@pytest.mark.parametrize("name", SHALLOW)
def test_spikes_stay_binary_in_onnx(name, made, digits):
    """Every convolution that meets spikes in the network meets 0 and 1 in the graph, and no batch norm follows it."""
    source, report = made(name)
    model = onnx.load(report.path)
    entering = [node.input[0] for node in model.graph.node if node.op_type in ("Conv", "LSTM")]
    names = sorted(set(entering) - {"image"})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(x) for x in names)
    found = session(model.SerializeToString()).run(names, {"image": digits[0][:5].numpy()})
    values = dict(zip(names, found, strict=True))
    binary = sum(bool(np.isin(values[x], (0.0, 1.0)).all()) for x in entering if x != "image")
    cells = sum(isinstance(m, Recurrence) for m in source.network.modules())
    assert binary == len(synapses(source.network)) - cells  # a cell has weights of two directions
    assert sum(n.op_type == "BatchNormalization" for n in model.graph.node) <= 1 + 12 * (cells > 0 or "vit" in name)


def test_the_example_of_the_docs_needs_no_torch(made, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = page.split("## Without torch")[1].split("```python\n")[1].split("```")[0]
    pixels = (255 / 16 * load_digits().images[0]).astype(np.uint8)  # noise can be another class by one grey level
    Image.fromarray(pixels).resize((20, 30)).save(tmp_path / "image.png")
    blocked = "import sys\nsys.modules['torch'] = sys.modules['lightning_msnn'] = None\n"
    source, report = made("msnn_resnet12_tiny")
    arguments = [str(report.path), str(tmp_path / "image.png")]
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    with torch.no_grad():
        best = source.network(zoo.transforms(DIGITS)(Image.open(tmp_path / "image.png"))[None]).argmax()
    assert done.stdout.strip() == source.class_names[best]


# torch.export


def test_programs_load_without_this_package(tmp_path):
    source, images = load_trained(checkpoint(tmp_path, **TINIEST)), torch.rand(5, 1, 8, 8)
    FORMATS["torch"].write(source, tmp_path / "x.pt2", images.shape[1:])
    with torch.no_grad():
        torch.save((images, source.network(images)), tmp_path / "images.pt")
    code = """
import sys
sys.modules["lightning_msnn"] = None  # importing it fails
import torch
run = torch.export.load("x.pt2").module()
images, logits = torch.load("images.pt")
for part in (slice(1), slice(5)):
    torch.testing.assert_close(run(images[part]), logits[part], rtol=0, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)


# All entries, and networks of every kind


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)  # a minute each, and several for a large recurrent one
def test_an_entry_of_each_family(name, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "DRAWN", 20)
    report = export(name, to="onnx", out=tmp_path / "x.onnx")
    assert report.differ <= max(1, report.images // 100), "of spikes next to a threshold"


KINDS = [
    ("onnx", {"norm": False, "mlp": "gelu", "learn_theta": True, "learn_threshold": True}),
    ("onnx", {"spiking": False}),
    ("onnx", {"context": "isolated", "windows": "dilated"}),
    *(("torch", {"network": "msnn_rnn12_tiny", "cell": cell}) for cell in CELLS),
    # Series, maps of one row, and spectrograms, which are cut in time.
    ("torch", {"size": (1, 13), "windows": "time_grid", "network": "msnn_vit12_tiny", "widths": (24, 24)}),
    ("onnx", {"size": (1, 16), "windows": "grid", "network": "msnn_rnn12_tiny"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "arguments"), KINDS, ids=str)
def test_networks_of_every_kind(to, arguments, tmp_path):
    source = checkpoint(tmp_path, **{**SMALL, **arguments})
    report = export(source, to=to, out=tmp_path / f"x{FORMATS[to].suffix}")
    assert (report.what, report.top1) == ("random images (seed 0), since no real ones were given", None)
    assert report.images == 64
    assert report.differ <= 1


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_graded_spikes(to, tmp_path):
    source = checkpoint(tmp_path, levels=3, **TINIEST)
    report = export(source, to=to, out=tmp_path / f"x{FORMATS[to].suffix}")
    assert report.images == 64
    assert report.largest < 1e-3, "no spike is another one"


@pytest.mark.slow
def test_a_converted_network(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    converted = lightning_msnn.convert(network, torch.rand(8, 1, 16, 16), levels=3)
    layers = lightning_msnn.conversion.converted_layers(converted)
    source = checkpoint(
        tmp_path, "spiking", 16, num_classes=3, in_chans=1, source="test_resnet", layers=layers, levels=3
    )
    assert export(source, to="onnx", out=tmp_path / "x.onnx").differ <= 2


def test_a_checkpoint_in_half_precision_and_of_own_data(tmp_path):
    source = checkpoint(tmp_path, size=None, half=True, **TINIEST)
    with pytest.raises(ConfigurationError, match="does not say how large its images are: give image_size"):
        export(source, to="torch", out=tmp_path / "x.pt2")
    report = export(source, to="torch", out=tmp_path / "x.pt2", image_size=12)
    files = {"lightning_msnn.json": ""}
    torch.export.load(report.path, extra_files=files)
    said = json.loads(files["lightning_msnn.json"])
    assert (said["source"], said["mean"], said["class_names"]) == ("mine.ckpt", "[]", '["a", "b", "c"]')
    assert json.loads(said["input_size"]) == [1, 12, 12]


def test_images_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    report = export(checkpoint(tmp_path, **TINIEST), to="torch", out=tmp_path / "x.pt2", images=tmp_path / "images")
    assert (report.images, report.top1, report.differ) == (3, None, 0)


# Refusals


def copied(source, file, shape):
    torch.save(source.network, file)


def rolled(file):
    """Run a network with other classes than it has."""
    network = torch.load(file, weights_only=False)
    return lambda images: network(images).roll(1, 1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (rolled, r"a runtime finds another class in \d+ of 40 images, \d+ of them not"),
        (lambda file: lambda images: images, r"a runtime returns \(1, 16, 16\) for an image .* 10 finite logits"),
    ],
)
def test_what_the_other_side_does_not_confirm_is_not_written(run, message, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "mine", Format(".mine", copied, run, "a runtime"))
    monkeypatch.setattr(samples, "NUMBER", 40)
    with pytest.raises(ConfigurationError, match=message):
        export(DIGITS, to="mine", out=tmp_path / "x.mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onx"}, "unknown format 'onx': allowed are nir, onnx, torch; did you mean 'onnx'"),
        ({"out": "x.pt"}, "out must end with .onnx for onnx, not be 'x.pt'"),
        ({"out": "there.onnx"}, "'there.onnx' exists, and nothing is overwritten"),
        ({"out": "there.onnx/x.onnx"}, "cannot write 'there.onnx/x.onnx': "),
        ({"image_size": 9}, "image_size is 9, but msnn_resnet12_tiny.digits is for 16 x 16"),
        ({"data": ".", "images": "."}, "data and images must not both be given"),
        ({"images": "."}, "'.' must be a folder with files that end in"),
        ({"source": "mine.ckpt", "data": "."}, "mine.ckpt was trained on Mine, which is not imported"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_bytes(b"mine")
    checkpoint(tmp_path, **TINIEST)
    with pytest.raises(ConfigurationError, match=message):
        export(**{"source": DIGITS, "to": "onnx", "out": "x.onnx", **arguments})
    assert Path("there.onnx").read_bytes() == b"mine"
    assert {p.name for p in tmp_path.iterdir()} == {"mine.ckpt", "there.onnx"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"cannot write .*x.onnx': No space left on device"),
        (RuntimeError("no\nsuch operator"), f"{DIGITS} cannot be run and written as onnx: no such operator"),
        (ModuleNotFoundError(name="onnx"), r"onnx needs onnx, which .*: pip install 'lightning-msnn\[export\]'"),
    ],
)
def test_what_stops_a_writer_is_one_sentence(error, message, tmp_path, monkeypatch):
    def stopped(*args):
        raise error

    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(write=stopped))
    with pytest.raises(ConfigurationError, match=message):
        export(DIGITS, to="onnx", out=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


# The command line


def test_the_verb(tmp_path, capsys):
    out = tmp_path / "new" / "x.pt2"
    main(["export", str(checkpoint(tmp_path, **TINIEST)), "--to", "torch", "--out", str(out)])
    said = capsys.readouterr().out
    assert f"mine.ckpt written as torch to {out}" in said
    assert "run again by torch.export on 64 random images (seed 0)" in said
    assert out.is_file()
