"""A network that learns from another."""

import math

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, Convert, SpikeAnnealing, Teacher
from lightning_msnn.callbacks.teacher import block_loss, block_names, distillation_loss
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Rectifier, synapse
from lightning_msnn.runs import RandomState, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import ENTRY, RELU, fit


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_by_hand(temperature):
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (F.softmax(x / temperature, 1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum() / 5
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-6)
    extreme = torch.tensor([[1e4, -1e4]])
    assert math.isfinite(distillation_loss(-extreme, extreme, temperature).item())


def test_the_loss_of_blocks_by_hand():
    ours, theirs = ({name: torch.randn(3, 2, 4, 4, dtype=torch.float64) for name in "ab"} for _ in range(2))
    expected = sum(((ours[k] - theirs[k]) ** 2).sum() / (theirs[k] ** 2).sum() for k in "ab") / 2
    torch.testing.assert_close(block_loss(ours, theirs).double(), expected, rtol=1e-5, atol=0)
    assert block_loss(ours, ours) == 0


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("msnn_resnet12_tiny", ["stages.0.blocks.0", "stages.1.blocks.0"]),
        ("msnn_rnn12_tiny", ["stages.0.blocks.0", "stages.1.blocks.0"]),
        ("test_resnet", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
    ],
)
def test_names_of_blocks(network, expected):
    kwargs = {} if network == "test_resnet" else {"depths": (1, 1), "widths": (8, 8)}
    assert [n for n in block_names(timm.create_model(network, **kwargs)) if n[-1].isdecimal()][-4:] == expected


class Watch(pl.Callback):
    """Keep what a training logs in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_a_share_of_the_loss_is_the_teachers(tmp_path):
    losses = {}
    for weight in (0.25, 0.75, 1.0):
        fit(tmp_path, Teacher(ENTRY, weight), watch := Watch(), trainer={"max_steps": 1})
        losses[weight] = watch.seen[0]["train/loss_step"], watch.seen[0]["train/distillation"]
    assert losses[1.0][0] == pytest.approx(losses[1.0][1])
    (quarter, distilled), (most, _) = losses[0.25], losses[0.75]
    labels = (quarter - 0.25 * distilled) / 0.75
    assert most == pytest.approx(0.25 * labels + 0.75 * distilled, rel=1e-5)
    assert labels != pytest.approx(distilled, rel=0.01)


def test_a_teacher_is_fixed_and_in_no_checkpoint(tmp_path):
    teacher = Teacher(ENTRY)
    module, _ = fit(tmp_path, teacher, EMA(0.9), epochs=2, trainer={"precision": "bf16-mixed"})
    network = teacher.network
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not any(isinstance(m, nn.BatchNorm2d) and m is not network.norm for m in network.modules())
    images = torch.randn(8, 1, 16, 16)
    said = zoo.load(ENTRY, fuse=True).bfloat16()(images.bfloat16()).float()
    assert (teacher(images).float() - said).abs().mean() < 0.2 * said.abs().mean()
    plain, _ = fit(tmp_path / "plain")
    assert module.state_dict().keys() == plain.state_dict().keys()
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert content["state_dict"].keys() == plain.state_dict().keys()
    assert content["teacher"] == ENTRY


def test_small_maps_are_matrix_products(tmp_path, monkeypatch):
    teacher = Teacher(ENTRY)
    fit(tmp_path, teacher, trainer={"max_steps": 1})
    pointwise, seen = synapse._pointwise, []

    def spy(x, *others):
        seen.append(tuple(x.shape[2:]))
        return pointwise(x, *others)

    monkeypatch.setattr(synapse, "_pointwise", spy)
    images = torch.randn(40, 1, 16, 16)
    with torch.no_grad():
        expected = zoo.load(ENTRY)(images)
    agree = (teacher(images) - expected).abs().amax(1) < 1e-3  # others have a membrane next to its threshold
    assert agree.float().mean() > 0.9
    assert set(seen) == {(2, 2), (1, 1)}


def test_a_student_needs_teacher_and_start_no_longer(tmp_path):
    fit(tmp_path, network_kwargs=RELU)
    made = tmp_path / "x.ckpt"
    teacher = Teacher(made)
    student, _ = fit(tmp_path / "student", teacher, pretrained=made)  # paths
    assert isinstance(teacher.network.stages[0].blocks[0].encoder1.spike, Rectifier)
    made.unlink()
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "student" / "x.ckpt", weights_only=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    with pytest.raises(ConfigurationError, match=r"no checkpoint at .*x\.ckpt"):
        fit(tmp_path, Teacher(str(made)))


def test_a_student_starts_as_its_relu_baseline(tmp_path):
    baseline, _ = fit(tmp_path, network_kwargs=RELU)
    student = SpikingClassifier("msnn_resnet12_tiny", 10, 1, RELU | {"spiking": True}, str(tmp_path / "x.ckpt"))
    trained, parameters = baseline.network.state_dict(), dict(student.network.named_parameters())
    taken = {name for name, value in parameters.items() if name in trained and torch.equal(value, trained[name])}
    assert set(parameters) - taken == {n for n in parameters if n.endswith("decay.logit")}


def test_a_teacher_sees_its_own_normalisation(tmp_path):
    class Other(Digits):
        """The same digits, normalised otherwise."""

        mean, std = (0.2,), (2.0,)

    teacher, images = Teacher(ENTRY), torch.randn(4, 1, 16, 16)
    fit(tmp_path, teacher, trainer={"max_steps": 1})
    own = teacher(images)
    mean, std = (torch.tensor(zoo.info(ENTRY)[name]) for name in ("mean", "std"))
    other = Teacher(ENTRY)
    fit(tmp_path, other, trainer={"max_steps": 1}, data=Other(batch_size=16, image_size=8, num_workers=0))
    torch.testing.assert_close(other((images * std + mean - 0.2) / 2.0), own, rtol=1e-3, atol=1e-3)


def test_blocks_become_the_teachers(tmp_path):
    """From other weights, taught by blocks and by a thousandth of the classes."""
    fit(tmp_path, network_kwargs=RELU, epochs=2)
    apart = []
    for blocks in (1e-9, 30.0):
        watch = Watch()
        fit(tmp_path / "s", Teacher(str(tmp_path / "x.ckpt"), 0.001, blocks=blocks), watch, epochs=6, lr=0.01,
            network_kwargs=RELU)  # fmt: skip
        apart.append(watch.seen[-1]["train/blocks"])
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_converted_network_learns_from_the_blocks_of_its_source(tmp_path, precision):
    """At the start of an annealing they return the same, and in the end they do not."""
    fit(tmp_path, network_kwargs=RELU)
    source, watch = str(tmp_path / "x.ckpt"), Watch()
    fit(tmp_path, Convert(), SpikeAnnealing(0.5), Teacher(source, blocks=1.0), watch, epochs=2, lr=0.0,
        pretrained=source, network_kwargs=RELU, trainer={"precision": precision})  # fmt: skip
    apart = [said["train/blocks"] for said in watch.seen]
    assert apart[0] < apart[1] < apart[4]


def test_a_resumed_training_is_taught_too(tmp_path):
    fit(tmp_path, network_kwargs=RELU)
    source = str((tmp_path / "x.ckpt").rename(tmp_path / "teacher.ckpt"))

    def run(blocks=2.0, **options):
        module, _ = fit(tmp_path, Teacher(source, blocks=blocks), RandomState(), **options)
        return module.network.state_dict()

    whole = run(epochs=2)
    run(epochs=1)
    resumed, other = run(epochs=2, ckpt_path=tmp_path / "x.ckpt"), run(0.0, epochs=2)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


class Reversed(Digits):
    """Digits whose classes are named from the last to the first."""

    class_names = tuple(str(9 - i) for i in range(10))


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("msnn_resnet12_tiny.digit", {}, "'msnn_resnet12_tiny.digit'.*did you mean"),
        ("msnn_resnet12.c100", {}, "the student's num_classes, 10: msnn_resnet12.c100 has 100"),
        (ENTRY, {"in_chans": 3}, "the student's in_chans, 3: .* has 1"),
        ("resnet18.nonsense", {}, "resnet18.nonsense"),
        ("nowhere.ckpt", {}, "no checkpoint at 'nowhere.ckpt'"),
        (ENTRY, {"network": "test_resnet", "network_kwargs": {}}, f"blocks of the student's names.*{ENTRY} has"),
        (ENTRY, {}, "stages.0.blocks.0 of .* returns"),
    ],
)
def test_teachers_that_are_refused(tmp_path, monkeypatch, source, task, message):
    monkeypatch.setattr(SpikingClassifier, "check_data", lambda *_: None)
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, Teacher(source, blocks=1.0), **task)


def test_classes_in_another_order_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="classes in another order than the teacher"):
        fit(tmp_path, Teacher(ENTRY), data=Reversed(batch_size=16, image_size=8, num_workers=0))


@pytest.mark.parametrize(
    "given", [{"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}, {"temperature": math.inf}, {"blocks": -1.0}]
)
def test_bad_arguments(given):
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))}.*{next(iter(given.values())):g}"):
        Teacher(ENTRY, **given)
