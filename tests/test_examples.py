"""The examples run, on little data, and do what they say."""

import math
import sys

import numpy as np
import pytest
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet
from tests.conftest import ROOT, SHALLOW

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


def test_a_plain_loop_trains(capsys):
    import train

    assert train.main(epochs=3, samples=320) > 25, "of ten classes"
    last = capsys.readouterr().out.splitlines()[-1]
    assert 5 < float(last.partition("fires for ")[2].partition(" %")[0]) < 60


def test_forecasts_follow_each_other_in_time_and_beat_the_last_season(tmp_path):
    import forecasting

    data = forecasting.Series()
    data.setup()
    seen = {}
    for part in ("train", "val", "test"):
        dataset = data._datasets[part]
        for known, future in (dataset[index] for index in range(len(dataset))):
            place = (data.values == future[0]).nonzero().item()
            assert torch.equal(known.flatten(), data.values[place - 36 : place])
            assert torch.equal(future, data.values[place : place + 12])
            seen.setdefault(part, set()).update(range(place, place + 12))
    assert not seen["train"] & seen["val"] | seen["val"] & seen["test"]
    task = forecasting.Forecaster(network_kwargs=SHALLOW, lr=4e-3, schedule="one_cycle")
    trainer = quiet(tmp_path, max_epochs=10)
    trainer.fit(task, datamodule=data)
    (measured,) = trainer.test(task, datamodule=data, verbose=False)
    errors, naive = [], []
    task.eval()
    with torch.no_grad():
        for series, future in data.test_dataloader():
            errors.append((task(series) - future).abs())
            naive.append((series[:, 0, 0, -12:] - future).abs())
    errors, naive = (torch.cat(x).mean().item() / data.naive_scale for x in (errors, naive))
    assert measured["test/mase"] == pytest.approx(errors, rel=1e-5)
    assert errors < naive
    (tmp_path / "s.csv").write_text("day,sold\n" + "".join(f"{t},{t * t}\n" for t in range(30)))
    other = forecasting.Series(str(tmp_path / "s.csv"), context=8, horizon=4)
    assert other.values[5] == 25
    other.check("fit")
    with pytest.raises(ConfigurationError, match="a series of 30 values is too short for a horizon of 12"):
        forecasting.Series(str(tmp_path / "s.csv"), context=8).check("fit")


def write_ts(file, series, labels):
    rows = [":".join([*(",".join(map(repr, c.tolist())) for c in x), y]) for x, y in zip(series, labels, strict=True)]
    file.write_text("\n".join(["@problemName Slopes", "@classLabel true up down", "@data", *rows]) + "\n")


def test_series_are_stretched_normalised_and_learnt_from(tmp_path):
    import series

    random = np.random.default_rng(0)
    labels = ["up", "down"] * 12
    made = [random.normal(5, 1, (2, (12, 20, 17)[i % 3])) for i in range(24)]
    write_ts(tmp_path / "Slopes_TRAIN.ts", made, labels)
    write_ts(tmp_path / "Slopes_TEST.ts", [x[:, ::-1] for x in made], labels)
    data = series.TimeSeries("Slopes", str(tmp_path), differences=True, batch_size=24, val_fraction=0.0)
    data.check("test")
    data.setup()
    assert (data.class_names, data.in_chans, data.image_size) == (["up", "down"], 5, (1, 20))
    test = data._datasets["test"]
    for row, target, x, label in zip(data.transform(test.images, False), test.targets, made, labels, strict=True):
        x = np.concatenate([x[:, ::-1], np.gradient(x[:, ::-1], axis=1)])
        places = np.linspace(0, x.shape[1] - 1, 20)
        wanted = np.stack([np.interp(places, range(x.shape[1]), variable) for variable in x])
        mean, std = (np.array(value[:4])[:, None] for value in (data.mean, data.std))
        np.testing.assert_allclose(row[:4, 0], (wanted - mean) / std, atol=1e-4)
        assert torch.equal(row[4, 0], torch.full((20,), x.shape[1] / 20))
        assert data.class_names[target] == label
    (tmp_path / "Slopes_TRAIN.ts").write_text("@classLabel true up down\n@data\n1,nan,3:up\n")
    for problem, message in (("Slopes", "one with missing values: fill them"), ("Tides", "there is no file")):
        with pytest.raises(ConfigurationError, match=message):
            series.TimeSeries(problem, str(tmp_path))
    waves = series.TimeSeries(min_batches=2)
    task = SpikingClassifier(num_classes=2, in_chans=2, network_kwargs=SHALLOW)
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=waves)
    assert trainer.test(task, datamodule=waves, verbose=False)[0]["test/top1"] > 0.8


def test_series_are_played_unevenly_in_their_own_order():
    import series

    line = torch.arange(50.0).repeat(4, 2, 1, 1)
    line[:, 1] *= -1
    torch.testing.assert_close(series.warp_series(line, 0.0, 0.0), line, atol=1e-4, rtol=0)
    for warp, crop in ((0.5, 0.0), (0.0, 0.4), (0.5, 0.4)):
        changed = series.warp_series(line, warp, crop)
        torch.testing.assert_close(changed[:, 1], -changed[:, 0])
        for row in changed[:, 0, 0]:
            steps = row.diff()
            assert (steps > 0).all()
            assert -1e-4 <= row[0] <= crop * 49 + 1e-4
            assert (1 - crop) * 49 - 1e-3 <= row[-1] - row[0] <= 49 + 1e-3
            assert (steps.std() > 0.05) == (warp > 0)


def test_saccades_are_events_that_a_network_learns_from(tmp_path, monkeypatch):
    import saccades

    digits = saccades.load_digits()
    events = saccades.saccade(digits.images[3] / 16, 0)
    assert 500 < events.sum() < 20_000
    assert 0.4 < events[:, 0].sum() / events.sum() < 0.6  # what comes into view leaves it again
    assert not np.array_equal(events, saccades.saccade(digits.images[3] / 16, 1))
    digits.images, digits.target = digits.images[:120], digits.target[:120]
    monkeypatch.setattr(saccades, "load_digits", lambda: digits)
    data = saccades.SaccadedDigits(frames=3)
    data.setup()
    assert [len(data._datasets[name]) for name in ("train", "val", "test")] == [86, 10, 24]
    whole, parts = (saccades.SaccadedDigits(frames=n).read("test")[0].long() for n in (1, 3))
    assert torch.equal(parts.unflatten(1, (3, 2)).sum(1), whole)
    task = SpikingClassifier(num_classes=10, in_chans=6, network_kwargs=SHALLOW)
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(task, datamodule=data)
    assert math.isfinite(trainer.test(task, datamodule=data, verbose=False)[0]["test/loss"])
