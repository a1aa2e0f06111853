"""A network that learns from another, and twins that train."""

import copy
import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, EnergyMonitor, SpikeAnnealing
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Rectifier, Spike, synapse
from lightning_msnn.runs import RandomState, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier, Task, Teacher, distillation_loss
from lightning_msnn.tasks.distillation import block_names, feature_loss, watched
from lightning_msnn.zoo.__main__ import main as zoo_main

NETWORK = {"depths": [1, 1], "widths": [8, 8]}
ENTRY = "msnn_resnet12_tiny.digits"


def fit(folder, *callbacks, epochs=1, ckpt_path=None, trainer=None, **task):
    pl.seed_everything(0, verbose=False)
    module = SpikingClassifier(
        **{
            "network": "msnn_resnet12_tiny",
            "in_chans": 1,
            "network_kwargs": dict(NETWORK),
            "schedule": "constant",
            **task,
        }
    )
    own = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=1,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=folder,
        **(trainer or {}),
    )
    own.fit(module, datamodule=Digits(batch_size=16, num_workers=0), ckpt_path=ckpt_path)
    own.save_checkpoint(folder / "x.ckpt")
    return module, own


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_by_hand(temperature):
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (F.softmax(x / temperature, 1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum() / 5
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-6)
    extreme = torch.tensor([[1e4, -1e4]])
    assert math.isfinite(distillation_loss(-extreme, extreme, temperature).item())


def test_a_teacher_computes_small_maps_by_matrix_products(monkeypatch):
    seen = []

    def spy(x, *others):
        seen.append(tuple(x.shape[2:]))
        return pointwise(x, *others)

    pointwise = synapse._pointwise
    monkeypatch.setattr(synapse, "_pointwise", spy)
    teacher, network = Teacher(ENTRY, 10, 1), zoo.load(ENTRY).to(memory_format=torch.channels_last)
    teacher.prepare(torch.device("cpu"), torch.float32)
    images = torch.randn(40, 1, 16, 16)
    with torch.no_grad():
        expected = network(images.to(memory_format=torch.channels_last))
    assert not seen, "what a network says of an image does not depend on the batch"
    agree = (teacher(images) - expected).abs().amax(1) < 1e-3  # others have a membrane next to its threshold
    assert agree.float().mean() > 0.9
    assert set(seen) == {(2, 2), (1, 1)}


def test_half_of_the_loss_is_the_teachers(tmp_path):
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            said = {k: v.item() for k, v in trainer.callback_metrics.items()}
            self.parts = said["train/loss_step"], said["train/distillation"]

    losses = {}
    for weight in (0.25, 0.75, 1.0):
        watch = Watch()
        fit(tmp_path, watch, teacher=ENTRY, teacher_weight=weight, trainer={"max_steps": 1})
        losses[weight] = watch.parts
    assert losses[1.0][0] == pytest.approx(losses[1.0][1])
    (quarter, distilled), (most, _) = losses[0.25], losses[0.75]
    labels = (quarter - 0.25 * distilled) / 0.75
    assert most == pytest.approx(0.25 * labels + 0.75 * distilled, rel=1e-5)
    assert labels != pytest.approx(distilled, rel=0.01)


def test_a_teacher_is_fixed_and_in_no_checkpoint(tmp_path):
    module, _ = fit(tmp_path, EMA(0.9), teacher=ENTRY, epochs=2, trainer={"precision": "bf16-mixed"})
    teacher = module.teacher
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert {p.dtype for p in teacher.network.parameters()} == {torch.bfloat16}
    assert not any(isinstance(m, nn.BatchNorm2d) and m is not teacher.network.norm for m in teacher.network.modules())
    assert copy.deepcopy(module).teacher is teacher, "an average of the weights has none of its own"
    for key, value in Teacher(ENTRY, 10, 1).network.state_dict().items():
        assert torch.equal(value.bfloat16().float(), teacher.network.state_dict()[key].float()), key
    plain, _ = fit(tmp_path / "plain")
    assert module.state_dict().keys() == plain.state_dict().keys()
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert content["state_dict"].keys() == plain.state_dict().keys()
    assert content["hyper_parameters"]["teacher"] == ENTRY


def test_a_checkpoint_loads_without_what_made_it(tmp_path):
    fit(tmp_path, twin="relu")
    made = tmp_path / "x.ckpt"
    student, _ = fit(tmp_path / "student", teacher=made, init_from=made)  # paths
    assert student.hparams["teacher"] == str(made)
    assert isinstance(student.teacher.network.stages[0].blocks[0].encoder1.spike, Rectifier)
    made.unlink()
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "student" / "x.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values(), strict=True)
    )
    with pytest.raises(ConfigurationError, match=r"no checkpoint at .*x\.ckpt"):
        fit(tmp_path, teacher=str(made))
    with pytest.raises(ConfigurationError, match=r"no checkpoint at .*x\.ckpt"):
        SpikingClassifier(init_from=str(made))


def test_a_student_starts_as_its_twin(tmp_path):
    twin, _ = fit(tmp_path, twin="relu")
    student = SpikingClassifier("msnn_resnet12_tiny", 10, 1, dict(NETWORK), init_from=str(tmp_path / "x.ckpt"))
    trained = twin.state_dict()
    parameters = dict(student.network.named_parameters())
    taken = {
        name for name, value in parameters.items() if torch.equal(value, trained.get(f"network.{name}", value + 1))
    }
    assert {name for name in parameters if name not in taken} == {n for n in parameters if n.endswith("decay.logit")}


def test_a_twin_trains_and_is_exported(tmp_path, monkeypatch):
    module, trainer = fit(tmp_path, EnergyMonitor(), twin="relu", epochs=2)
    assert not any(isinstance(m, Spike) for m in module.modules())
    assert module.network.arguments["windows"] == "single"
    trainer.test(module, datamodule=Digits(batch_size=64, num_workers=0))
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), module.eval()(x))
    name, folder = "msnn_resnet12_tiny.digits_relu", tmp_path / "zoo"
    zoo_main(["export", str(tmp_path / "x.ckpt"), name, "--folder", str(folder)])
    card = (folder / name / "README.md").read_text()
    assert "neurons are rectifiers" in card
    assert "spike rate" not in card
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(folder))
    assert zoo.verify(name)["top1_images"] == 359
    loaded = zoo.load("msnn_resnet12_tiny_digits_relu")
    torch.testing.assert_close(loaded(x), module(x))
    assert not any(isinstance(m, Spike) for m in loaded.modules())


def test_a_teacher_sees_its_own_normalisation():
    teacher = Teacher(ENTRY, 10, 1)
    images = torch.randn(4, 1, 16, 16)
    teacher.prepare(torch.device("cpu"), torch.float32, teacher.mean, teacher.std)
    own = teacher(images)
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    teacher.prepare(torch.device("cpu"), torch.float32, [0.2], [2.0])
    torch.testing.assert_close(teacher((images * std + mean - 0.2) / 2.0), own, rtol=1e-3, atol=1e-3)
    teacher.prepare(torch.device("cpu"), torch.float32)
    assert torch.equal(teacher(images), own)


def test_a_teacher_of_one_size_gets_that_size(monkeypatch):
    made = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: made)
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    cfg.num_classes, cfg.input_size = 10, (3, 32, 32)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: cfg)
    teacher = Teacher("vit_tiny_patch16_224", 10, 3)
    teacher.prepare(torch.device("cpu"), torch.float32)
    assert teacher(torch.randn(2, 3, 24, 40)).shape == (2, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("msnn_resnet12_tiny.digit", 10, 1), "unknown teacher 'msnn_resnet12_tiny.digit'.*did you mean"),
        ((ENTRY, 7, 1), "the student's num_classes, 7: msnn_resnet12_tiny.digits has 10"),
        (("msnn_resnet12_tiny_digits", 10, 3), "the student's in_chans, 3: .* has 1"),
        (("resnet18.a1_in1k", 10, 3), "the student's num_classes, 10: resnet18.a1_in1k has 1000"),
        (("resnet18.nonsense", 1000, 3), "unknown teacher 'resnet18.nonsense'"),
        (("msnn_resnet12_tiny.untrained", 1000, 3), "unknown teacher"),
        (("nowhere.ckpt", 10, 3), "no checkpoint at 'nowhere.ckpt'"),
    ],
)
def test_teachers_that_are_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        Teacher(*given)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (None, {}, "is of network None, which is refused"),
        ("hf-hub:someone/resnet18", {}, "is of network 'hf-hub:someone/resnet18', which is refused"),
        ("local-dir:/tmp", {}, "is of network 'local-dir:/tmp', which is refused"),
        (
            "resnet18",
            {"pretrained": True, "cache_dir": "/x"},
            "gives the network cache_dir, pretrained",
        ),
        ("resnet18", {"pretrained_cfg": {"url": "http://x"}}, "gives the network pretrained_cfg"),
        ("resnet18", {"checkpoint_path": "/x"}, "gives the network checkpoint_path"),
        ("resnet18", {"colour": 1}, "gives the network colour"),
        ("resnet18", {}, "is of network 'resnet18', which cannot be made of it"),
        ("msnn_resnet12_tiny", {"windows": "grid"}, "which cannot be made of it"),
    ],
)
@pytest.mark.parametrize("field", ["network_kwargs", "network_arguments"])
def test_a_strangers_checkpoint_is_refused(tmp_path, network, arguments, message, field):
    hparams = {"network": network, "num_classes": 3, "in_chans": 3}
    content = {"state_dict": {"network.w": torch.zeros(64)}, "hyper_parameters": hparams}
    if field == "network_kwargs":
        hparams[field] = arguments
    else:
        content[field] = {**arguments, "num_classes": 3}
    torch.save(content, tmp_path / "y.ckpt")
    with pytest.raises(ConfigurationError, match=message):
        Teacher(f"{'resnet18:' if network == 'resnet18' else ''}{tmp_path / 'y.ckpt'}", 3, 3)
    if network == "resnet18" and not arguments:
        with pytest.raises(ConfigurationError, match="is of network 'resnet18', which is refused"):
            Teacher(str(tmp_path / "y.ckpt"), 3, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"twin": "gelu"}, "unknown twin 'gelu'.*relu"),
        ({"twin": "relu", "network": "resnet18"}, "has no twin"),
        ({"teacher_weight": 0.0}, "teacher_weight must be above 0"),
        ({"teacher_weight": 1.5}, r"teacher_weight must be a number in \[0, 1\], not 1.5"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be a number above 0, at most 1000.0, not 0"),
        ({"teacher_temperature": math.inf}, "not inf"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**given)


def test_the_command_line_refuses_a_teacher_before_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "fit",
        "--model.network",
        "msnn_resnet12_tiny",
        "--model.in_chans",
        "1",
        "--model.teacher",
        "resnet18.a1_in1k",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "num_classes, 10: resnet18.a1_in1k has 1000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Data(pl.LightningDataModule):
    """What a teacher is compared with."""

    def __init__(self, **facts):
        super().__init__()
        vars(self).update(facts)


def test_names_of_classes_are_compared(recwarn):
    teacher = Teacher(ENTRY, 10, 1)
    digits = zoo.info(ENTRY)["class_names"]
    teacher.check_data(Data(class_names=digits))
    teacher.check_data(Data(class_names=[f"digit {name}" for name in digits]))  # it has but numbers
    assert not recwarn
    with pytest.raises(ConfigurationError, match="in another order than the teacher .*: 9 is first, not 0"):
        teacher.check_data(Data(class_names=digits[::-1]))
    teacher.class_names = [f"animal {i}" for i in range(10)]
    with pytest.warns(UserWarning, match="knows other classes than the data's: animal 0 is first, not thing 0"):
        teacher.check_data(Data(class_names=[f"thing {i}" for i in range(10)]))


def test_a_checkpoint_of_a_network_of_one_size(tmp_path):
    """It is built for the size that it was trained with, and is given images of that."""
    kwargs = {"patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 1}
    task = SpikingClassifier("vit_tiny_patch16_224", 10, 1, kwargs, img_size=16)
    torch.save(
        {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "pytorch-lightning_version": "2.5.0"},
        tmp_path / "x.ckpt",
    )
    teacher = Teacher(f"vit_tiny_patch16_224:{tmp_path / 'x.ckpt'}", 10, 1)
    teacher.prepare(torch.device("cpu"), torch.float32)
    assert teacher.size == (16, 16)
    assert teacher(torch.rand(2, 1, 12, 12)).shape == (2, 10)


def test_a_task_must_say_how_a_teacher_is_followed():
    class Brightness(Task):
        def losses(self, outputs, targets):
            return (outputs - targets).abs().mean(1)

    with pytest.raises(ConfigurationError, match="teacher must be null, .* Brightness does not say, by distil"):
        Brightness("msnn_resnet12_tiny", 10, 1, dict(NETWORK), teacher=ENTRY).load_teacher()
    converted = Brightness("resnet18_cifar.c100", 100, 3, pretrained=True, convert=True)
    converted.load_teacher()
    assert converted.teacher is None


def test_a_timm_network_of_one_size_is_given_images_of_that(monkeypatch):
    network = timm.create_model("pit_ti_224", num_classes=10)
    cfg = timm.get_pretrained_cfg("pit_ti_224.in1k")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: replace(cfg, num_classes=10))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network)
    teacher = Teacher("pit_ti_224.in1k", 10, 3)
    teacher.prepare(torch.device("cpu"), torch.float32)
    assert teacher(torch.rand(1, 3, 32, 32)).shape == (1, 10)


# What blocks return

BLOCKS = ["stages.0.blocks.0", "stages.1.blocks.0"]


OF_12 = [f"stages.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)]


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("msnn_vit12_tiny", OF_12),
        ("msnn_rnn12_tiny", OF_12),
        ("resnet18", ["act1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]),
        ("convnext_femto", OF_12),
        ("vgg11_bn", [f"features.{i}" for i in (2, 6, 13, 20, 27)]),
    ],
)
def test_names_of_blocks(network, names):
    model = timm.create_model(network, num_classes=2)
    assert block_names(model)[: len(names)] == names
    with torch.no_grad(), watched(model.eval(), names) as kept:
        model(torch.rand(1, 3, 32, 32))
    assert list(kept) == names
    assert all(isinstance(value, torch.Tensor) for value in kept.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_loss_of_blocks_by_hand():
    ours, theirs = ({name: torch.randn(3, 2, 4, 4, dtype=torch.float64) for name in "ab"} for _ in range(2))
    expected = sum(((ours[k] - theirs[k]) ** 2).sum() / (theirs[k] ** 2).sum() for k in "ab") / 2
    torch.testing.assert_close(feature_loss(ours, theirs).double(), expected, rtol=1e-5, atol=0)
    assert feature_loss(ours, ours) == 0


def test_blocks_become_the_teachers(tmp_path):
    """From other weights, taught by blocks and by a thousandth of the classes; the head and its classes aside."""
    teacher, own = fit(tmp_path, twin="relu", epochs=2)
    assert "train/features" not in own.callback_metrics
    apart = []
    for weight in (0.0, 30.0):
        student, own = fit(
            tmp_path / "s", twin="relu", epochs=6, teacher=str(tmp_path / "x.ckpt"), teacher_weight=0.001,
            teacher_features=weight, lr=0.01,
        )  # fmt: skip
        assert student._taught_blocks == (BLOCKS if weight else [])
        assert ("train/features" in own.callback_metrics) == bool(weight)
        x = torch.rand(8, 1, 16, 16)
        with torch.no_grad(), watched(student.network.eval(), BLOCKS) as ours:
            student(x)
        with torch.no_grad(), watched(teacher.network.eval(), BLOCKS) as theirs:
            teacher(x)
        apart.append(float(feature_loss(ours, theirs)))
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_converted_network_learns_from_the_blocks_of_its_source(tmp_path, precision):
    """At the start of an annealing they return the same, and in the end they do not."""
    fit(tmp_path, twin="relu")
    seen = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(float(trainer.callback_metrics["train/features"]))

    module, _ = fit(
        tmp_path, SpikeAnnealing(until=0.5), Log(), epochs=2, network_kwargs={**NETWORK, "spiking": False},
        init_from=str(tmp_path / "x.ckpt"), convert={"image_size": 16}, teacher_features=1.0, lr=0.0,
        trainer={"precision": precision},
    )  # fmt: skip
    assert module._taught_blocks == BLOCKS
    assert seen[0] < seen[1] < seen[4]


def test_a_resumed_training_is_taught_by_blocks_too(tmp_path):
    fit(tmp_path, twin="relu")
    (tmp_path / "x.ckpt").rename(tmp_path / "teacher.ckpt")
    options = {"teacher": str(tmp_path / "teacher.ckpt"), "teacher_features": 2.0}
    whole, _ = fit(tmp_path, RandomState(), epochs=2, **options)
    fit(tmp_path, RandomState(), epochs=1, **options)
    resumed, _ = fit(tmp_path, RandomState(), epochs=2, ckpt_path=tmp_path / "x.ckpt", **options)
    other, _ = fit(tmp_path, RandomState(), epochs=2, **{**options, "teacher_features": 0.0})
    states = [module.network.state_dict() for module in (whole, resumed, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_features": -1.0}, "teacher_features must be a finite number of at least 0, not -1.0"),
        ({"teacher_features": math.nan}, "not nan"),
        ({"teacher_features": 1.0}, "teacher_features must be 0 without a teacher, not 1.0$"),
        (
            {"teacher_features": 1.0, "network_kwargs": {"spiking": False}, "convert": {"image_size": 16}},
            "not 1.0: what is converted started at random",
        ),
        (
            {"teacher_features": 1.0, "teacher": ENTRY, "network": "resnet18"},
            f"with blocks of the student's names.*{ENTRY} has stages.0.blocks.0, stages.0.blocks.1",
        ),
        (
            {"teacher_features": 1.0, "teacher": ENTRY, "network_kwargs": {"widths": (8, 16, 32, 64)}},
            f"stages.0 of {ENTRY} has 16 channels at 1/2 of the image, not 8 channels at 1/2",
        ),
    ],
)
def test_blocks_that_are_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**{"network": "msnn_resnet12_tiny", "in_chans": 1, **given}).load_teacher()
