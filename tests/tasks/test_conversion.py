"""A converted network in a task: trained, resumed, counted, reported, written down."""

import json

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, EnergyMonitor, SpikeAnnealing, SpikeRateMonitor
from lightning_msnn.conversion import RectifierSpike, SpikingLayer, converted_layers
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.report import write_report
from lightning_msnn.runs import RandomState, network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.tasks.conversion import check_strategy


def fit(folder, task, *callbacks, epochs=2, ckpt_path=None, **options):
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_val_batches=1,
        limit_test_batches=1,
        callbacks=[*callbacks, RandomState(), ModelCheckpoint(folder, save_last=True, save_top_k=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
        **{"limit_train_batches": 4, "logger": False, **options},
    )
    trainer.fit(task, datamodule=Digits(batch_size=32, num_workers=0), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of a small network of timm's."""
    folder = tmp_path_factory.mktemp("source")
    pl.seed_everything(0, verbose=False)
    fit(folder, SpikingClassifier("test_resnet", 10, 1, lr=5e-3, schedule="constant"))
    return str(folder / "last.ckpt")


def task_of(source, **options):
    pl.seed_everything(0, verbose=False)
    return SpikingClassifier(
        "test_resnet", 10, 1, init_from=source, convert={"image_size": 16, **options}, lr=5e-4, schedule="constant"
    )


class First(pl.Callback):
    """Keep the logits of the first step, and those of the teacher."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            state = pl_module.network.state_dict()
            self.fitted = [value for key, value in state.items() if key.endswith("log_threshold")]


def test_from_a_trained_network_to_a_report_and_an_entry(source, tmp_path, monkeypatch):
    task, first = task_of(source), First()
    trainer = fit(tmp_path, task, SpikeAnnealing(until=0.5), EMA(0.9), SpikeRateMonitor(), EnergyMonitor(), first)
    assert task.teacher.source == f"test_resnet:{source}"
    assert all(len(value.unique()) > 1 for value in first.fitted)
    assert all(m.annealing is None for m in task.modules() if isinstance(m, RectifierSpike))
    (metrics,) = trainer.test(task, datamodule=trainer.datamodule, verbose=False)
    assert 0.0 <= metrics["test/top1"] <= 1.0
    checkpoint = tmp_path / "last.ckpt"

    again = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    images = torch.randn(4, 1, 16, 16)
    assert converted_layers(again.network) == converted_layers(task.network)
    twins = task.twins(images)
    assert list(twins) == ["ANN twin"]
    assert not any(isinstance(module, SpikingLayer) for module in twins["ANN twin"].modules())

    page = write_report(str(checkpoint), tmp_path / "report.html", samples=32, batch_size=16).read_text()
    assert "ANN twin" in page

    zoo.export(checkpoint, "spiking.digits_test_resnet", tmp_path / "zoo")
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    loaded = zoo.load("spiking.digits_test_resnet")
    assert torch.equal(loaded.to(memory_format=torch.channels_last)(images), again.network(images))
    fused = zoo.load("spiking_digits_test_resnet", fuse=True)
    torch.testing.assert_close(fused(images), loaded(images))


def test_cards_of_a_converted_network_and_its_source(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    network = ("resnet18_cifar", 10, 1)
    options = {"network_kwargs": {"channels": [4, 4, 4, 4]}}
    fit(tmp_path / "source", SpikingClassifier(*network, **options), epochs=1)
    source = str(tmp_path / "source" / "last.ckpt")
    converted = SpikingClassifier(*network, **options, init_from=source, convert={"image_size": 16})
    fit(tmp_path / "converted", converted, epochs=1)
    cards = {}
    cards_of = {"resnet18_cifar.digits": "source", "spiking.resnet18_cifar_digits": "converted"}
    for name, folder in cards_of.items():
        zoo.export(tmp_path / folder / "last.ckpt", name, tmp_path / "zoo", dtype="float16")
        zoo.measure(name)
        zoo.verify(name)
        cards[folder] = zoo.info(name)
    assert cards["source"]["accumulates"] == 0 < cards["converted"]["accumulates"]
    assert "spike_rate" not in cards["source"]
    assert "energy_joules_ann_twin" not in cards["source"]
    twin = cards["converted"]["energy_joules_ann_twin"]
    assert twin == pytest.approx(cards["source"]["energy_joules"], rel=0.01)
    assert cards["converted"]["energy_joules"] < twin
    for name in cards_of:
        assert zoo.load(name, num_classes=3, in_chans=3)(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    config = tmp_path / "zoo" / "spiking.resnet18_cifar_digits" / "config.json"
    content = json.loads(config.read_text())
    content["model_args"]["source_kwargs"] = {"channels": [4, 4, 4, 8]}
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="does not fit spiking"):
        zoo.load("spiking.resnet18_cifar_digits")
    source_card, card = ((tmp_path / "zoo" / name / "README.md").read_text() for name in cards_of)
    assert "neurons are rectifiers" in source_card
    assert "spiking-neural-network" not in source_card
    assert f"all but the {len(converted_layers(converted.network))} layers" in card
    assert "spiking-neural-network" in card


class StopEarly(pl.Callback):
    """Stop after the first epoch of those that are planned."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_a_resumed_training_is_the_same(source, tmp_path):
    whole, half, rest = (task_of(source) for _ in range(3))
    pl.seed_everything(0, verbose=False)
    fit(tmp_path / "whole", whole, SpikeAnnealing())
    pl.seed_everything(0, verbose=False)
    fit(tmp_path / "half", half, SpikeAnnealing(), StopEarly())
    fit(tmp_path / "rest", rest, SpikeAnnealing(), ckpt_path=tmp_path / "half" / "last.ckpt")
    resumed = rest.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.state_dict().items())


def test_the_teacher_is_the_network_where_classes_fit(source):
    assert task_of(source).hparams["teacher"] == f"test_resnet:{source}"
    assert task_of(source, teacher=False).hparams["teacher"] is None
    assert SpikingClassifier("test_resnet", 10, 1, convert={"image_size": 16}).hparams["teacher"] is None
    other = SpikingClassifier("test_resnet", 7, 1, init_from=source, convert={"image_size": 16})
    assert other.hparams["teacher"] is None
    named = SpikingClassifier("test_resnet", 10, 1, init_from=source, teacher="other.ckpt", convert={"image_size": 16})
    assert named.hparams["teacher"] == "other.ckpt"
    another = SpikingClassifier("resnet18_cifar", 10, 1, init_from=source, convert={"image_size": 16})
    assert another.hparams["teacher"] is None, "some of its weights, and no network to learn from"


def test_hyper_parameters_build_the_network_again(source):
    task = task_of(source, windows="alternate")
    json.dumps(dict(task.hparams))
    kinds = converted_layers(task.network)
    assert {"non_dilated", "dilated"} <= set(kinds.values())
    again = SpikingClassifier(**task.hparams)
    assert converted_layers(again.network) == kinds
    assert again.hparams == task.hparams


@pytest.mark.parametrize(
    "given", [{"windows": "alternate", "image_size": 16}, {"drop_path_rate": 0.1, "image_size": 16}]
)
def test_a_network_that_is_built_converted_reads_its_own_checkpoint(given, tmp_path):
    task = SpikingClassifier("spiking", 10, 1, {"source": "test_resnet", **given})
    fit(tmp_path, task, epochs=1)
    again = SpikingClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert converted_layers(again.network) == converted_layers(task.network)
    network = network_of(read_checkpoint(tmp_path / "last.ckpt"), str(tmp_path / "last.ckpt"))
    assert all(torch.equal(value, task.network.state_dict()[key]) for key, value in network.state_dict().items())
    assert again.hparams["network_kwargs"]["source_kwargs"] == {k: v for k, v in given.items() if k == "drop_path_rate"}


def test_neurons_are_fitted_alike_with_an_annealing_and_without(source, tmp_path):
    fitted = []
    for callbacks in ((), (SpikeAnnealing(),)):
        first = First()
        fit(tmp_path, task_of(source), *callbacks, first, limit_train_batches=1, epochs=1)
        fitted.append(first.fitted)
    for ours, theirs in zip(*fitted, strict=True):  # a step of the optimizer comes after it
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_images_that_are_not_square():
    task = SpikingClassifier("test_resnet", 3, 1, img_size=(24, 40), convert=True)
    assert task(torch.randn(2, 1, 24, 40)).shape == (2, 3)
    assert converted_layers(SpikingClassifier("test_resnet", 3, 1, convert={}).network)


def test_sharded_weights_are_refused():
    with pytest.raises(ConfigurationError, match="convert must be left out with FSDPStrategy"):
        check_strategy(FSDPStrategy())
    check_strategy(DDPStrategy())


def test_the_twin_of_a_network_of_the_package():
    task = SpikingClassifier(
        "msnn_resnet12_tiny", 10, 1, {"depths": (1, 1), "widths": (8, 8)}, twin="relu", convert={"image_size": 16}
    )
    assert task.hparams["network_kwargs"]["source"] == "msnn_resnet12_tiny"
    again = SpikingClassifier(**task.hparams)
    again.network.load_state_dict(task.network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "unknown option 'size' of convert: allowed are image_size"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, not 0"),
        ({"image_size": [16, 0]}, "image_size must be an integer of at least 1, not 0"),
        ({"image_size": [16, 16, 16]}, r"image_size must be an integer of at least 1, not \[16, 16, 16\]"),
        ({"teacher": "resnet34"}, "teacher of convert must be true or false, not 'resnet34'"),
        ("true", "convert must be true, false or a dictionary of image_size, windows, teacher, not 'true'"),
        (None, "not None"),
        ({"windows": "all"}, "unknown kind of windows 'all'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier("test_resnet", 10, 1, convert=options)


def test_a_network_that_cannot_be_converted():
    assert timm.is_model("test_vit")
    with pytest.raises(ConfigurationError, match="has spiking neurons already"):
        SpikingClassifier("msnn_resnet12_tiny", 10, 1, convert=True)
