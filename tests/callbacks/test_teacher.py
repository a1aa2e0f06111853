"""A network that learns from another."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, Teacher
from lightning_msnn.callbacks.teacher import distillation_loss
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Rectifier
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import ENTRY, NETWORK, RELU, fit


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_by_hand(temperature):
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (F.softmax(x / temperature, 1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum() / 5
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-6)
    extreme = torch.tensor([[1e4, -1e4]])
    assert math.isfinite(distillation_loss(-extreme, extreme, temperature).item())


class Watch(pl.Callback):
    """Keep what a training logs in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_a_share_of_the_loss_is_the_teachers(tmp_path):
    losses = []
    for weight in (0.25, 0.75):
        fit(tmp_path, Teacher(ENTRY, weight), watch := Watch(), trainer={"max_steps": 1})
        losses.append((watch.seen[0]["train/loss_step"], watch.seen[0]["train/distillation"]))
    (quarter, distilled), (most, same) = losses
    labels = (quarter - 0.25 * distilled) / 0.75
    assert (most, same) == (pytest.approx(0.25 * labels + 0.75 * distilled, rel=1e-5), distilled)
    assert labels != pytest.approx(distilled, rel=0.01)


def test_a_teacher_is_fixed_and_in_no_checkpoint(tmp_path):
    teacher = Teacher(ENTRY)
    module, _ = fit(tmp_path, teacher, EMA(0.9), trainer={"precision": "bf16-mixed"})
    network = teacher.network
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not any(isinstance(m, nn.BatchNorm2d) and m is not network.norm for m in network.modules())
    images = torch.randn(8, 1, 16, 16)
    said = zoo.load(ENTRY, fuse=True).bfloat16()(images.bfloat16()).float()
    assert (teacher(images).float() - said).abs().mean() < 0.2 * said.abs().mean()
    content, plain = read_checkpoint(tmp_path / "x.ckpt"), SpikingClassifier(in_chans=1, network_kwargs=NETWORK)
    assert content["state_dict"].keys() == module.state_dict().keys() == plain.state_dict().keys()
    assert content["teacher"] == ENTRY


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


def test_a_teacher_sees_its_own_normalisation():
    seen, info, images = [], zoo.info(ENTRY), torch.randn(4, 1, 16, 16)
    for mean, std in ((info["mean"], info["std"]), ([0.2], [2.0])):
        teacher, task = Teacher(ENTRY), SpikingClassifier(in_chans=1, network_kwargs=NETWORK)
        task.preprocessing = {"mean": mean, "std": std}
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        teacher.setup(trainer, task, "fit")
        teacher.on_fit_start(trainer, task)
        pixels = images * torch.tensor(info["std"]) + torch.tensor(info["mean"])
        seen.append(teacher((pixels - mean[0]) / std[0]))
    torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-3)


class Reversed(Digits):
    """Digits whose classes are named from the last to the first."""

    class_names = tuple(str(9 - i) for i in range(10))


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("msnn_resnet12_tiny.digit", {}, "'msnn_resnet12_tiny.digit'.*did you mean"),
        ("msnn_resnet12.c100", {}, "the student's num_classes, 10: msnn_resnet12.c100 has 100"),
        (ENTRY, {"in_chans": 3}, "the student's in_chans, 3: .* has 1"),
    ],
)
def test_teachers_that_are_refused(tmp_path, monkeypatch, source, task, message):
    monkeypatch.setattr(SpikingClassifier, "check_data", lambda *_: None)
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, Teacher(source), **task)


def test_classes_in_another_order_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Reversed has the classes '9', .*, but .* knows '0'"):
        fit(tmp_path, Teacher(ENTRY), data=Reversed(batch_size=16, image_size=8, num_workers=0))


def test_a_module_that_asks_no_callback_is_refused():
    with pytest.raises(ConfigurationError, match="Teacher must be left out: LightningModule is no Task"):
        Teacher(ENTRY).setup(None, pl.LightningModule(), "fit")


@pytest.mark.parametrize("given", [{"weight": 1.5}, {"temperature": math.inf}])
def test_bad_arguments(given):
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))}.*{next(iter(given.values())):g}"):
        Teacher(ENTRY, **given)
