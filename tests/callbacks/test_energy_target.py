"""Training towards a rate or an energy: what a step measures, the weight of its excess, and where trainings end."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_msnn.callbacks import EMA, BestCheckpoint, EnergyTarget, Teacher
from lightning_msnn.conversion import calibrate
from lightning_msnn.data import Digits
from lightning_msnn.energy import count_operations, energy
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.metrics import Total
from lightning_msnn.nn import Spike
from lightning_msnn.tasks import SpikingClassifier, Task
from tests.callbacks.training import ENTRY, NETWORK, RELU, fit, quiet


class ToyNetwork(nn.Module):
    """Neurons without weights: a current with a shift that learns, and a synapse."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.spike = Spike()
        self.synapse = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.synapse(self.spike(x + self.shift)).mean((2, 3))


class Toy(Task):
    """A shift whose own loss wants it at 0.5, where half of the neurons fire."""

    def __init__(self, shift):
        super().__init__(
            num_classes=3, in_chans=4, network_kwargs={"depths": (1,), "widths": (8,)}, lr=0.04, warmup_epochs=0
        )
        self.network = ToyNetwork(shift)

    def setup(self, stage):
        self._groups = [{"params": ["shift"], "weight_decay": 0.0}]

    def losses(self, outputs, targets):
        return (self.network.shift - 0.5).square().expand(len(outputs))

    def rate(self):
        return float((torch.randn(200_000) + self.network.shift.detach() >= 0.5).float().mean())


def train(toy, target, steps=300):
    data = TensorDataset(torch.randn(32 * 50, 4, 8, 8), torch.zeros(32 * 50, dtype=torch.int64))
    trainer = quiet(Path(), target, max_steps=steps, max_epochs=-1)
    trainer.fit(toy, DataLoader(data, 32), DataLoader(TensorDataset(*data[:64]), 32))
    return toy.rate()


def test_the_multiplier_is_found():
    """The rate is the target, whatever the shift's own loss wants."""
    target = EnergyTarget(rate=0.1)
    assert train(Toy(0.5), target) == pytest.approx(0.1, rel=0.08)
    assert target.state_dict()["multiplier"] > 0.0
    assert target.counted["rate"] == pytest.approx(0.1, rel=0.08)


def test_an_energy_becomes_a_rate():
    toy = Toy(0.5)
    record = count_operations(toy.network, torch.randn(64, 4, 8, 8))
    wanted = float(energy(record)) - 0.5 * float(energy(record, by="kind")["accumulates"])
    target = EnergyTarget(energy=wanted)
    train(toy, target)
    record = count_operations(toy.network, torch.randn(64, 4, 8, 8))
    assert float(energy(record)) == pytest.approx(wanted, rel=0.08)
    assert target.counted["energy"] == pytest.approx(wanted, rel=0.08)


def test_what_needs_less_than_the_target_is_left_alone():
    toy, target = Toy(0.0), EnergyTarget(rate=0.9)
    train(toy, target, steps=100)
    assert toy.network.shift.item() == pytest.approx(0.5, abs=0.05)
    assert target.state_dict()["multiplier"] == 0.0


@pytest.mark.parametrize("name", ["msnn_resnet12_tiny", "msnn_vit12_tiny", "msnn_rnn12_tiny", "converted"])
def test_a_step_measures_about_what_evaluation_counts(name, tmp_path):
    """Validation corrects the rest: products that are in no layer with weights."""
    if name == "converted":
        network, images = timm.create_model("spiking", source="test_resnet", num_classes=10), torch.rand(8, 3, 16, 16)
        calibrate(network, images)
    else:
        network, images = timm.create_model(name, depths=(1, 1), widths=(24, 24)), torch.randn(8, 3, 16, 16)
    network(images)
    task, target = SpikingClassifier(network_kwargs=NETWORK), EnergyTarget(rate=0.1)
    task.network = network
    task.trainer = quiet(tmp_path, max_steps=1)
    target._total = Total(network)
    target._count(task, images)
    target._find_layers(network)
    target._watch(network)
    counted = target._measured()["rate"]
    network.eval()(images)
    assert target.measure().item() == pytest.approx(counted, rel=0.35)
    assert target.measure().requires_grad


def test_only_networks_at_their_target_are_kept(tmp_path):
    options = {"trainer": {"enable_checkpointing": True, "num_sanity_val_steps": 1}}
    best, target = BestCheckpoint(), EnergyTarget(rate=0.001)
    with pytest.warns(UserWarning, match="was above its target of rate or energy at every validation"):
        _, trainer = fit(tmp_path, target, EMA(0.9), best, **options)
    assert not best.best_model_path
    assert {"train/rate", "train/multiplier", "val/rate", "val/energy"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["val/rate"]) == pytest.approx(target.counted["rate"])
    other = BestCheckpoint("val/rate", "min")
    fit(tmp_path / "other", EnergyTarget(rate=0.9), other, **options)
    assert Path(other.best_model_path).is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0.1, "energy": 1e-6}, "a rate or an energy, not rate 0.1 and energy 1e-06"),
        ({"rate": 0.0}, "rate of EnergyTarget must be above 0 and at most 1, not 0.0"),
        ({"energy": float("nan")}, "must be joules of an image, above 0, not nan"),
    ],
)
def test_targets_that_are_none(given, message):
    with pytest.raises(ConfigurationError, match=message):
        EnergyTarget(**given)


def test_a_teacher_gets_no_share_of_the_excess(tmp_path):
    target = EnergyTarget(rate=0.001)
    _, trainer = fit(tmp_path, target, Teacher(ENTRY), data=Digits(batch_size=16, num_workers=0))
    assert trainer.callbacks[-1] is target


def test_networks_and_targets_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigurationError, match="no layer of MSNNResNet receives spikes"):
        fit(tmp_path, EnergyTarget(rate=0.1), network_kwargs=RELU)
    with pytest.raises(ConfigurationError, match="must be above .* joules, which an image costs without any spike"):
        fit(tmp_path, EnergyTarget(energy=1e-12))
