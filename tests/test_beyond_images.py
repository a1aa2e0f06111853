"""Recordings, series, forecasts and events through the command line, reports, the zoo and the example of a stream."""

import csv
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_msnn import data, zoo
from lightning_msnn.cli import configurations, main
from lightning_msnn.data.base import arguments_of_checkpoint
from lightning_msnn.energy import spread
from lightning_msnn.energy.inputs import saliency
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import export
from lightning_msnn.report import load_task, make_test_data
from lightning_msnn.report import main as report
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.zoo.__main__ import main as zoo_main
from tests.conftest import ROOT

SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "2", "--trainer.enable_model_summary", "false", "--run.name", "r"),
    *("--trainer.limit_test_batches", "1"),
]
SMALL = "{depths: [1, 1], widths: [8, 8]}"
LAST = "runs/r/version_0/checkpoints/last.ckpt"


def tone(path, hertz, rate=8000, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 20000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    return tmp_path


@pytest.fixture
def digits(here):
    for digit in range(10):
        for speaker in ("theo", "yweweler", "nicolas", "ada"):
            for index in (0, 5, 6):
                tone(here / "fsdd" / f"{digit}_{speaker}_{index}.wav", 200 + 150 * digit + 5 * index)
    return here / "fsdd"


def fit(*args, small=SMALL):
    main(["fit", *args, *SHORT, "--model.network_kwargs", small, "--run.monitors", "false"])


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


SPEECH = ["--config", "data/spoken_digits", "--config", "recipe/tiny", "--data.root", "fsdd"]


def test_speech_from_fit_to_a_zoo_entry(digits, here, capsys, monkeypatch):
    fit(*SPEECH, "--data.frames", "32", "--data.splits", "speakers")
    main(["test", "--ckpt_path", LAST, "--data.root", "fsdd", *SHORT[:2], "--run.monitors", "false"])
    tone(here / "some" / "one.wav", 400, rate=16000)
    tone(here / "some" / "two.wav", 900)
    for folder, number in (("some", 2), ("some/two.wav", 1)):
        main(["predict", "--ckpt_path", LAST, "--data.folder", folder, *SHORT[:2]])
        assert [Path(row["file"]).name for row in rows("predictions.csv")] == ["one.wav", "two.wav"][2 - number :]
    report([LAST, "--root", "fsdd", "--output", "r.html", "--samples", "20"])
    page = Path("r.html").read_text()
    assert "of the test recordings of SpokenDigits and takes" in page
    assert len(re.findall(r'alt="\d\. \d, which the network takes for \d"', page)) == 2
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(here / "zoo"))
    zoo_main(["export", LAST, "msnn_resnet12_tiny.mine", "--data", "fsdd"])
    zoo_main(["verify", "msnn_resnet12_tiny.mine", "--data", "fsdd"])
    info = zoo.info("msnn_resnet12_tiny.mine")
    assert info["top1_images"] == 60, "the recordings of two speakers"
    made = info["data"]["init_args"]
    assert (made["mels"], made["frames"], made["splits"]) == (32, 32, "speakers")
    assert not {"root", "folder", "batch_size", "seed"} & made.keys()
    network, read = zoo.load("msnn_resnet12_tiny.mine"), zoo.transforms("msnn_resnet12_tiny.mine")
    seen = read("some/two.wav")
    assert seen.shape == tuple(info["input_size"]) == (1, 32, 32)
    said = network(seen[None]).softmax(1).max(1)
    (row,) = rows("predictions.csv")
    assert row["class"] == info["class_names"][int(said.indices)]
    assert float(row["probability"]) == pytest.approx(float(said.values), abs=1e-5)
    # timm knows the entries that were there when the package was imported: in a new process.
    words = ["predict", "--model.network", "msnn_resnet12_tiny.mine", "--model.pretrained", "true"]
    words += ["--data.folder", "some/two.wav", *SHORT[:2]]
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", "lightning_msnn", *words], check=True, env=environment)
    assert rows("predictions.csv") == [row]
    card = Path("zoo/msnn_resnet12_tiny.mine/README.md").read_text()
    assert "for 10 classes of recordings, 1x32x32 each." in card
    assert "M for a recording" in card
    assert "| energy of one recording, 45 nm CMOS |" in card
    assert "rate 8000 Hz" in card
    assert "mels 32, frames 32" in card
    words = ["msnn_resnet12_tiny.mine", "--root", "fsdd", "--output", "e.html", "--samples", "20"]
    subprocess.run([sys.executable, "-m", "lightning_msnn.report", *words], check=True, env=environment)
    assert "of the test recordings" in Path("e.html").read_text()


def test_frames_of_several_time_steps_are_refused(digits, capsys):
    with pytest.raises(SystemExit):
        fit(*SPEECH, "--data.time_steps", "4")
    assert "networks have 1 time step, but SpokenDigits has 4: set data.time_steps to 1" in capsys.readouterr().err


@pytest.fixture
def series(here):
    pytest.importorskip("aeon", reason="aeon, of the extra time-series, is not installed")
    random = np.random.default_rng(0)
    for part in ("TRAIN", "TEST"):
        lines = ["@problemName Waves", "@timeStamps false", "@missing false", "@univariate true", "@equalLength true",
                 "@classLabel true up down", "@data"]  # fmt: skip
        for number in range(24):
            slope = 1 - 2 * (number % 2)
            values = slope * np.arange(20) + random.normal(5, 1, 20)
            lines.append(",".join(f"{v:.4f}" for v in values) + f":{'up' if slope == 1 else 'down'}")
        (here / f"Waves_{part}.ts").write_text("\n".join(lines) + "\n")
    return here


@pytest.mark.parametrize("more", [(), ("--data.differences", "true")], ids=["values", "differences"])
def test_series_from_fit_to_a_zoo_entry(more, series, monkeypatch):
    words = ("--config", "data/time_series", "--config", "recipe/series", "--data.problem", "Waves", "--data.root", ".")
    fit(*words, *more)
    main(["test", "--ckpt_path", LAST, "--data.root", ".", *SHORT[:2], "--run.monitors", "false"])
    main(["predict", "--ckpt_path", LAST, "--data.root", ".", "--data.folder", "Waves_TEST.ts", *SHORT[:2]])
    assert len(rows("predictions.csv")) == 24
    report([LAST, "--root", ".", "--output", "r.html"])
    assert "of the test series of TimeSeries" in Path("r.html").read_text()
    assert 'alt="1. up, which the network takes for' in Path("r.html").read_text()
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(series / "zoo"))
    zoo_main(["export", LAST, "msnn_resnet12_tiny.waves", "--data", "."])
    zoo_main(["verify", "msnn_resnet12_tiny.waves", "--data", "."])
    info = zoo.info("msnn_resnet12_tiny.waves")
    assert info["input_size"] == [1 + bool(more), 1, 20]
    assert info["data"]["init_args"]["problem"] == "Waves"
    assert export(LAST, to="torch", out="x.pt2", data=".").images == 24
    assert export(LAST, to="torch", out="y.pt2").top1 is None, "random series, as nobody says where others are"
    (series / "shipped").mkdir()
    for part in ("TRAIN", "TEST"):
        (series / "shipped" / f"Waves_{part}.ts").write_text(Path(f"Waves_{part}.ts").read_text().replace("up", "left"))
    monkeypatch.setattr("lightning_msnn.data.time_series.aeon_folder", lambda: series / "shipped")
    assert export(LAST, to="torch", out="z.pt2").top1 is None, "others of that name are not these"
    with pytest.raises(ConfigurationError, match="takes neither images nor recordings: use TimeSeries"):
        zoo.transforms("msnn_resnet12_tiny.waves")


def test_events_by_name(here, monkeypatch):
    pytest.importorskip("tonic", reason="tonic, of the extra events, is not installed")
    from lightning_msnn.data import saccades

    few = saccades.load_digits()
    kept = slice(0, 120)
    few.data, few.images, few.target = few.data[kept], few.images[kept], few.target[kept]
    monkeypatch.setattr(saccades, "load_digits", lambda: few)
    fit("--config", "data/events", "--config", "recipe/tiny", "--data.root", "new/events")
    main(["test", "--ckpt_path", LAST, "--data.root", "new/events", *SHORT[:2], "--run.monitors", "false"])
    report([LAST, "--root", "new/events", "--output", "r.html", "--samples", "8"])
    page = Path("r.html").read_text()
    assert "of the test recordings of EventFrames" in page
    assert len(re.findall(r'alt="\d\. \d[^"]*, which the network takes for', page)) == 2


# What is told of a training


KINDS = {
    "speech": (SPEECH, SMALL),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_ends_as_one_that_was_not_stopped(kind, digits):
    args, small = KINDS[kind]
    more = [
        *SHORT[:2], *SHORT[4:6], "--trainer.limit_train_batches", "3", "--model.network_kwargs", small,
        "--run.monitors", "false", "--run.test", "false", "--data.batch_size", "8", "--model.schedule", "constant",
    ]  # fmt: skip
    main(["fit", *args, *more, "--run.name", "whole", "--trainer.max_epochs", "2"])
    main(["fit", *args, *more, "--run.name", "cut", "--trainer.max_epochs", "1"])
    main(["fit", *args, *more, "--run.name", "cut", "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    whole, cut = (
        read_checkpoint(f"runs/{name}/version_0/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    found = [
        [row for row in rows(f"runs/{name}/version_0/metrics.csv") if row["epoch"] == "1" and row["val/loss"]]
        for name in ("whole", "cut")
    ]
    assert len(found[0]) == 1
    validated = {name for name in found[0][0] if name.startswith("val/")}
    assert {name: found[0][0][name] for name in validated} == {name: found[1][0][name] for name in validated}


# Small parts


def test_saliency_is_zero_where_nothing_is_and_at_most_one():
    task = SpikingClassifier("msnn_resnet12_tiny", in_chans=2).eval()
    x = torch.randn(3, 2, 1, 40)
    x[..., 30:] = 0.0
    found = saliency(task.network, x)
    assert found.shape == (3, 1, 40)
    assert not found[..., 30:].any()
    assert torch.equal(found.amax((1, 2)), torch.ones(3))


def test_what_are_no_classes_is_chosen_evenly_of_all():
    chosen = spread(torch.randn(50, 3), 20)
    assert len(chosen.unique()) == 20
    assert torch.equal(chosen, spread(torch.zeros(50, dtype=torch.int64), 20))


def test_a_checkpoint_chooses_names_and_no_paths():
    given = {"problem": "Waves", "source": "../../secret.csv", "dataset": "os.path", "root": "/", "mels": 8}
    for named in (("source", "dataset"), None):
        assert arguments_of_checkpoint(given, named) == {"problem": "Waves", "mels": 8}
    for named, name in (((), "source"), (("source",), "dataset"), (("dataset", "root"), "source")):
        with pytest.raises(ConfigurationError, match=f"data.{name} must be given: it was '.*' in training, which a "):
            arguments_of_checkpoint(given, named)
    events = {"dataset": "DVSGesture"}  # downloaded to where the user says, or not at all
    assert arguments_of_checkpoint(events) == {}
    assert arguments_of_checkpoint(events, ("root",)) == events


def inputs_of(checkpoint, root):
    """Test inputs as a report of a checkpoint has them."""
    task, kind, arguments = load_task(checkpoint, root)
    module = make_test_data(task, kind, arguments)
    return task, module, module.on_after_batch_transfer(next(iter(module.test_dataloader())), 0)[0]


@pytest.mark.parametrize("aligned", [True, False])
def test_recordings_are_tested_as_they_were_trained_on(digits, aligned):
    fit(*SPEECH, "--data.aligned", str(aligned).lower())
    task, module, inputs = inputs_of(LAST, "fsdd")
    mine = data.SpokenDigits(root="fsdd", aligned=aligned)
    mine.setup()
    assert (module.aligned, list(module.mean)) == (aligned, task.preprocessing["mean"])
    assert torch.equal(inputs, mine.on_after_batch_transfer(next(iter(mine.test_dataloader())), 0)[0])


def test_series_are_tested_as_they_were_trained_on(series):
    """Though what lies where they are tested would say another length and another mean."""
    fit("--config", "data/time_series", "--data.problem", "Waves", "--data.root", ".")
    _, _, expected = inputs_of(LAST, ".")
    other = series / "other"
    other.mkdir()
    (other / "Waves_TEST.ts").write_text((series / "Waves_TEST.ts").read_text())
    lines = (series / "Waves_TRAIN.ts").read_text().splitlines()
    for number, line in enumerate(lines[7:], 7):
        values, label = line.split(":")
        lines[number] = ",".join(str(100 * float(v) + 500) for v in values.split(",")[:14]) + f":{label}"
    (other / "Waves_TRAIN.ts").write_text("\n".join(lines) + "\n")
    _, module, inputs = inputs_of(LAST, "other")
    assert module.length == 20
    assert torch.equal(inputs, expected)


def test_the_configuration_of_a_run_goes_on_with_it(series):
    args = ["--config", "data/time_series", "--data.problem", "Waves", "--data.root", ".", "--data.differences", "true"]
    fit(*args, "--model.schedule", "constant")
    config = "runs/r/version_0/config.yaml"
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert read_checkpoint(LAST)["epoch"] == 1
    assert read_checkpoint(LAST)["datamodule_hyper_parameters"]["length"] == 20


def test_classes_in_another_order_are_refused(series, capsys):
    fit("--config", "data/time_series", "--data.problem", "Waves", "--data.root", ".")
    file = series / "Waves_TRAIN.ts"
    file.write_text(file.read_text().replace("true up down", "true down up"))
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", LAST, "--data.root", ".", *SHORT[:2], "--run.monitors", "false"])
    assert re.search(
        r"its classes in another order than .*: \['down', 'up'\], not \['up', 'down'\]", capsys.readouterr().err
    )


def test_what_is_tested_at_the_end_is_looked_for_before_the_training(series, capsys):
    (series / "Waves_TEST.ts").unlink()
    words = ["fit", "--config", "data/time_series", "--data.problem", "Waves", "--data.root", "."]
    with pytest.raises(SystemExit):
        main([*words, *SHORT])
    assert "no file 'Waves_TEST.ts' in '.': " in (said := capsys.readouterr().err)
    assert "--run.test false leaves out the test at the end" in said
    assert not list(series.rglob("*.ckpt"))
    main([*words, *SHORT, "--run.test", "false"])
    assert Path(LAST).is_file()


def test_a_checkpoint_names_no_path():
    with pytest.raises(ConfigurationError, match="problem must be a name of letters, digits, '_' and '-', not '../x'"):
        data.TimeSeries("../x")


@pytest.mark.parametrize("recipe", ["recipe/tiny", "recipe/series"])
@pytest.mark.parametrize("name", [n for n in configurations() if n.startswith("data/")])
def test_tiny_recipes_go_with_all_data(name, recipe):
    """A recipe for tiny networks has no option that some data, or some task, does not have."""
    said = yaml.safe_load(configurations()[recipe].read_text())
    own = yaml.safe_load(configurations()[name].read_text())
    kind = getattr(data, own["data"]["class_path"].rpartition(".")[2])
    assert said["data"].keys() <= {"batch_size"}
    assert not own["data"].get("init_args", {}).keys() & said["data"].keys(), "so that their order does not matter"
    assert hasattr(kind, "setup")
