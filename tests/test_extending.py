"""The page "Extending": each of its files is written outside of the package and trains by its command."""

import csv
import json
import math
import pickle
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import ROOT, rest_is_slow
from tests.pages import blocks, commands

PAGE = blocks(ROOT / "docs" / "extending.md")
FILES = {block.file: block.text for block in PAGE if block.file}
COMMANDS = {b.heading: commands(b.text)[0] for b in PAGE if b.language == "bash" and b.heading != "Extending"}
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.limit_test_batches", "1"),
]
TEN_STEPS = [
    *(*QUIET, "--trainer.max_steps", "10", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
]


@pytest.fixture
def here(tmp_path, monkeypatch, own_definitions):
    """A folder outside of the package with the page's files."""
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, *more):
    """Run a command of the page for ten steps; return the run's folder and its last checkpoint."""
    program, *args = shlex.split(command)
    assert program == "lightning-msnn"
    main([*args, *TEN_STEPS, "--run.name", "mine", *more])
    folder = Path("runs/mine/version_0").absolute()
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 10
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss_step"]) for row in csv.DictReader(file) if row.get("train/loss_step")]
    assert len(losses) == 10
    assert all(map(math.isfinite, losses))
    return folder, content


IN_A_NETWORK = {
    "A projection": ("projection", "softsign", "sine"),
    "A surrogate gradient": ("surrogate", "gaussian", "triangular"),
    "A kind of windows": ("windows", "halves", "alternate"),
}


@pytest.mark.parametrize("heading", rest_is_slow(IN_A_NETWORK, ["A projection"]))
def test_what_is_in_a_network(here, heading):
    """It is what the trained network computes with: with the package's own in its place, the network is another."""
    argument, name, ours = IN_A_NETWORK[heading]
    _, content = run(COMMANDS[heading], "--run.test", "false", "--run.monitors", "false")
    given = content["hyper_parameters"]["network_kwargs"]
    assert given[argument] == name
    task = SpikingClassifier.load_from_checkpoint("runs/mine/version_0/checkpoints/last.ckpt", weights_only=True)
    mine = pickle.loads(pickle.dumps(task.network)).train()  # as processes that are spawned receive it
    other = timm.create_model("msnn_resnet12_tiny", num_classes=10, in_chans=1, **{**given, argument: ours}).train()
    other.load_state_dict(mine.state_dict())
    images = torch.randn(8, 1, 16, 16)
    made = []
    for network in (mine, other):
        x = images.clone().requires_grad_()
        y = network(x)
        made.append((y, *torch.autograd.grad(y.square().sum(), x)))
    (y, grad), (y_other, grad_other) = made
    assert y.isfinite().all()
    assert grad.isfinite().all()
    assert argument == "surrogate" or (y - y_other).norm() > 0.05 * y.norm(), "beyond rounding"
    assert (grad - grad_other).norm() > 0.05 * grad.norm()
    if argument == "projection":  # learnt from 0.25
        thetas = [torch.sigmoid(p) for n, p in mine.named_parameters() if n.endswith("theta_logit")]
        assert any(abs(theta.item() - 0.25) > 1e-4 for theta in thetas)


@pytest.mark.slow
def test_a_token_mixer_its_entry_and_its_report(here, monkeypatch, capsys):
    _, content = run(COMMANDS["A token mixer"])
    assert content["hyper_parameters"]["network"] == "depthwise12_tiny"
    network = SpikingClassifier.load_from_checkpoint(
        "runs/mine/version_0/checkpoints/last.ckpt", weights_only=True
    ).network
    mixers = [module for module in network.modules() if type(module).__name__ == "DepthwiseMixer"]
    assert len(mixers) == 12
    assert all(mixer.isolated for mixer in mixers)
    # Two convolutions, as seen from outside.
    assert [type(m).__name__ for m in mixers[0].modules() if isinstance(m, nn.Conv2d)] == ["CentredConv2d"] * 2
    checkpoint = "runs/mine/version_0/checkpoints/last.ckpt"
    main(["zoo", "export", checkpoint, "depthwise12_tiny.mine", "--out", "entries", "--imports", "depthwise.py"])
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(here / "entries"))
    main(["zoo", "verify", "depthwise12_tiny.mine", "--imports", "depthwise.py"])
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(zoo.load("depthwise12_tiny.mine")(x), network.eval()(x))
    main(["report", checkpoint, "--out", "page.html", "--samples", "8", "--imports", "depthwise.py"])
    assert "depthwise12_tiny" in Path("page.html").read_text()


@pytest.mark.slow
def test_an_energy_profile(here):
    folder, _ = run(COMMANDS["An energy profile"])
    content = json.loads((folder / "energy.json").read_text())
    assert content["profile"] == "my_chip"
    column = next(iter(content["columns"].values()))
    counts = column["counts"]
    picojoules = (
        2.0 * counts["accumulates"]
        + 10.0 * counts["multiply_accumulates"]
        + 1.0 * counts["neurons"]
        + 10.0 * counts["membrane_updates"]
    )
    assert picojoules > 0
    assert column["energy"]["total"] == pytest.approx(1e-12 * picojoules, rel=1e-9)
    assert "omega_operations" in column["without_figure"]


def test_a_data_set(here):
    _, content = run(COMMANDS["A data set"])
    assert content["datamodule_hyper_parameters"]["noise"] == 0.3
    assert content["cli"]["data"] == "bars.Bars"
    given = content["hyper_parameters"]
    assert (given["num_classes"], given["in_chans"]) == (2, 1)
    assert content["class_names"] == ["row", "column"]
    images, targets = sys.modules["bars"].Bars(noise=0.3).read("train")
    bright = (images[:, 0] == 1.0).double()
    assert torch.equal(bright.sum((1, 2)), torch.full((1000,), 16.0).double())
    assert torch.equal(bright.mean(2).amax(1) == 1.0, targets == 0)


@pytest.mark.slow
def test_a_task(here):
    _, content = run(COMMANDS["A task"])
    assert content["cli"]["model"] == "margin.MarginClassifier"
    task = sys.modules["margin"].MarginClassifier.load_from_checkpoint(
        "runs/mine/version_0/checkpoints/last.ckpt", weights_only=True
    )
    logits, targets = torch.randn(3, 10), torch.tensor([1, 7, 0])
    expected = [
        sum(max(0.0, 1.0 - float(y[t]) + float(v)) for i, v in enumerate(y) if i != t) / 10
        for y, t in zip(logits, targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(task.losses(logits, targets), torch.tensor(expected))
    assert content["callbacks"]
    assert not hasattr(task, "mixer"), "no classifier of the package"
