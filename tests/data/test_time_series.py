from importlib.util import find_spec
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_msnn.data.time_series import TimeSeries, warp_series
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import SHALLOW


def write_ts(folder, series, labels, problem="Waves", part="TRAIN", classes=("up", "down")):
    """Write series, each a list of channels, in the .ts format."""
    lines = [
        f"@problemName {problem}", "@timeStamps false", "@missing false",
        f"@univariate {str(len(series[0]) == 1).lower()}",
        f"@equalLength {str(len({len(s[0]) for s in series}) == 1).lower()}",
        f"@classLabel true {' '.join(classes)}", "@data",
    ]  # fmt: skip
    for channels, label in zip(series, labels, strict=True):
        lines.append(":".join([*(",".join(repr(float(v)) for v in channel) for channel in channels), label]))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{problem}_{part}.ts"
    file.write_text("\n".join(lines) + "\n")
    return file


def waves(number, lengths, channels=2, seed=0):
    """Series that rise or fall, and their labels."""
    random = np.random.default_rng(seed)
    series, labels = [], []
    for index in range(number):
        slope = 1 if index % 2 == 0 else -1
        length = lengths[index % len(lengths)]
        series.append([slope * np.arange(length) + random.normal(5, 1, length) for _ in range(channels)])
        labels.append("up" if slope == 1 else "down")
    return series, labels


@pytest.fixture
def problem(tmp_path):
    write_ts(tmp_path / "Waves", *waves(40, (12, 20, 17)))
    write_ts(tmp_path / "Waves", *waves(11, (12, 25, 17), seed=1), part="TEST")
    return tmp_path


def test_parts_classes_and_sizes_are_the_files(problem):
    module = TimeSeries("Waves", root=str(problem))
    assert module.class_names == ["up", "down"]
    assert module.in_chans == 3  # two variables and the length
    assert module.image_size == (1, 20)
    module.setup()
    assert len(module.test_dataloader().dataset) == 11
    assert len(module.train_dataloader().dataset) == 36
    assert len(module.val_dataloader().dataset) == 4


def test_series_are_stretched_and_say_how_long_they_were(problem):
    module = TimeSeries("Waves", root=str(problem), batch_size=100)
    module.setup()
    series, labels = waves(11, (12, 25, 17), seed=1)
    loader = module.test_dataloader()
    batch, targets = module.on_after_batch_transfer(next(iter(loader)), 0)
    for row, target, index in zip(batch, targets, loader.dataset.indices.tolist(), strict=True):
        length = len(series[index][0])
        wanted = np.stack([np.interp(np.linspace(0, length - 1, 20), range(length), x) for x in series[index]])
        mean, std = np.array(module.mean[:2])[:, None], np.array(module.std[:2])[:, None]
        np.testing.assert_allclose(row[:2, 0], (wanted - mean) / std, atol=1e-4)
        assert torch.equal(row[2, 0], torch.full((20,), length / 20))
        assert module.class_names[target] == labels[index]
    seen = torch.stack([x for x, _ in module.train_dataloader().dataset])[:, :2].transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen.mean(1), torch.tensor(module.mean[:2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.std(1, correction=0), torch.tensor(module.std[:2]), rtol=1e-5, atol=1e-5)


def test_differences_are_channels_with_a_mean_and_deviation_of_their_own(problem):
    plain, module = (TimeSeries("Waves", str(problem), batch_size=100, differences=more) for more in (False, True))
    for data in (plain, module):
        data.setup()
    assert (plain.in_chans, module.in_chans) == (3, 5)  # two variables, their differences, and the length
    series, _ = waves(11, (12, 25, 17), seed=1)
    loader = module.test_dataloader()
    batch, _ = module.on_after_batch_transfer(next(iter(loader)), 0)
    without, _ = plain.on_after_batch_transfer(next(iter(plain.test_dataloader())), 0)
    torch.testing.assert_close(batch[:, [0, 1, 4]], without)
    for row, index in zip(batch, loader.dataset.indices.tolist(), strict=True):
        changes = np.gradient(np.stack(series[index]), axis=1)
        length = changes.shape[1]
        kept = np.stack([np.interp(np.linspace(0, length - 1, 20), range(length), x) for x in changes])
        mean, std = np.array(module.mean[2:4])[:, None], np.array(module.std[2:4])[:, None]
        np.testing.assert_allclose(row[2:4, 0], (kept - mean) / std, atol=1e-4)


def test_series_are_played_unevenly_in_their_own_order():
    series = torch.arange(50.0).repeat(4, 2, 1, 1)
    series[:, 1] *= -1
    torch.testing.assert_close(warp_series(series, 0.0, 0.0), series, atol=1e-4, rtol=0)
    for warp, crop in ((0.5, 0.0), (0.0, 0.4), (0.5, 0.4)):
        changed = warp_series(series, warp, crop)
        torch.testing.assert_close(changed[:, 1], -changed[:, 0])
        for row in changed[:, 0, 0]:
            steps = row.diff()
            assert (steps > 0).all()
            assert 0 <= row[0] <= crop * 49 + 1e-4
            assert (1 - crop) * 49 - 1e-4 <= row[-1] - row[0] <= 49 + 1e-4
            assert (steps.std() > 0.05) == (warp > 0)
    assert not torch.equal(*warp_series(series[:2], 0.5, 0.0))


def test_bad_series_are_named(problem, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no file 'Tides_TRAIN.ts' in .*: problems there are Waves"):
        TimeSeries("Tides", root=str(problem)).check("fit")
    series, labels = waves(4, (12,))
    series[2][1][6] = np.nan
    write_ts(tmp_path / "bad", series, labels)
    with pytest.raises(
        ConfigurationError, match=r"cannot read the series in '.*Waves_TRAIN.ts': .* missing values: fill them"
    ):
        TimeSeries("Waves", root=str(tmp_path / "bad")).check("fit")
    write_ts(tmp_path / "short", *waves(4, (3,)))
    with pytest.raises(ConfigurationError, match=r"the series in '.*' have 3 values, and at least 4 are needed"):
        TimeSeries("Waves", root=str(tmp_path / "short")).check("fit")
    write_ts(problem / "Waves", [[np.arange(9.0)] * 2], ["sideways"], part="TEST", classes=("up", "sideways"))
    with pytest.raises(
        ConfigurationError, match=r"Waves_TEST.ts' has classes .*'sideways'.*, and its header names up, down"
    ):
        TimeSeries("Waves", root=str(problem)).check("test")
    write_ts(problem / "Waves", [[np.arange(9.0)]], ["up"], part="TEST")
    with pytest.raises(ConfigurationError, match=r"Waves_TEST.ts' have 1 variables, and those of training 2"):
        TimeSeries("Waves", root=str(problem)).check("test")
    (problem / "Waves" / "Waves_TRAIN.ts").write_text("@data\n1,2,x:up\n")
    with pytest.raises(ConfigurationError, match=r"cannot read the series in '.*Waves_TRAIN.ts'"):
        TimeSeries("Waves", root=str(problem)).check("fit")


def test_series_to_predict_need_no_class_and_others_do(problem):
    file = problem / "Waves" / "Waves_TEST.ts"
    module = TimeSeries("Waves", root=str(problem), folder=str(file))
    module.setup("predict")
    expected = module.predict_dataloader().dataset.images
    head, _, body = file.read_text().replace("@classLabel true up down", "@classLabel false").partition("@data\n")
    file.write_text(f"{head}@data\n" + "".join(f"{line.rpartition(':')[0]}\n" for line in body.splitlines()))
    module = TimeSeries("Waves", root=str(problem), folder=str(file))
    module.setup("predict")
    torch.testing.assert_close(module.predict_dataloader().dataset.images, expected, equal_nan=True)


def test_series_that_aeon_ships_are_found_by_name():
    if find_spec("aeon") is None:
        with pytest.raises(ConfigurationError, match="aeon, which ships series, is not installed: pip"):
            TimeSeries().check("fit")
        return
    module = TimeSeries()
    module.check("fit")
    assert (module.num_classes, module.in_chans, module.image_size) == (9, 13, (1, 26))


@pytest.mark.parametrize(("least", "passes"), [(3, 1), (25, 9)])
def test_an_epoch_of_few_series_meets_each_as_often(least, passes, problem):
    """36 series train, in batches of 12."""
    module = TimeSeries("Waves", root=str(problem), batch_size=12, min_batches=least)
    module.setup("fit")
    assert len(module.train_dataloader()) == 3 * passes
    assert len(module.val_dataloader().dataset) == 4
    met = torch.cat([series[:, 0, 0, 0] for series, _ in module.train_dataloader()])
    values, times = met.unique(return_counts=True)
    assert (len(values), set(times.tolist())) == (36, {passes})
    assert len(met[:36].unique()) < 36 or passes == 1  # the passes are shuffled together
    whole = TimeSeries("Waves", root=str(problem), batch_size=12)
    whole.setup("fit")
    assert (module.mean, module.std) == (whole.mean, whole.std)


def test_the_number_of_batches_follows_devices_and_batch_size(problem):
    module = TimeSeries("Waves", root=str(problem), batch_size=2, min_batches=20)
    module.setup("fit")
    assert len(module.train_dataloader()) == 36
    module.batch_size = 12
    assert len(module.train_dataloader()) == 21
    for devices in (2, 40):  # the second are more than there are series
        module.trainer = Mock(world_size=devices, global_rank=devices - 1)
        assert len(module.train_dataloader()) >= 20
    assert len(module._datasets["train"]) == 36


@pytest.mark.parametrize("network", ["msnn_resnet12_tiny", "msnn_vit12_tiny", "msnn_rnn12_tiny"])
def test_networks_take_maps_of_one_row(problem, network):
    module = TimeSeries("Waves", root=str(problem), folder=str(problem / "Waves" / "Waves_TEST.ts"))
    task = SpikingClassifier(network, 2, 3, SHALLOW)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=module)
    (found,) = trainer.predict(task, datamodule=module)
    assert found["file"][2].endswith("Waves_TEST.ts:3")
