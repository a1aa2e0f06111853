"""A network that is converted as training starts: trained, resumed, counted, reported, written down."""

import json

import lightning.pytorch as pl
import pytest
import timm
import torch

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA, Convert, EnergyMonitor, SpikeAnnealing, SpikeRateMonitor, Teacher
from lightning_msnn.conversion import RectifierSpike, SpikingLayer, converted_layers
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.report import write_report
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import fit

PLAIN = {"network": "test_resnet", "network_kwargs": {}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of a small network of timm's."""
    folder = tmp_path_factory.mktemp("source")
    fit(folder, **PLAIN, lr=5e-3)
    return str(folder / "x.ckpt")


class Fitted(pl.Callback):
    """Keep the thresholds after the first step."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            state = pl_module.network.state_dict()
            self.values = [value.clone() for key, value in state.items() if key.endswith("log_threshold")]


@pytest.mark.slow
def test_from_a_trained_network_to_a_report_and_an_entry(source, tmp_path, monkeypatch):
    fitted = Fitted()
    task, trainer = fit(
        tmp_path, Convert(), SpikeAnnealing(0.5), Teacher(source), EMA(0.9), SpikeRateMonitor(),
        EnergyMonitor(), fitted, **PLAIN, pretrained=source, epochs=2, trainer={"limit_test_batches": 1},
    )  # fmt: skip
    assert all(len(value.unique()) > 1 for value in fitted.values)
    assert all(m.annealing is None for m in task.modules() if isinstance(m, RectifierSpike))
    (metrics,) = trainer.test(task, datamodule=trainer.datamodule, verbose=False)
    assert 0.0 <= metrics["test/top1"] <= 1.0
    checkpoint = tmp_path / "x.ckpt"
    again = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    images = torch.randn(4, 1, 8, 8)
    assert converted_layers(again.network) == converted_layers(task.network)
    assert not any(isinstance(module, SpikingLayer) for module in task.twins(images)["ANN twin"].modules())
    page = write_report(str(checkpoint), tmp_path / "report.html", samples=32, batch_size=16).read_text()
    assert "ReLU baseline" in page
    zoo.export(checkpoint, "spiking.digits_test_resnet", tmp_path / "zoo")
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    loaded = zoo.load("spiking.digits_test_resnet")
    torch.testing.assert_close(loaded(images), again.network(images))


def test_hyper_parameters_build_the_network_again(source, tmp_path):
    task, _ = fit(tmp_path, Convert(image_size=16, levels=3), **PLAIN, pretrained=source)
    layers = converted_layers(task.network)
    assert layers
    content = read_checkpoint(tmp_path / "x.ckpt")
    hparams = content["hyper_parameters"]
    json.dumps(hparams)
    assert hparams["network"] == "spiking"
    built = SpikingClassifier(**hparams).network
    assert converted_layers(built) == layers
    assert {module.levels for module in built.modules() if isinstance(module, RectifierSpike)} == {3}
    assert converted_layers(network_of(content, "x.ckpt")) == layers
    timm.models.save_for_hf(task.network, tmp_path / "hub")
    assert converted_layers(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)) == layers
    same, _ = fit(tmp_path / "again", Convert(), **hparams)
    assert converted_layers(same.network) == layers, "what is converted stays as it is"


def test_a_spiking_network_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="has spiking neurons already"):
        fit(tmp_path, Convert())


def test_it_stands_before_an_average(tmp_path):
    with pytest.raises(ConfigurationError, match="Convert must stand before EMA among the callbacks"):
        fit(tmp_path, EMA(0.9), Convert(), **PLAIN)
