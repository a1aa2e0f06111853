"""Entries made of checkpoints: their weights, what they say of the run, and what is refused."""

import json
import os
from inspect import signature

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.data import Digits
from lightning_msnn.entries import FACTS, dequantised, entries, read_config, read_weights
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.msnn_rnn import Recurrence
from lightning_msnn.nn.integer import to_integers
from lightning_msnn.zoo.storing import stored, synapses
from lightning_msnn_cli import main
from tests.callbacks.training import fit
from tests.test_security import NETWORK, small_checkpoint

TINY = [name for name in entries() if name.endswith("_tiny.digits")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A task that has seen two batches of digits, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    kwargs = {"windows": "grid", "depths": [1, 1], "widths": [16, 24], "theta": 0.3}
    few = {"limit_train_batches": 2, "limit_val_batches": 0}
    task, _ = fit(folder, trainer=few, data=Digits(batch_size=32), network_kwargs=kwargs, lr=0.003)
    return task.eval(), folder / "x.ckpt"


@pytest.fixture
def small(tmp_path):
    """A checkpoint of a small network that has learnt nothing."""
    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_export_from_the_command_line(trained, tmp_path, capsys, monkeypatch):
    """Any tag, a card of what the run knows, and figures of the weights that are in the file."""
    task, checkpoint = trained
    name, x = "msnn_resnet12_tiny.my-own_tag.2", torch.randn(2, 1, 8, 8)
    (tmp_path / "fields.json").write_text('{"command": "fit", "hardware": "a CPU"}')
    arguments = ["export", str(checkpoint), name, "--out", str(tmp_path / "zoo")]
    main(["zoo", *arguments, "--fields", str(tmp_path / "fields.json")])
    folder = tmp_path / "zoo" / name
    assert capsys.readouterr().out.startswith(f"{folder} made (float32 weights): top-1")
    assert os.listdir(tmp_path / "zoo") == [name]
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "energy.png", "model.safetensors"]
    config, card = read_config(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert config["data"] == {"class_path": "lightning_msnn.data.Digits"}
    assert (config["top1_images"], config["epochs"], config["steps"]) == (359, 1, 2)
    assert (config["model_args"]["windows"], config["model_args"]["theta"]) == ("grid", 0.3)
    assert config["energy_joules"] < config["energy_joules_ann_twin"]
    assert (config["settings"]["lr"], config["settings"]["batch_size"]) == (0.003, 32)
    assert "| recipe | weights after 1 epoch and 2 steps, seed" in card
    assert "lr 0.003" in card
    assert "| made by | `fit`" in card
    assert "None" not in card
    assert "started from" not in card

    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    loaded = zoo.load(name.replace(".", "_"))
    torch.testing.assert_close(loaded(x), task(x), rtol=0, atol=1e-4)
    assert all(torch.equal(value, task.network.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.pretrained_cfg["tag"] == "my-own_tag.2"
    assert list(zoo.transforms(name)(Image.new("L", (20, 30))).shape) == config["input_size"]
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), loaded(x))
    with pytest.raises(ConfigurationError, match="exists: remove it to make the entry anew"):
        zoo.export(checkpoint, name, tmp_path / "zoo")
    for field in ("dtype", "sha256"):
        (tmp_path / "wrong.json").write_text(json.dumps({field: "float16"}))
        with pytest.raises(SystemExit, match="2"):
            main(["zoo", *arguments, "--fields", str(tmp_path / "wrong.json")])
        assert field in capsys.readouterr().err


def by_hand(weight):
    """The weights that 8 bits stand for, channel by channel."""
    found = np.empty_like(weight)
    for channel, row in enumerate(weight):
        scale = np.float32(np.abs(row).max()) / np.float32(127)
        found[channel] = np.rint(row / scale).astype(np.int8).astype(np.float32) * scale if scale else 0
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_weights_of_each_type(dtype, trained, tmp_path):
    task, checkpoint = trained
    folder = zoo.export(checkpoint, "msnn_resnet12_tiny.mine", tmp_path / "zoo", dtype=dtype)
    kept, back, named = load_file(folder / "model.safetensors"), read_weights(folder), synapses(task.network)
    assert f"| weights | {dtype}, sha256" in (folder / "README.md").read_text(encoding="utf-8")
    assert {key for key, value in kept.items() if value.dtype == torch.int8} == (named if dtype == "int8" else set())
    for key, value in task.network.state_dict().items():
        expected = value.numpy()
        if dtype == "int8" and key in named:
            expected = by_hand(expected)
        elif value.is_floating_point() and (dtype == "float16" or (dtype == "int8" and value.dim() > 1)):
            expected = expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(back[key].numpy(), expected), key


@pytest.mark.parametrize("name", TINY)
def test_8_bits_are_for_weights_that_meet_spikes(name):
    """Found by looking at what each layer is given; integers find the classes that the weights do in float32."""
    network, found = zoo.load(name), set()

    def look(module, args):
        if bool(((args[0] == 0) | (args[0] == 1)).all()):
            label = names[module]
            both = [f"{label}.weight_ih_l0", f"{label}.weight_ih_l0_reverse"]
            found.update(both if isinstance(module, Recurrence) else [f"{label}.weight"])

    names = {m: label for label, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | Recurrence)}
    for module in names:
        module.register_forward_pre_hook(look)
    images = next(iter(zoo.test_data(name).test_dataloader()))[0][:64]
    with torch.no_grad():
        network(images)
    assert found == synapses(network)
    network = zoo.load(name)
    network.load_state_dict(dequantised(stored(network, "int8", name), name))
    with torch.no_grad():
        wide, narrow = network(images), to_integers(network)(images)
    assert (wide.argmax(1) != narrow.argmax(1)).sum() <= 1, "but for rounding at thresholds"


def test_a_converted_network_in_8_bits():
    """The value that a spike stands for is in the weights."""
    network = zoo.load("spiking.resnet18_cifar_c100")
    for module in network.modules():
        if hasattr(module, "scaled_weight"):
            nn.init.normal_(module.neuron.log_scale, std=0.1)
    whole = {n: m.scaled_weight().detach().numpy() for n, m in network.named_modules() if hasattr(m, "scaled_weight")}
    network.load_state_dict(dequantised(stored(network, "int8", "x"), "x"))
    for name, weight in whole.items():
        assert np.array_equal(network.get_submodule(name).scaled_weight().detach().numpy(), by_hand(weight))


def test_an_entry_says_all_arguments_and_no_folder_of_the_machine(small, tmp_path):
    content = torch.load(small) | {"started_from": "/home/somebody/best.ckpt", "teacher": "/home/somebody/t.ckpt"}
    torch.save(content, small)
    folder = zoo.export(small, f"{NETWORK}.mine", tmp_path / "zoo")
    config, card = read_config(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert config["init_from"] == config["teacher"] == "a checkpoint"
    assert "| started from | a checkpoint |" in card
    assert "| teacher | a checkpoint |" in card
    assert "somebody" not in (folder / "config.json").read_text() + card
    arguments = set(signature(MSNN).parameters) - {"mixer_kwargs", "drop_rate", "drop_path_rate"}
    assert arguments <= config["model_args"].keys()


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("mine", "zoo", "an entry is named <architecture>.<tag>, of this package or of a module of yours, not 'mine'"),
        (f"{NETWORK}./../../x", "zoo", "the tag of an entry must be of letters.*, not '/../../x'"),
        (f"{NETWORK}.x", "x.ckpt", "cannot write to the folder '.*x.ckpt'"),
    ],
)
def test_exports_that_are_refused(name, folder, message, small, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        zoo.export(small, name, tmp_path / folder)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_weights_beyond_the_type_are_refused(small, tmp_path):
    content = torch.load(small)
    content["state_dict"]["network.stem.conv.weight"].view(-1)[0] = 1e6
    torch.save(content, small)
    with pytest.raises(ConfigurationError, match=r"stem.conv.weight of .* are not finite in torch.float16"):
        zoo.export(small, f"{NETWORK}.x", tmp_path / "zoo", dtype="float16")


def test_what_cannot_be_measured_is_not_left_behind(small, tmp_path, monkeypatch, capsys):
    content = torch.load(small)
    content["preprocessing"]["data"] = "CIFAR100"
    torch.save(content, small)
    arguments = ["export", str(small), f"{NETWORK}.x", "--out", str(tmp_path / "zoo")]
    with pytest.raises(SystemExit, match="2"):
        main(["zoo", *arguments])
    assert "but CIFAR100 has 3" in capsys.readouterr().err
    assert os.listdir(tmp_path / "zoo") == []

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_msnn.zoo.__main__.measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["zoo", *arguments])
    assert os.listdir(tmp_path / "zoo") == []


def test_an_entry_of_own_data_is_measured_by_its_data_module(trained, tmp_path):
    content = torch.load(trained[1], weights_only=True)
    content["preprocessing"]["data"] = "my_package.MyData"
    torch.save(content, tmp_path / "x.ckpt")
    folder = zoo.export(tmp_path / "x.ckpt", "msnn_resnet12_tiny.mine", tmp_path / "zoo")
    assert json.loads((folder / "config.json").read_text())[FACTS]["data"] == {"class_path": "my_package.MyData"}
    with pytest.raises(ConfigurationError, match="was trained on my_package.MyData, which is not imported"):
        zoo.test_data(folder)
    data = zoo.test_data(folder, Digits(batch_size=250))
    assert zoo.evaluate(trained[0].network, data)["top1_images"] == 359
