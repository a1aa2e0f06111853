"""Training towards a rate or an energy: what a step measures, the weight of its excess, and where trainings end."""

import copy
import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, BestCheckpoint, SpikeAnnealing, ThetaScheduler
from lightning_msnn.cli import MSNNCLI, main
from lightning_msnn.conversion import RectifierSpike
from lightning_msnn.data import Digits
from lightning_msnn.dial import fit_arguments
from lightning_msnn.energy import OperationCounter, count_operations, energy, synaptic_operations
from lightning_msnn.energy.expected import CostOfRates
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import SOFT
from lightning_msnn.nn import Neuron, Projection, Spike, set_annealing
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.tasks.dial import TOLERANCE, WARMUP, Dial
from tests.models.test_registry import lively
from tests.runs.test_resume import run, same

ENTRY = "msnn_resnet12_tiny.digits"
SMALL = {"depths": (1, 1, 1, 1), "widths": (24, 24, 24, 24)}
NETWORKS = {
    "resnet": ("msnn_resnet12_tiny", SMALL),
    "isolated": ("msnn_resnet12_tiny", SMALL | {"context": "isolated"}),
    "paper": ("msnn_resnet12_tiny", SMALL | {"preset": "paper"}),
    "attention": ("msnn_vit12_tiny", SMALL),
    "recurrent": ("msnn_rnn12_tiny", SMALL),
    "spiking cell": ("msnn_rnn12_tiny", {"depths": (1, 1), "widths": (24, 24), "cell": "spiking_lstm"}),
}
"""One for each way in which spikes come about."""


def make(kind):
    name, kwargs = NETWORKS[kind]
    return lively(timm.create_model(name, num_classes=10, **kwargs))


@pytest.mark.parametrize("kind", NETWORKS)
def test_cost_of_measured_rates_is_what_the_engine_counts(kind):
    network = make(kind)
    images = torch.randn(16, 3, 32, 32)
    dial = Dial(network, target_rate=0.1)
    dial.prepare(network, images)
    torch.manual_seed(1)
    with torch.no_grad(), dial.watching(network):
        network(images)
    measured = dial.measured()
    torch.manual_seed(1)
    record = count_operations(network, images)
    accumulates, joules = float(synaptic_operations(record)["accumulates"]), float(energy(record))
    assert float(measured["rate"]) * dial.cost.most == pytest.approx(accumulates, rel=0.05)
    assert float(measured["energy"]) == pytest.approx(joules, rel=0.05)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_against_the_regulariser_alone_lowers_what_it_measures(kind):
    network, images = make(kind).train(), torch.randn(16, 3, 32, 32)
    dial = Dial(network, target_rate=0.1)
    dial.prepare(network, images)
    state = copy.deepcopy(network.state_dict())
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        with dial.watching(network):
            network(images)
        values.append(dial.measured()["rate"])
        if len(values) == 1:
            gradients = torch.autograd.grad(values[0].log(), list(network.parameters()), allow_unused=True)
            network.load_state_dict(state)
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter -= 0 if gradient is None else 0.02 * gradient.sign()
    assert float(values[1]) < 0.99 * float(values[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("threshold", [0.5, 1.25])
def test_exact_spikes_are_told_while_annealing(soft, share, threshold):
    spike = Spike(Neuron(threshold=threshold))
    membrane = torch.randn(8, 4, 6, 6)
    exact = (membrane >= threshold).float()
    set_annealing(spike, share, soft)
    assert torch.equal(spike.train().told(spike(membrane)), exact)
    assert torch.equal(spike.eval().told(spike(membrane)), exact)
    rectifier = RectifierSpike(4, 2)
    with torch.no_grad():
        rectifier.log_threshold.copy_(torch.tensor([0.2, 0.5, 1.0, 3.0]).log())
        rectifier.log_scale.copy_(torch.tensor([0.5, 0.9, 2.0, 4.0]).log())
    values = membrane.relu()
    set_annealing(rectifier, share, soft)
    expected = (values >= rectifier.log_threshold.detach().exp().view(4, 1, 1)).float()
    assert torch.equal(rectifier.train().told(rectifier(values)), expected)


def test_annealed_spikes_are_measured_as_spikes():
    network, images = make("resnet").train(), torch.randn(16, 3, 32, 32)
    set_annealing(network, 0.4)
    dial = Dial(network, target_rate=0.1)
    dial.prepare(network, images)
    with dial.watching(network):
        network(images)
    measured = dial.measured()["rate"]
    rates = {}

    def note(name, spike, args, out):
        membrane = args[0]
        rates[name] = (membrane >= spike.threshold).float().mean()

    # By the equations, neurons without windows are handed their membrane.
    single = lively(timm.create_model("msnn_resnet12_tiny", num_classes=10, **SMALL, windows="single")).train()
    set_annealing(single, 0.4)
    other = Dial(single, target_rate=0.1)
    other.prepare(single, images)
    with other.watching(single):
        single.double()(images.double())
    seen = other.measured()["rate"]
    for name, module in single.named_modules():
        if isinstance(module, Spike):
            module.register_forward_hook(partial(note, name))
    with OperationCounter(single):  # which leaves no layer to a kernel
        single(images.double())
    assert float(seen) == pytest.approx(float(other.cost.rate(rates)), rel=1e-3)
    assert 0.0 < float(measured) < 0.6
    assert measured.requires_grad


class Toy(nn.Module):
    """Neurons without weights: a current with a shift that learns, and a synapse."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.spike = Spike()
        self.synapse = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.synapse(self.spike(x + self.shift))


def train(toy, dial, steps=400, lr=0.02, wanted=0.5):
    """Let a shift go where its own loss and the regulariser have it."""
    optimizer = torch.optim.Adam([toy.shift], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        images = torch.randn(32, 4, 8, 8)
        dial.prepare(toy, images)
        with dial.watching(toy):
            toy(images)
        own = (toy.shift - wanted).square()
        loss = own + dial.loss(dial.measured(), i / steps, 1.0 / steps, lambda x: x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float((torch.randn(200_000) + toy.shift.detach() >= 0.5).float().mean())


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
def test_the_multiplier_is_found(target):
    """The rate is the target, whatever the shift's own loss wants, which is a rate of a half."""
    toy = Toy(0.5)
    dial = Dial(toy, target_rate=target)
    assert train(toy, dial) == pytest.approx(target, rel=0.03)
    assert float(dial.multiplier) > 0.0


def test_what_needs_less_than_the_target_is_left_alone():
    toy, other = Toy(0.0), Toy(0.0)
    dial, high = Dial(toy, target_rate=0.9), Dial(other, target_rate=0.999)
    torch.manual_seed(2)
    train(toy, dial)
    torch.manual_seed(2)
    train(other, high)
    assert float(toy.shift) == float(other.shift) == pytest.approx(0.5, abs=0.01)
    assert float(dial.multiplier) == 0.0


def test_it_goes_by_what_validation_counts():
    """Where evaluation costs twice what a step measures, a step is to measure half."""
    toy = Toy(0.5)
    dial = Dial(toy, target_rate=0.2)
    images = torch.randn(64, 4, 8, 8)
    dial.prepare(toy, images)
    train(toy, dial, steps=1)
    before = float(dial._state["mean"])
    assert not dial.met, "nothing was counted yet"
    doubled = copy.deepcopy(toy)
    doubled.shift.data.fill_(9.0)  # all neurons fire
    assert dial.settle(0.1, lambda x: x) == {}, "a validation that counted nothing says nothing"
    dial.count(doubled, lambda: doubled(images))
    found = dial.settle(WARMUP - 0.01, lambda x: x)
    assert found["rate"] == 1.0
    assert float(dial._state["ratio"]) == pytest.approx(min(2.0, 1.0 / before))
    assert not dial.met
    assert dial.settle(0.2, lambda x: x) == {}, "a validation that counted nothing says nothing"
    assert dial.counted == 1.0
    dial.count(toy, lambda: toy(images - 1.0))
    dial.settle(0.2, lambda x: x)
    assert dial.met == (dial.counted <= 0.2 * (1.0 + TOLERANCE))


def test_the_aim_moves():
    """At the start nothing is asked for; the same rate is an excess later on."""
    losses, images = [], torch.randn(64, 4, 8, 8)
    for progress in (0.0, WARMUP / 2, WARMUP):
        toy = Toy(0.5)
        dial = Dial(toy, target_rate=0.1)
        dial.prepare(toy, images)
        with dial.watching(toy):
            toy(images)
        losses.append(float(dial.loss(dial.measured(), progress, 0.01, lambda x: x)))
    assert losses[0] == pytest.approx(0.0, abs=1e-4)
    assert 0.0 < losses[1] == pytest.approx(losses[2] / 2, rel=1e-3)


def test_its_state_is_plain_and_goes_on():
    toy = Toy(0.5)
    dial = Dial(toy, target_rate=0.1)
    train(toy, dial, steps=20)
    again = Dial(toy, target_rate=0.1)
    again.load_state_dict(dial.state_dict())
    assert all(isinstance(value, float | None) for value in dial.state_dict().values())
    images = torch.randn(16, 4, 8, 8)
    losses = []
    for each in (dial, again):
        each.prepare(toy, images)
        with each.watching(toy):
            toy(images)
        losses.append(each.loss(each.measured(), 0.5, 0.01, lambda x: x))
    assert losses[0].item() == losses[1].item()
    assert dial.state_dict() == again.state_dict()


@pytest.mark.parametrize("change", [{"multiplier": "1"}, {"ratio": float("nan")}, {"counted": [1.0]}, {"steps": None}])
def test_a_state_that_is_none(change):
    dial = Dial(Toy(0.5), target_rate=0.1)
    with pytest.raises(ConfigurationError, match="the dial of a checkpoint must be numbers by name, not"):
        dial.load_state_dict(dial.state_dict() | change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_rate": 0.0}, "target_rate must be above 0"),
        ({"target_rate": 1.5}, "target_rate must be a number in"),
        ({"target_energy": -1.0}, "target_energy must be joules of a sample, above 0, not -1.0"),
        ({"target_energy": float("nan")}, "target_energy must be joules"),
        ({"target_energy": True}, "target_energy must be joules"),
        ({"target_energy": 1e-6, "target_rate": 0.1}, "target_rate must not be given beside target_energy"),
        ({"target_rate": 0.1, "twin": "relu"}, "target_rate must be left out, not 0.1: MSNNResNet has no neurons"),
        ({"target_energy": 1e-5, "network": "resnet18"}, "target_energy must be left out.*ResNet has no neurons"),
    ],
)
def test_targets_that_are_none(given, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**given)


def fit(folder, callbacks=(), epochs=1, **task):
    pl.seed_everything(0, verbose=False)
    module = SpikingClassifier(ENTRY, in_chans=1, pretrained=True, lr=4e-3, warmup_epochs=0.2, **task)
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        limit_train_batches=12, callbacks=list(callbacks), default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, BestCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=32, image_size=16, num_workers=0))
    return module, trainer


def test_a_target_below_what_no_spike_needs(tmp_path):
    with pytest.raises(
        ConfigurationError, match="target_energy must be above .* joules, which a sample .* if no neuron"
    ):
        fit(tmp_path, target_energy=1e-12)


def test_both_are_logged_and_only_networks_at_their_target_are_kept(tmp_path):
    best = BestCheckpoint()
    with pytest.warns(UserWarning, match="was above its target of rate or energy at every validation"):
        module, trainer = fit(tmp_path, [EMA(0.9), best], target_rate=0.001)
    assert not best.best_model_path
    logged = trainer.callback_metrics
    assert {f"{part}/{what}" for part in ("train", "val") for what in ("rate", "energy")} <= logged.keys()
    assert float(logged["val/rate"]) == pytest.approx(module.dial.counted)
    assert not module.at_target
    other = BestCheckpoint()
    fit(tmp_path / "other", [other], target_rate=0.9)
    assert Path(other.best_model_path).is_file()


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [SpikeAnnealing(until=0.9)], "precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "task": {"network": "msnn_rnn12_tiny"}},
        {"task": {"teacher": ENTRY, "teacher_weight": 0.5}},
        {"task": {"network": "resnet18_cifar", "convert": True, "network_kwargs": {"channels": [8] * 4}}},
    ],
    ids=["annealed in bf16", "accumulated, recurrent", "taught", "converted"],
)
def test_a_training_that_is_interrupted_goes_on_exactly(tmp_path, options):
    """With everything else that a training may have."""
    options = {**options, "task": {"target_rate": 0.05, **options.get("task", {})}, "max_epochs": 2}
    data = partial(Digits, batch_size=16)
    _, whole, module = run(tmp_path / "a", data(), **copy.deepcopy(options))
    run(tmp_path / "b", data(), kill=3, **copy.deepcopy(options))
    _, resumed, again = run(tmp_path / "b", data(), seed=8, resume=True, **copy.deepcopy(options))
    assert same(whole, resumed)
    assert again.dial.state_dict() == module.dial.state_dict()
    assert module.dial.state_dict()["multiplier"] > 0.0


@pytest.mark.filterwarnings("ignore:no best.ckpt is kept")  # of the second, which takes two steps
def test_the_verb_dial(tmp_path, monkeypatch, capsys):
    """A part of the operations of an entry, counted on test images with the weights that are kept."""
    monkeypatch.chdir(tmp_path)
    main([
        "dial", ENTRY, "--operations", "0.8", "--data.batch_size", "32", "--model.lr", "0.004", "--run.ema", "0.9",
        "--trainer.max_epochs", "4", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
        "--run.test", "false",
    ])  # fmt: skip
    path = tmp_path / "runs/dial/version_0/checkpoints/best.ckpt"
    content = read_checkpoint(path)
    network, original = network_of(content, path).eval(), zoo.load(ENTRY)
    data = Digits(image_size=16, num_workers=0)
    data.prepare_data()
    data.setup("test")
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in data.test_dataloader()])
    before, after = (
        float(synaptic_operations(count_operations(each, images))["accumulates"]) for each in (original, network)
    )
    assert after == pytest.approx(0.8 * before, rel=0.05)
    assert zoo.evaluate(network, data)["top1"] > zoo.evaluate(original, data)["top1"] - 1.0
    # From the checkpoint on, in joules.
    arguments = content["hyper_parameters"]
    assert arguments["teacher"] == ENTRY
    with pytest.raises(SystemExit):
        main(["dial", str(path), "--energy", "0.2", "--samples", "16"])
    assert "energy must be above 0." in capsys.readouterr().err
    main([
        "dial", str(path), "--energy", "0.95", "--samples", "16", "--trainer.max_steps", "2", "--run.test", "false",
        "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--run.name", "again",
    ])  # fmt: skip
    assert (tmp_path / "runs/again/version_0/checkpoints/last.ckpt").is_file()


def test_a_dial_begins_with_what_was_trained(tmp_path, monkeypatch):
    """A fixed theta that a schedule has moved; images that an entry was trained on choose nothing."""
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1)
    trainer = pl.Trainer(max_steps=2, logger=False, accelerator="cpu", enable_progress_bar=False,
                         enable_checkpointing=False, limit_val_batches=0, enable_model_summary=False,
                         callbacks=ThetaScheduler("linear", theta=0.25, end=0.9, interval="step"))  # fmt: skip
    trainer.fit(task, datamodule=Digits(image_size=16, num_workers=0))
    trainer.save_checkpoint(tmp_path / "moved.ckpt")
    theta = next(float(module.theta) for module in task.modules() if isinstance(module, Projection))
    assert theta > 0.3
    found = fit_arguments([str(tmp_path / "moved.ckpt"), "--operations", "0.5", "--samples", "8"])
    (kwargs,) = (json.loads(word.partition("=")[2]) for word in found if word.startswith("--model.network_kwargs="))
    assert kwargs["theta"] == pytest.approx(theta)
    said = zoo.info(ENTRY) | {"settings": {"val_fraction": 0.3}}
    monkeypatch.setattr(zoo, "info", lambda name: said)
    assert "--data.val_fraction=0.3" in fit_arguments([ENTRY, "--operations", "0.5", "--samples", "8"])


def test_the_recipe_leaves_the_network_that_is_dialled(monkeypatch):
    seen = []

    def stop(self):
        seen.append(self.config.fit.model.init_args)
        raise KeyboardInterrupt

    monkeypatch.setattr(MSNNCLI, "before_instantiate_classes", stop)
    other = "msnn_vit12_tiny.digits"
    with pytest.raises(KeyboardInterrupt):
        main(["dial", other, "--operations", "0.5", "--samples", "8", "--config", "recipe/dial"])
    assert (seen[0].network, seen[0].pretrained, seen[0].teacher) == (other, True, other)
    assert seen[0].teacher_features == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [ENTRY, "--operations", "1.5"],
            "operations must be a share of what the network needs now, in (0, 1), not 1.5",
        ),
        ([ENTRY, "--energy", "0"], "energy must be a share of what the network needs now"),
        ([ENTRY, "--energy", "0.5", "--operations", "0.5"], "not allowed with argument"),
        ([ENTRY], "one of the arguments --energy --operations is required"),
        ([ENTRY, "--energy", "0.9", "--samples", "0"], "samples must be an integer of at least 1, not 0"),
        (["msnn_resnet12_tiny.digit", "--energy", "0.9"], "msnn_resnet12_tiny.digit"),
        (["msnn_resnet12.c100_relu", "--energy", "0.9", "--root", "/nowhere"], "/nowhere"),
        ([__file__, "--energy", "0.9"], "a checkpoint must be a file .ckpt"),
    ],
)
def test_the_verb_dial_refuses(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["dial", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cost_of_rates_of_all_and_of_none():
    network = make("resnet")
    cost = CostOfRates(network, torch.randn(1, 3, 32, 32))
    ones, zeros = ({name: torch.full((3,), value) for name in cost.layers} for value in (1.0, 0.0))
    assert float(cost.rate(ones)) == pytest.approx(1.0)
    assert float(cost.joules(zeros)) == pytest.approx(cost.least)
    assert set(cost.layers) <= {name for name, _ in network.named_modules()}
    with pytest.raises(ConfigurationError, match="has no layer of neurons"):
        CostOfRates(nn.Linear(3, 3), torch.randn(1, 3))


def test_cost_of_rates_of_neurons_that_return_their_state_too():
    class Fires(nn.Module):
        threshold = 0.5

        def forward(self, x):
            return (x >= self.threshold).float(), x

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fire, self.linear = Fires(), nn.Linear(4, 6)

        def forward(self, x):
            spikes, _ = self.fire(x)
            return self.linear(spikes)

    cost = CostOfRates(Network(), torch.randn(1, 4))
    assert (cost.layers, cost.most) == (["fire"], 24.0)
    assert float(cost.accumulates({"fire": torch.tensor(0.5)})) == pytest.approx(12.0)
