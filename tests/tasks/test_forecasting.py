import csv
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_msnn.conversion import RectifierSpike
from lightning_msnn.data import Digits
from lightning_msnn.data.forecasting import ForecastSeries
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.metrics.forecasting import MeanAbsoluteScaledError, mean_absolute_scaled_error
from lightning_msnn.tasks.forecasting import SpikingForecaster, naive_forecasts

SEASON, HORIZON, CONTEXT, LENGTH = 6, 4, 12, 120


def series(variables=2):
    """A season on a trend, with noise."""
    time, random = np.arange(LENGTH), np.random.default_rng(0)
    return np.stack([(c + 1) * (time / 9 + np.sin(2 * np.pi * time / SEASON)) + random.normal(0, 0.1, LENGTH)
                     for c in range(variables)])  # fmt: skip


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "s.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["time", "a", "b"])
        writer.writerows([f"day {t}", *map(repr, map(float, row))] for t, row in enumerate(series().T))
    return tmp_path / "s.csv"


def make(file, **arguments):
    given = {"context": CONTEXT, "horizon": HORIZON, "season": SEASON, "columns": ["a", "b"], **arguments}
    return ForecastSeries(str(file), **given)


def trainer(epochs=1):
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def test_parts_follow_each_other_in_time_and_share_no_target(file):
    module = make(file)
    module.setup()
    values = torch.from_numpy(series()).float()
    seen = {}
    for part, loader in (("train", module.train_dataloader()), ("val", module.val_dataloader()),
                         ("test", module.test_dataloader())):  # fmt: skip
        dataset = loader.dataset
        places = []
        for index in range(len(dataset)):
            known, future = dataset[index]
            place = (values[0] == future[0]).nonzero().item()
            assert torch.equal(known[:, 0], values[:, place - CONTEXT : place])
            assert torch.equal(future.view(2, HORIZON), values[:, place : place + HORIZON])
            places += range(place, place + HORIZON)
        seen[part] = set(places)
    assert max(seen["train"]) == 71
    assert seen["val"] == set(range(72, 96))
    assert seen["test"] == set(range(96, 120))
    expected = np.abs(series()[:, SEASON:72] - series()[:, : 72 - SEASON]).mean(1)
    np.testing.assert_allclose(module.naive_scale, expected, rtol=1e-6)


def test_naive_forecasts_are_plain_repetitions():
    known = torch.randn(3, 2, 1, CONTEXT)
    found = naive_forecasts(known, 15, SEASON)
    for h in range(15):
        assert torch.equal(found["naive"][..., h], known[:, :, 0, -1])
        assert torch.equal(found["seasonal_naive"][..., h], known[:, :, 0, CONTEXT - SEASON + h % SEASON])


def test_scaled_error_is_the_formula_over_batches():
    preds, target, scale = torch.randn(10, 6), torch.randn(10, 6), torch.rand(6) + 0.5
    metric = MeanAbsoluteScaledError(scale)
    for rows in (slice(0, 7), slice(7, 10)):
        metric.update(preds[rows], target[rows])
    expected = np.mean(np.abs(preds.numpy() - target.numpy()) / scale.numpy())
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-6)
    np.testing.assert_allclose(mean_absolute_scaled_error(preds, target, scale), expected, rtol=1e-6)


def test_a_network_that_says_nothing_forecasts_the_season_before():
    task = SpikingForecaster(num_classes=2 * HORIZON, in_chans=2, season=SEASON).eval()
    torch.nn.init.zeros_(task.network.get_classifier().weight)
    known = torch.randn(3, 2, 1, CONTEXT)
    assert torch.equal(task(known), naive_forecasts(known, HORIZON, SEASON)["seasonal_naive"].flatten(1))


@pytest.mark.parametrize("variables", [1, 2])
def test_errors_stand_beside_those_of_forecasts_without_training(file, variables):
    module = make(file, columns=["a", "b"][:variables])
    task = SpikingForecaster(num_classes=variables * HORIZON, in_chans=variables, season=SEASON, lr=0.003)
    run = trainer(2)
    run.fit(task, datamodule=module)
    (found,) = run.test(task, datamodule=module, verbose=False)
    values = series()[:variables]
    scale = np.abs(values[:, SEASON:72] - values[:, : 72 - SEASON]).mean(1, keepdims=True)
    errors = {"naive": [], "seasonal_naive": []}
    for place in range(96, LENGTH - HORIZON + 1):
        future = values[:, place : place + HORIZON]
        errors["naive"].append(future - values[:, place - 1 : place])
        errors["seasonal_naive"].append(future - values[:, place - SEASON : place - SEASON + HORIZON])
    for name, error in errors.items():
        error = np.stack(error)
        assert found[f"test/{name}_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
        assert found[f"test/{name}_mse"] == pytest.approx((error**2).mean(), rel=1e-4)
        assert found[f"test/{name}_mase"] == pytest.approx((np.abs(error) / scale).mean(), rel=1e-4)
    assert found["test/loss"] == pytest.approx(found["test/mase"], rel=1e-4)
    (forecast,) = run.predict(task, datamodule=module)
    assert forecast["forecast"].shape == (1, variables, HORIZON)
    np.testing.assert_allclose(forecast["naive"][0, :, 0], values[:, -1], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 80, "horizon": 4}, r"has 120 values, too few: the training part has room to forecast 0 of them"),
        ({"horizon": 30}, r"the validation part has room to forecast 24 of them, and the horizon is 30"),
        ({"columns": ["c"]}, r"s.csv' has no column 'c': it has time, a, b"),
        ({"columns": ["time"]}, r"row 1 of '.*s.csv' has 'day 0' in column 'time': a finite number is needed"),
    ],
)
def test_bad_series_are_named(file, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        make(file, **arguments).check("fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5\n2.5\n3.5\n", r"s.csv' must begin with the names of its columns, and begins with \['1.5'\]"),
        ("a,a\n1,2\n", r"s.csv' has two columns 'a': each needs a name of its own"),
        ("day,sold\nMonday,11,736\n", r"row 1 of '.*s.csv' has more values than the 2 columns have names"),
    ],
)
def test_a_file_that_would_be_read_otherwise_than_it_was_meant_is_refused(file, text, message):
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        make(file).check("fit")


def test_a_mark_of_byte_order_is_no_part_of_a_name(file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(ConfigurationError, match="has 'day 0' in column 'time'"):
        make(file, columns=["time"]).check("fit")
    torch.testing.assert_close(make(file, columns=["a"]).values.numpy(), series()[:1], rtol=1e-4, atol=1e-4)


def test_predictions_need_the_context_alone(tmp_path):
    (tmp_path / "now.CSV").write_text("value\n" + "".join(f"{v}\n" for v in range(CONTEXT)))
    module = ForecastSeries(str(tmp_path / "now.CSV"), context=CONTEXT, horizon=HORIZON, season=SEASON)
    module.setup("predict")
    ((known, _),) = module.predict_dataloader()
    assert known.flatten().tolist() == list(range(CONTEXT))
    module = ForecastSeries(str(tmp_path / "now.CSV"), context=CONTEXT + 1, horizon=HORIZON, season=SEASON)
    with pytest.raises(ConfigurationError, match=f"too few: a forecast is made from {CONTEXT + 1}"):
        module.setup("predict")


def test_errors_are_in_units_of_the_series_that_is_tested(file, tmp_path):
    """Not of the one that was trained on: of a series in cents they are those of the series in euros."""
    task = SpikingForecaster(num_classes=HORIZON, season=SEASON)
    run = trainer(1)
    run.fit(task, datamodule=make(file, columns=["a"]))
    run.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "cents.csv").write_text("a\n" + "".join(f"{100 * v}\n" for v in series()[0]))
    both = [make(file, columns=["a"]), make(tmp_path / "cents.csv", columns=["a"])]
    first, second = (
        trainer(1).test(task, datamodule=module, verbose=False, ckpt_path=tmp_path / "x.ckpt", weights_only=True)[0]
        for module in both
    )
    assert second["test/seasonal_naive_mase"] == pytest.approx(first["test/seasonal_naive_mase"], rel=1e-4)
    assert second["test/mase"] == pytest.approx(first["test/mase"], rel=1e-2)


def checkpoint(task, path):
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    content["network_arguments"] = task.network.arguments
    torch.save(content | {"pytorch-lightning_version": "2.5.0"}, path)
    return str(path)


def test_a_teacher_says_forecasts(tmp_path):
    """It sees series as the network does, and its outputs stand for what those of the network do."""
    kwargs = {"depths": [1, 1], "widths": [8, 8]}
    taught = SpikingForecaster(num_classes=8, in_chans=2, season=SEASON, network_kwargs=kwargs).eval()
    path = checkpoint(taught, tmp_path / "x.ckpt")
    student = SpikingForecaster(num_classes=8, in_chans=2, season=SEASON, network_kwargs=kwargs, teacher=path)
    student.load_teacher()
    student.teacher.prepare(torch.device("cpu"), torch.float32)
    batch = torch.tensor(100.0 + series(), dtype=torch.float32)[None, :, None, :CONTEXT]
    with torch.no_grad():
        torch.testing.assert_close(student.taught(batch), taught(batch), rtol=1e-4, atol=1e-3)
    assert student.distil(taught(batch), student.taught(batch)) < 1e-3
    assert student.distil(taught(batch) + 2.0, student.taught(batch)).item() == pytest.approx(2.0, abs=1e-3)
    with pytest.raises(ConfigurationError, match="a forecaster with the student's season, 1: .* has 6"):
        SpikingForecaster(num_classes=8, in_chans=2, network_kwargs=kwargs, teacher=path).load_teacher()


def test_a_converted_network_is_fitted_to_what_it_sees(file, tmp_path):
    """Series of hundreds would have thresholds that nothing reaches."""
    kwargs = {"depths": [1, 1], "widths": [8, 8]}
    given = {"num_classes": 8, "in_chans": 2, "season": SEASON, "network_kwargs": kwargs, "twin": "relu"}
    source = checkpoint(SpikingForecaster(**given), tmp_path / "x.ckpt")
    found = []
    for level in (0.0, 1000.0):
        with open(tmp_path / "high.csv", "w", newline="") as out:
            csv.writer(out).writerows([["time", "a", "b"], *([t, *map(repr, map(float, row))]
                                                            for t, row in enumerate(level + series().T))])  # fmt: skip
        torch.manual_seed(0)
        task = SpikingForecaster(**given, init_from=source, convert={"image_size": [1, CONTEXT]}, lr=0.0)
        trainer().fit(task, datamodule=make(tmp_path / "high.csv"))
        found.append(torch.cat([m.log_threshold.flatten() for m in task.modules() if isinstance(m, RectifierSpike)]))
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)


def test_bad_arguments_are_named(file):
    with pytest.raises(ConfigurationError, match="season must be at most 12, the context, not 13"):
        make(file, season=13)
    with pytest.raises(ConfigurationError, match=r"cannot read the series in '.*none.csv'"):
        make(file.with_name("none.csv")).check("fit")
    file.write_text(re.sub("day 7,[^,]*", "day 7,NaN", file.read_text()))
    with pytest.raises(ConfigurationError, match=r"row 8 of '.*s.csv' has 'NaN' in column 'a'"):
        make(file).check("fit")
    with pytest.raises(ConfigurationError, match="model.season is 1, but ForecastSeries has 6: set model.season to 6"):
        SpikingForecaster(num_classes=4, in_chans=1).check_data(make(file, columns=["b"]))
    with pytest.raises(ConfigurationError, match="num_classes must be a multiple of in_chans, 2, not 7"):
        SpikingForecaster(num_classes=7, in_chans=2)


def test_data_of_classes_have_no_series():
    with pytest.raises(ConfigurationError, match="SpikingForecaster needs a series to forecast, .* not Digits"):
        SpikingForecaster(num_classes=10, in_chans=1, season=1).check_data(Digits())
