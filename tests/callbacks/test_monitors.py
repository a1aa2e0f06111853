"""The monitors in a Trainer: what they log and write, and that they leave nothing between the steps that log."""

import csv
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_msnn.callbacks import EnergyMonitor, SpikeRateMonitor
from lightning_msnn.energy import NETWORK, count_operations, energy
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Neuron, Spike
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet


class Plain(pl.LightningModule):
    """A LightningModule that knows nothing of this package; remembers in which steps there were hooks."""

    def __init__(self, threshold=0.1):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), Spike(Neuron(threshold=threshold)), nn.Flatten(), nn.Linear(256, 3)
        )
        self.hooked = []

    def training_step(self, batch, batch_idx):
        self.hooked.append(any(m._forward_hooks or m._forward_pre_hooks for m in self.network.modules()))
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.network(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        data = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(data, torch.arange(24) % 3), batch_size=4)

    test_dataloader = train_dataloader


def trainer(tmp_path, *callbacks, loggers=(CSVLogger,), **kwargs):
    options = {"max_epochs": 2, "log_every_n_steps": 1000, **kwargs}
    return quiet(tmp_path, *callbacks, logger=[logger(tmp_path, "run", version=0) for logger in loggers], **options)


def rows(tmp_path, key):
    with (tmp_path / "run/version_0/metrics.csv").open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def test_once_an_epoch(tmp_path):
    module = Plain()
    trainer(tmp_path, EnergyMonitor(), SpikeRateMonitor(), log_every_n_steps=6).fit(module)
    assert [i for i, hooked in enumerate(module.hooked) if hooked] == [5, 11]
    assert list(rows(tmp_path, "energy/all")) == list(rows(tmp_path, "spike_rate/all")) == [5, 11]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.network.modules())
    # The last batch of the epoch; the learning rate is 0, so that the network is that of the end.
    batch = list(module.train_dataloader())[-1][0]
    record = count_operations(module.network, batch)
    assert rows(tmp_path, "energy/all")[5] == pytest.approx(float(energy(record)))
    assert rows(tmp_path, "energy/accumulates_per_image")[5] == pytest.approx(record.total("accumulates") / 4)
    assert rows(tmp_path, "spike_rate/1")[5] == pytest.approx(record.total("spikes") / record.total("neurons"))


@pytest.mark.filterwarnings("ignore:no neuron, or every neuron")
def test_training_is_the_same_with_monitors(tmp_path):
    """To the bit: what is counted is an evaluation of its own, also of one that draws numbers."""
    results = []
    for callbacks in ((), (EnergyMonitor(every_n_steps=1), SpikeRateMonitor(every_n_steps=1))):
        pl.seed_everything(0)
        small = {"coding": "bernoulli", "depths": (1, 1), "widths": (8, 8)}
        task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, network_kwargs=small)
        data = DataLoader(TensorDataset(torch.rand(12, 1, 16, 16), torch.arange(12) % 10), batch_size=4)
        trainer(tmp_path, *callbacks).fit(task, data)
        results.append(task.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("neurons", "where"),
    [(Spike(Neuron(threshold=100.0)), "1"), (nn.ReLU(), "the network, which")],
)
def test_warns_once_of_layers_that_never_or_always_fire(neurons, where, tmp_path):
    module = Plain()
    module.network[1] = neurons
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, SpikeRateMonitor(every_n_steps=1), max_epochs=1).fit(module)
    (message,) = [str(w.message) for w in caught if "no neuron, or every neuron, fired" in str(w.message)]
    assert f"at two logs in a row in {where}" in message
    assert (tmp_path / "run/version_0/metrics.csv").exists() == (where == "1")


def test_files_of_a_test(tmp_path):
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 3, {"depths": (1, 1), "widths": (8, 8)})
    images = torch.randn(12, 3, 32, 32)
    data = DataLoader(TensorDataset(images, torch.arange(12) % 10), batch_size=4)
    monitor = EnergyMonitor(samples=8)
    run = trainer(tmp_path, monitor, SpikeRateMonitor(samples=8), loggers=(CSVLogger, TensorBoardLogger))
    run.test(task, data, verbose=False)
    folder = tmp_path / "run/version_0"
    content = json.loads((folder / "energy.json").read_text())
    assert list(content["columns"]) == [NETWORK, "ANN twin", "SNN twin, T = 4"]
    assert content["profile"] == "cmos_45nm"
    ours, ann, snn = content["columns"].values()
    assert ours["samples"] == ann["samples"] == snn["samples"] == 8
    expected = count_operations(task.network.eval(), images[:8])
    assert ours["energy"]["total"] == pytest.approx(float(energy(expected)), rel=1e-3)
    assert ours["energy"]["total"] == pytest.approx(
        sum(sum(layer["energy"].values()) for layer in ours["layers"].values())
    )
    assert ann["counts"]["multiply_accumulates"] > 0.9 * ann["counts"]["dense"]
    assert snn["counts"]["neurons"] == 4 * ours["counts"]["neurons"]
    for picture in ("energy", "spike_rate", "windows"):
        with Image.open(folder / f"{picture}.png") as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert any(b"energy" in path.read_bytes() for path in folder.glob("events*"))
    assert "times the first column" in monitor.table()
    assert len({len(line) for line in monitor.table().splitlines()[:10]}) == 1, "columns are aligned"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


class TwoLoaders(Plain):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return super().test_step(batch, batch_idx)


def test_inputs_of_the_first_size_are_counted(tmp_path):
    module, monitor, y = Plain(), EnergyMonitor(), torch.zeros(2, dtype=torch.long)
    module.network = nn.Sequential(nn.Conv2d(1, 4, 3), Spike(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    batches = DataLoader([(torch.rand(2, 1, size, 8), y) for size in (8, 6, 8)], batch_size=None)
    trainer(tmp_path, monitor).test(module, batches, verbose=False)
    assert monitor.columns[NETWORK]["samples"] == 4


def test_any_lightning_module_and_any_profile(tmp_path):
    """Without twins, the network alone is reported, on the first loader; operations without a figure are listed."""
    monitor, module = EnergyMonitor(profile="loihi"), TwoLoaders()
    loaders = [module.test_dataloader(), DataLoader(module.test_dataloader().dataset, 1)]
    trainer(tmp_path, monitor).test(module, loaders, verbose=False)
    content = json.loads((tmp_path / "run/version_0/energy.json").read_text())
    assert list(content["columns"]) == [NETWORK]
    assert content["columns"][NETWORK]["samples"] == 24
    assert content["columns"][NETWORK]["without_figure"] == {"multiply_accumulates": 4 * 22 * 22}
    assert "no figure" in monitor.table()


class Recorder(CSVLogger):
    """A logger with a ``log_image``, as that of Weights & Biases."""

    def log_image(self, key, images, step=None):
        assert isinstance(images[0], Image.Image)
        self.__dict__.setdefault("keys", []).append(key)


def test_loggers_that_take_images(tmp_path):
    run = trainer(tmp_path, EnergyMonitor(), SpikeRateMonitor(), loggers=(Recorder,))
    run.test(Plain(), verbose=False)
    assert run.logger.keys == ["energy", "spike_rate"], "no windows, no picture of them"


def test_two_processes_log_and_write_what_one_does(tmp_path):
    """The same images, in one process and shared by two: the same counts."""
    logged = []
    for devices in (1, 2):
        pl.seed_everything(0)
        run = trainer(
            tmp_path / str(devices),
            EnergyMonitor(every_n_steps=3),
            SpikeRateMonitor(every_n_steps=3),
            devices=devices,
            strategy="auto" if devices == 1 else "ddp_fork",
            max_epochs=1,
        )
        run.fit(module := Plain())
        logged.append(rows(tmp_path / str(devices), "energy/all"))
        run.test(module, verbose=False)
    one, two = (json.loads((tmp_path / str(d) / "run/version_0/energy.json").read_text()) for d in (1, 2))
    assert one["columns"][NETWORK]["samples"] == 24
    assert one["columns"] == two["columns"]
    assert list(logged[0]) == [2, 5], "six batches"
    assert list(logged[1]) == [2], "three on each of two"


def test_wrong_use_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="every_n_steps .* at least 1, not 0"):
        SpikeRateMonitor(every_n_steps=0)
    with pytest.raises(ConfigurationError, match="no module 'net'.*takes one of network"):
        trainer(tmp_path, EnergyMonitor(network="net")).fit(Plain())
    module = Plain()
    module.network = torch.compile(module.network)
    with pytest.raises(ConfigurationError, match="compiled"):
        trainer(tmp_path, SpikeRateMonitor()).fit(module)
    monkeypatch.setattr(type(own := quiet(tmp_path)), "strategy", FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(ConfigurationError, match="EnergyMonitor must be left out with FSDPStrategy"):
        EnergyMonitor().setup(own, Plain(), "fit")
