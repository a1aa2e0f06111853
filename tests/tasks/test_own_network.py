"""A network of the user's own in a task: by the path of its class, or as a module."""

import shlex

import pytest
import timm
import torch
from torch import nn

from lightning_msnn.callbacks import Convert, EnergyMonitor, EnergyTarget, SpikeRateMonitor, Teacher
from lightning_msnn.cli import main
from lightning_msnn.conversion import converted_layers
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Spike
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.trained import load_trained
from tests.callbacks.training import fit
from tests.conftest import ROOT
from tests.pages import blocks, commands


class Own(nn.Module):
    """A small CNN that knows nothing of this package but perhaps its neurons."""

    def __init__(self, width=8, num_classes=10, spiking=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.fire = Spike() if spiking else nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.conv2(self.fire(self.conv1(x))).relu().mean((2, 3)))


class Wider(Own):
    """One that hands its arguments on."""

    def __init__(self, width=16, **kwargs):
        super().__init__(width, **kwargs)


PAGE = ROOT / "docs" / "own-network.md"
PATH = f"{__name__}.Own"
IMAGES = torch.randn(4, 1, 8, 8)


def test_a_class_is_made_again_from_the_checkpoint(tmp_path):
    task, _ = fit(tmp_path, network=PATH, network_kwargs={"width": 4})
    assert task.network.conv1.out_channels == 4
    assert SpikingClassifier(f"{__name__}.Wider", num_classes=7).network.head.weight.shape == (7, 16)
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    trained = load_trained(tmp_path / "x.ckpt")
    for network in (again.network, trained.network):
        assert torch.equal(network(IMAGES), task.network(IMAGES))
    teacher, monitors = Teacher(tmp_path / "x.ckpt"), (SpikeRateMonitor(1), EnergyMonitor(every_n_steps=1))
    spiking = {"network": PATH, "network_kwargs": {"spiking": True}}
    _, trainer = fit(tmp_path / "s", teacher, EnergyTarget(rate=0.1), *monitors, **spiking)
    assert trainer.callback_metrics["val/energy"] > 0


@pytest.mark.parametrize("given", ["class", "module"])
def test_a_converted_one_is_made_again_too(given, tmp_path):
    network = PATH if given == "class" else Own()
    task, _ = fit(tmp_path, Convert(), network=network, network_kwargs={})
    assert list(converted_layers(task.network)) == ["conv2"]
    if given == "class":
        assert converted_layers(network_of(read_checkpoint(tmp_path / "x.ckpt"), "x.ckpt"))
    more = {} if given == "class" else {"network": Own()}
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True, **more)
    assert torch.equal(again.eval()(IMAGES), task.eval()(IMAGES))


def test_a_module_must_be_given_again(tmp_path):
    task, _ = fit(tmp_path, network=Own(), network_kwargs={})
    with pytest.raises(ConfigurationError, match=r"was given as a module, Own\(\): give one again"):
        SpikingClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True, network=Own())
    assert torch.equal(again(IMAGES), task(IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "nowhere.Net"}, "unknown network 'nowhere.Net': .* a class of yours that is imported"),
        ({"network": PATH, "pretrained": True}, "pretrained must be false, an entry or a checkpoint with .*Own"),
        ({"network": Own(), "network_kwargs": {"width": 4}}, r"network_kwargs are for .* not for Own\(\)"),
        ({"network": torch.compile(Own())}, "a compiled network renames its weights"),
        ({"network": timm.create_model("test_resnet", num_classes=3)}, "num_classes is 10, but the network .* has 3"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**options)


def test_the_page(tmp_path, monkeypatch, own_definitions):
    """Its commands and its script, with one batch of each part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    short = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    for part in ("train", "val", "test"):
        short += [f"--trainer.limit_{part}_batches", "1"]
        monkeypatch.setenv(f"PL_TRAINER_LIMIT_{part.upper()}_BATCHES", "1")
    network, script = (block.text for block in blocks(PAGE, "python"))
    (tmp_path / "mynet.py").write_text(network)
    (block,) = blocks(PAGE, "bash")
    for line in commands(block.text):
        main([*shlex.split(line)[1:], *short])
    exec(compile(script, PAGE.name, "exec"), {})
