"""The command line, as a user runs it."""

import csv
import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image

import lightning_msnn
from lightning_msnn import data, zoo
from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import MSNNCLI, configurations, main
from lightning_msnn.cli.given import BASES, _class_parser
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import integer
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import NETWORKS

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--config", str(CONFIGS / "quickstart.yaml")]
PRETRAINED = ["--model.network", "msnn_resnet12_tiny.digits", "--model.pretrained", "true"]
FEW_TESTS = ["--trainer.limit_test_batches", "1"]  # operations of the network and its twins are counted on them
SHORT = [
    *QUICK,
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "3", "--trainer.enable_model_summary", "false"),
]

# A schedule that is planned to its end refuses another one.
LONGER = ["fit", *SHORT, "--run.test", "false", "--model.schedule", "constant"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a short run of the quickstart."""
    folder = tmp_path_factory.mktemp("run")
    main(["fit", *SHORT, *FEW_TESTS, "--run.folder", str(folder)])
    return folder / "quickstart" / "version_0"


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture
def images(tmp_path):
    """A folder of five digits as PNG files, one of them in a sub-folder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        path = folder / ("more" if i == 4 else ".") / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    return folder


def test_fit_leaves_everything(run):
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "energy.json",
        "energy.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= files
    assert any("tfevents" in f for f in files)
    assert {p.name for p in run.parent.iterdir()} == {"version_0"}, "both loggers share one folder"
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 300
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {name for row in rows for name, value in row.items() if value}
    assert {"train/top1", "train/top5", "val/top1", "val/top5", "test/top1", "test/top5", "val/loss"} <= columns


def test_fit_ends_by_testing_the_best_weights(monkeypatch):
    """Not the last ones: of two epochs the first has the highest learning rate, which is to be best here."""
    tested = []
    monkeypatch.setattr(
        SpikingClassifier, "on_test_start", lambda task: tested.append(task.network.head.fc.weight.clone()), False
    )
    main(["fit", *SHORT, "--trainer.max_epochs", "2", "--model.schedule", "cosine", "--model.warmup_epochs", "0",
          "--run.best", "train/lr", "--run.monitors", "false"])  # fmt: skip
    folder = Path("runs/quickstart/version_0/checkpoints")
    best, last = (
        torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]["network.head.fc.weight"]
        for name in ("best", "last")
    )
    assert not torch.equal(best, last)
    assert len(tested) == 1
    assert torch.equal(tested[0], best)


def test_saved_config_runs_again(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["network"] == "msnn_resnet12_tiny"
    assert config["ckpt_path"] is None
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    main(["fit", "--config", str(run / "config.yaml"), "--run.test", "false"])
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before, "nothing is overwritten"
    again = run.parent / "version_1"
    assert yaml.safe_load((again / "config.yaml").read_text()) == {**config, "run": {**config["run"], "test": False}}
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, again)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    shutil.rmtree(again)


def test_checkpoint_is_plain_values(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["class_names"] == [str(i) for i in range(10)]
    assert content["preprocessing"]["image_size"] == 16
    flat = [content["hyper_parameters"], content["datamodule_hyper_parameters"]]
    while flat:
        value = flat.pop()
        assert value is None or isinstance(value, dict | list | str | int | float)
        flat += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    task = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.class_names == content["class_names"]


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_evaluate_a_checkpoint(verb, checkpoint, capsys):
    main([verb, *SHORT, *FEW_TESTS, "--ckpt_path", str(checkpoint)])
    out = capsys.readouterr().out
    assert f"{'val' if verb == 'validate' else verb}/top1" in out
    assert ("energy, times the first column" in out) == (verb == "test"), "test compares the network with its twins"


def test_data_of_the_checkpoint_is_the_default(checkpoint, capsys):
    main(["test", "--ckpt_path", str(checkpoint), "--trainer.accelerator", "cpu", *FEW_TESTS])
    out = capsys.readouterr().out
    assert "test/top1" in out
    assert out.count("energy, times the first column") == 1, "without a callback in the configuration too"


def test_predict_writes_csv(checkpoint, images):
    main(["predict", *QUICK, "--ckpt_path", str(checkpoint), "--data.folder", str(images)])
    with Path("predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert all(row["class"] in map(str, range(10)) for row in rows)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert [p.name for p in Path().iterdir()] == ["predictions.csv"], "predict begins no run"


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_integers(verb, images, monkeypatch):
    seen, convolve = [], integer.convolve
    monkeypatch.setattr("lightning_msnn.nn.integer.convolve", lambda *args: (seen.append(verb), convolve(*args))[1])
    args = [verb, *PRETRAINED, "--trainer.accelerator", "cpu"]
    args += ["--data.folder", str(images)] if verb == "predict" else FEW_TESTS if verb == "test" else []
    main(args)
    assert not seen
    main([*args, "--integer", "true"])
    assert seen


def test_a_training_in_integers_is_refused(capsys):
    fails(["fit", *SHORT, "--integer", "true"], "integer is for validate, test and predict", capsys)


def test_predict_agrees_with_the_network(checkpoint, images):
    main(["predict", *QUICK, "--ckpt_path", str(checkpoint), "--data.folder", str(images), "--predictions", "p.csv"])
    task = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with Path("p.csv").open() as file:
        for row in csv.DictReader(file):
            pixels = torch.from_numpy(np.array(Image.open(row["file"]))).float().view(1, 1, 16, 16) / 255
            with torch.no_grad():
                probability = task((pixels - Digits.mean[0]) / Digits.std[0]).softmax(1)[0]
            assert row["class"] == task.class_names[probability.argmax()]
            assert float(row["probability"]) == pytest.approx(probability.max().item(), abs=1e-5)


def test_resume_goes_on_in_the_same_folder(tmp_path):
    args = [*LONGER, "--run.folder", str(tmp_path / "runs")]
    main(args)
    # What the training made of its data it goes on with, whether it is given again or not.
    main(["fit", "--run.name", "quickstart", *args[args.index("--run.folder") :], "--run.test", "false",
          "--trainer.limit_train_batches", "3", "--trainer.max_epochs", "2", "--ckpt_path", "last"])  # fmt: skip
    assert [p.name for p in (tmp_path / "runs" / "quickstart").iterdir()] == ["version_0"]
    last = torch.load(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert last["cli"]["run"] == {"ema": 0.99}
    assert "current_model_state" in last, "of the weights beside their average"
    main(args)
    assert {p.name for p in (tmp_path / "runs" / "quickstart").iterdir()} == {"version_0", "version_1"}


def test_optimizer_and_scheduler_from_yaml():
    Path("o.yaml").write_text(
        "optimizer: {class_path: torch.optim.RMSprop, init_args: {lr: 0.01}}\n"
        "lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}\n"
    )
    main(["fit", *SHORT, "--config", "o.yaml", "--run.test", "false"])
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert "square_avg" in next(iter(last["optimizer_states"][0]["state"].values()))
    assert last["lr_schedulers"][0]["gamma"] == 0.5


def test_wandb_by_one_line(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Path("w.yaml").write_text(
        "trainer: {logger+: {class_path: lightning.pytorch.loggers.WandbLogger, "
        "init_args: {project: msnn, offline: true}}}\n"
    )
    main(["fit", *SHORT, "--config", "w.yaml", "--run.test", "false"])
    assert list(Path("runs/quickstart/version_0/wandb").glob("offline-run-*"))
    assert {path.name for path in Path().iterdir()} == {"w.yaml", "runs"}, "all of it is in the run's folder"
    assert {path.name for path in Path("runs/quickstart").iterdir()} == {"version_0"}
    assert Path("runs/quickstart/version_0/metrics.csv").is_file(), "the default loggers stay"


@pytest.mark.parametrize(
    "loggers", ["true", "[lightning.pytorch.loggers.WandbLogger]", "tests.runs.test_folders.Service"]
)
def test_with_other_loggers_the_run_is_in_its_folder_all_the_same(loggers, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main([*LONGER, "--run.test", "true", *FEW_TESTS, "--trainer.logger", loggers])
    folder = Path("runs/quickstart/version_0")
    assert {"best.ckpt", "last.ckpt"} == {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"metrics.csv", "curves.png", "energy.json"} <= {path.name for path in folder.iterdir()}
    main([*LONGER, "--trainer.max_epochs", "2", "--trainer.logger", loggers, "--ckpt_path", "last"])
    assert {path.name for path in folder.parent.iterdir()} == {"version_0"}


@pytest.mark.parametrize("option", ["run.folder", "trainer.default_root_dir"])
def test_a_run_in_a_url_is_refused(option, capsys):
    fails(
        ["fit", *SHORT, f"--{option}", "s3://bucket/x"],
        f"{option} must be a folder of this machine.*s3://bucket",
        capsys,
    )
    assert not list(Path().iterdir())


def test_no_loggers_are_none():
    main(["fit", *SHORT, "--run.test", "false", "--trainer.logger", "[]"])
    assert {path.name for path in Path("runs/quickstart/version_0").iterdir()} >= {"checkpoints", "curves.png"}
    assert not list(Path("runs").rglob("metrics.csv"))


def test_at_most_25_configurations_are_shipped():
    """One for each data set, of images, sounds, series and events; recipes and trainers are composed with them."""
    files = [file for file in CONFIGS.rglob("*") if file.is_file()]
    assert sorted(configurations().values()) == sorted(files)
    assert len(files) <= 25


@pytest.mark.parametrize("recipe", [name for name in configurations() if name.startswith("recipe/")])
@pytest.mark.parametrize("dataset", [name for name in configurations() if name.startswith("data/")])
def test_every_recipe_goes_with_all_data(dataset, recipe, monkeypatch, capsys):
    """By name, in any order; settings are those of this data set, and the rate is meant for the recipe's batch."""
    seen = []

    def stop(self):
        seen.append(self.config.fit)
        raise KeyboardInterrupt

    monkeypatch.setattr(MSNNCLI, "before_instantiate_classes", stop)
    own = yaml.safe_load(configurations()[dataset].read_text())["data"]
    said = yaml.safe_load(configurations()[recipe].read_text())
    of_images = issubclass(vars(data)[own["class_path"].rpartition(".")[2]], data.ImageDataModule)
    if not of_images and said["data"].keys() - {"batch_size"}:
        with pytest.raises(SystemExit):  # a recipe for images, which what they are augmented by gives away
            main(["fit", "--config", dataset, "--config", recipe])
        assert "unknown option" in capsys.readouterr().err
        return
    orders = [[dataset, recipe], [recipe, dataset]]
    for order in orders if dataset == "data/cifar100" else orders[:1]:
        with pytest.raises(KeyboardInterrupt):
            main(["fit", *(f"--config={name}" for name in order)])
    assert all(config.model == seen[0].model for config in seen)
    assert seen[0].data.init_args.batch_size == said["data"]["batch_size"]
    assert said["model"]["network"] in [*NETWORKS, *zoo.list_models()]
    default = seen[0].data.class_path.endswith("Digits")
    if of_images and "flip" not in said["data"]:
        assert seen[0].data.init_args.flip == (0.0 if default else 0.5), "of this data set, not of the default one"
    for config in seen:
        assert config.data.class_path.rpartition(".")[2] == own["class_path"].rpartition(".")[2]
    assert not any("ThetaScheduler" in str(callback) for callback in said["trainer"].get("callbacks", []))


def test_muon_takes_the_place_of_a_recipes_optimizer(capsys):
    args = ["fit", "--config", "data/cifar100", "--config", "recipe/twin", "--config", "optimizer/muon"]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    said = yaml.safe_load(capsys.readouterr().out)
    model = said["model"]["init_args"]
    assert (model["optimizer"], model["lr"]) == ("muon", 0.02)
    assert model["network_kwargs"] == {"spiking": False, "windows": "single"}
    assert said["data"]["init_args"]["batch_size"] == 512


def test_a_file_wins_over_a_shipped_configuration(capsys):
    Path("quickstart").write_text("model: {lr: -3}\n")
    fails(["fit", "--config", "quickstart"], "lr must be .*-3", capsys)


def png(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8) if data is None else data).save(path)


@pytest.fixture
def folder(tmp_path):
    """A class folder with two classes."""
    root = tmp_path / "data"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(4):
                png(root / part / name / f"{i}.png")
    return root


def folder_args(root):
    return ["--data", "lightning_msnn.data.ImageFolder", "--data.root", str(root), "--data.image_size", "8",
            "--model.in_chans", "3"]  # fmt: skip


BAD = {
    "unknown network": (["--model.network", "msnn_resnet21"], "'msnn_resnet21'.*allowed are .*did you mean 'msnn_"),
    "unknown surrogate": (["--model.network_kwargs", "{surrogate: triangel}"], "'triangel'.*did you mean 'triangular'"),
    "unknown projection": (["--model.network_kwargs", "{projection: cosin}"], "'cosin'.*did you mean 'sine'"),
    "theta not finite": (["--model.network_kwargs", "{theta: .nan}"], "theta must be a finite number.*nan"),
    "unknown argument": (["--model.network_kwargs", "{thetta: 0.1}"], "'thetta'.*did you mean 'theta'"),
    "class count": (["--model.num_classes", "12"], "num_classes is 12.*Digits has 10"),
    "channels": (["--model.in_chans", "3"], "in_chans is 3.*Digits has 1"),
    "missing folder": (
        ["--data", "lightning_msnn.data.CIFAR100", "--data.root", "/no/such/folder", "--model.num_classes", "100",
         "--model.in_chans", "3"], "/no/such/folder"),
    "unknown key": (["--model.netwrk", "x"], "netwrk.*did you mean .*network"),
    "unknown configuration": (["--config", "recipe/fst"], "'recipe/fst'.*data/cifar100.*did you mean 'recipe/fast'"),
    "weights of classes": (["--model.class_weights", "[1, 2]"], r"class_weights must be 10 .*not \[1.*2"),
    "missing checkpoint": (["--ckpt_path", "none.ckpt"], "no checkpoint at 'none.ckpt'"),
    "bad number": (["--model.lr", "-1"], "lr must be .*-1"),
    "bad smoothing": (["--model.label_smoothing", "1.0"], r"label_smoothing .*\[0, 1\).*1.0"),
    "bad schedule": (["--model.schedule", "cosin"], "'cosin'.*did you mean 'cosine'"),
    "bad optimizer": (["--model.optimizer", "adamww"], "'adamww'.*did you mean 'adamw'"),
    "not a number": (["--model.lr", "fast"], "lr.*fast"),
    "not an integer": (["--trainer.max_epochs", "foo"], "trainer.max_epochs must be .*int.*, not .foo.$"),
    "unknown data": (["--data", "lightning_msnn.data.CIFAR1000"], "CIFAR1000"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "no accumulation": (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be at least 1"),
    "schedule alone": (["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"], "lr_scheduler needs an optim"),
    "not a mode": (["--run.best_mode", "biggest"], "mode of the best checkpoint must be max or min, not 'biggest'"),
    "no folder for runs": (["--run.folder", "/proc/x"], "cannot write to '/proc/x/quickstart'"),
    "bad val_fraction": (["--data.val_fraction", "1.0"], "val_fraction.*1.0"),
}  # fmt: skip


def fails(args, message, capsys):
    """Run the command line; it must end with one sentence, status 2 and nothing written."""
    before = sorted(Path().rglob("*"))
    stops(args, message, capsys)
    assert sorted(Path().rglob("*")) == before, "nothing may be written"


def stops(args, message, capsys):
    """Run the command line; it must end with one sentence and status 2."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert error[-1].startswith("lightning-msnn: error: ")
    assert re.search(message, error[-1]), error[-1]
    assert not any("Traceback" in line for line in error)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, capsys):
    args, message = BAD[case]
    fails(["fit", *SHORT, *args], message, capsys)


def test_unknown_key_in_yaml(capsys):
    Path("bad.yaml").write_text("model:\n  network_kwarg: {theta: 0.1}\n")
    fails(["fit", *SHORT, "--config", "bad.yaml"], "network_kwarg.*did you mean .*network_kwargs", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed_everything: null", "seed_everything must be true, false or an integer in .*, not None"),
        ("trainer: {accumulate_grad_batches: null}", "trainer.accumulate_grad_batches must be int, not null"),
    ],
)
def test_null_in_yaml(text, message, capsys):
    Path("bad.yaml").write_text(text)
    fails(["fit", *SHORT, "--config", "bad.yaml"], message, capsys)


def test_class_count_of_a_folder(folder, capsys):
    fails(["fit", *SHORT, *folder_args(folder), "--model.num_classes", "10"], "num_classes is 10.*ImageFolder has 2",
          capsys)  # fmt: skip


def test_empty_class_folder(folder, capsys):
    for file in (folder / "train" / "cat").iterdir():
        file.unlink()
    fails(["fit", *SHORT, *folder_args(folder), "--model.num_classes", "2"], "cat", capsys)


def test_truncated_png_is_named(folder, capsys):
    bad = folder / "train" / "dog" / "2.png"
    png(bad, np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    bad.write_bytes(bad.read_bytes()[:1000])
    fails(["fit", *SHORT, *folder_args(folder), "--model.num_classes", "2"], "dog/2.png", capsys)
    assert not (folder.parent / "cache").exists() or not list((folder.parent / "cache").iterdir())


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor this", "pickle", "tensor", "dict"])
def test_checkpoint_that_is_not_one(content, verb, tmp_path, capsys):
    path = tmp_path / "bad.ckpt"
    if content == "pickle":
        torch.save({"state_dict": Path("x")}, path)  # an object that is no plain value
    elif content == "tensor":
        torch.save(torch.zeros(2), path)
    elif content == "dict":
        torch.save({"weights": {}}, path)
    else:
        path.write_bytes(content)
    fails([verb, *SHORT, "--ckpt_path", str(path)], "bad.ckpt' is not a checkpoint", capsys)


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_untrained_weights_are_not_evaluated(verb, capsys):
    fails([verb, *SHORT], "needs trained weights.*--ckpt_path", capsys)


def test_predict_without_images(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    args = ["predict", *QUICK, "--ckpt_path", str(checkpoint)]
    fails(args, "folder", capsys)
    fails([*args, "--data.folder", str(tmp_path / "empty")], "empty", capsys)
    fails([*args, "--data.folder", "nowhere"], "nowhere", capsys)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "--model.help"], "--model.label_smoothing"),
        (["test", "--model.help=lightning_msnn.tasks.SpikingClassifier"], "--model.class_weights"),
        (
            ["fit", "--config", "data/cifar100", "--data.help"],
            "Help for --data.help=lightning_msnn.data.CIFAR100",
        ),
        (["predict", "--data.help", "ImageFolder"], "--data.image_size"),
        (["fit", "--trainer.logger.help", "CSVLogger"], "--trainer.logger.save_dir"),
        (["fit", "--optimizer.help", "SGD"], "--optimizer.momentum"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_of_a_class(args, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    assert said in capsys.readouterr().out
    assert not list(Path().iterdir())


def test_a_callback_that_watches_what_is_not_logged_stops_before_the_first_step(capsys):
    watching = ["lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val/top2"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "--trainer.callbacks", *watching])
    assert stop.value.code == 2
    assert (
        "no metric 'val/top2' is logged, which EarlyStopping watches: logged are val/loss, val/top1, val/top5; did "
        in (capsys.readouterr().err)
    )
    assert not list(Path().rglob("*.ckpt"))


def test_a_callback_may_watch_what_is_logged_in_training_alone(capsys, own_definitions):
    watch = "{class_path: ModelCheckpoint, init_args: {monitor: val/rate}}"
    rate = f"[{{class_path: EnergyTarget, init_args: {{rate: 0.5}}}}, {watch}]"
    main(["fit", *SHORT, "--run.best", "val/energy", "--run.best_mode", "min", "--run.test", "false",
          "--trainer.callbacks", rate, "--run.name", "a"])  # fmt: skip
    last = "runs/a/version_0/checkpoints/last.ckpt"
    main(["validate", "--config", "runs/a/version_0/config.yaml", "--ckpt_path", last, "--run.name", "b"])
    Path("own.py").write_text(
        "from lightning_msnn.tasks import SpikingClassifier\n\n\n"
        "class Late(SpikingClassifier):\n"
        "    def on_validation_epoch_end(self):\n"
        "        if not self.trainer.sanity_checking:\n"
        "            self.log('val/late', 0.5)\n"
    )
    late = ["lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor"]
    own = ["fit", *SHORT, "--run.imports", "own.py", "--model", "own.Late", "--run.test", "false"]
    main([*own, "--trainer.callbacks", *late, "val/late", "--run.name", "c"])
    stops([*own, "--trainer.callbacks", *late, "val/latte"], "no metric 'val/latte'.*did you mean 'val/late'", capsys)
    main([*own, "--trainer.callbacks", *late, "val/latte", "--trainer.callbacks.strict", "false", "--run.name", "d"])


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("option", ["--help", "-h", "--print_config"])
def test_help_and_configurations_need_no_weights(verb, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, option])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert "seed_everything" in out


def test_an_option_may_end_in_help(capsys):
    Path("own.py").write_text(
        "from lightning_msnn.tasks import SpikingClassifier\n\n\n"
        "class Helped(SpikingClassifier):\n"
        "    def __init__(self, *args, label_help: str = 'a', **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
    )
    main(["fit", *SHORT, "--run.imports", "own.py", "--model", "own.Helped", "--model.label_help", "b",
          "--trainer.fast_dev_run", "1"])  # fmt: skip


def test_a_saved_configuration_of_an_own_module_runs_again(capsys):
    """Which does not log what chooses the best checkpoint by default; what is named for it must be logged."""
    Path("plain.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningModule\n\n\n"
        "class Plain(LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(256, 10)\n\n"
        "    def training_step(self, batch, index):\n"
        "        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])\n\n"
        "    def validation_step(self, batch, index):\n"
        "        self.log('val/mine', self.training_step(batch, index))\n\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    options = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    main(["fit", "--run.imports", "plain.py", "--model", "plain.Plain", "--data.image_size", "16", "--run.name", "a",
          *options])  # fmt: skip
    again = ["fit", "--run.imports", "plain.py", "--config", "runs/a/version_0/config.yaml", "--run.name"]
    main([*again, "b"])
    assert Path("runs/b/version_0/checkpoints/last.ckpt").is_file()
    stops([*again, "c", "--run.best", "val/minne"], "no metric 'val/minne' is logged.*did you mean 'val/mine'", capsys)


def test_an_enumeration_among_a_callbacks_defaults_is_saved_as_text():
    main(["fit", *SHORT, "--run.test", "false", "--run.name", "a", "--trainer.callbacks", "Timer"])
    saved = Path("runs/a/version_0/config.yaml")
    assert "interval: step" in saved.read_text()
    main(["fit", "--config", str(saved), "--run.name", "b"])


def test_help_of_no_class(capsys):
    fails(["fit", "--data.help", "Digit"], "data 'Digit' cannot be imported.*lightning_msnn.data.Digits", capsys)


def test_a_metric_that_is_not_logged_stops_the_training_before_its_first_step(capsys):
    said = "no metric 'val/top2' is logged.*logged are val/loss, val/top1, val/top5; did you mean 'val/top5'"
    stops(["fit", *SHORT, "--run.best", "val/top2"], said, capsys)
    assert not list(Path("runs").rglob("*.ckpt"))
    stops(["fit", *SHORT, "--run.best", "top1"], "no metric 'top1' is logged.*, train/", capsys)


def test_options_that_do_not_fit_the_data_are_said_in_one_sentence(capsys):
    said, refused = "cannot begin: ValueError.*val_check_interval", ["--trainer.val_check_interval", "1000"]
    stops(["fit", *SHORT, *refused], said, capsys)
    main(["fit", *SHORT, "--model.schedule", "constant", "--run.test", "false", "--run.name", "a"])
    stops(["fit", *SHORT, "--model.schedule", "constant", "--run.name", "a", "--ckpt_path", "last",
           "--trainer.max_epochs", "2", *refused], said, capsys)  # fmt: skip


def test_the_name_of_a_run_is_that_of_the_entrys_data(recwarn):
    Path("spoken").mkdir()
    for digit in range(10):
        with wave.open(f"spoken/{digit}_theo_0.wav", "wb") as file:  # of index 0: a recording to test on
            file.setparams((1, 2, 8000, 4000, "NONE", ""))
            file.writeframes(np.random.default_rng(digit).integers(-999, 999, 4000, dtype=np.int16).tobytes())
    main(["test", "--model.network", "msnn_resnet12_tiny.fsdd", "--model.pretrained", "true", "--data.root", "spoken",
          "--run.monitors", "false", "--trainer.enable_progress_bar", "false"])  # fmt: skip
    assert [folder.name for folder in Path("runs").iterdir()] == ["msnn_resnet12_tiny_fsdd_spokendigits"]
    assert not [warning for warning in recwarn if "have learnt from" in str(warning.message)]


def test_images_of_another_size_than_the_weights_have_seen():
    args = ["validate", *PRETRAINED, "--data.image_size", "24", "--trainer.limit_val_batches", "1"]
    with pytest.warns(UserWarning, match="images of 24x24 pixels, but the weights have learnt from images of 16x16"):
        main(args)


def test_module_and_console_script(capsys):
    out = subprocess.run(
        [sys.executable, "-m", "lightning_msnn", "--help"], capture_output=True, text=True, check=True, timeout=300
    )
    assert "fit" in out.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "lightning_msnn", "fit", *QUICK, "--model.network", "x"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("lightning-msnn: error: unknown network 'x'")


def test_read_checkpoint_of_ema(checkpoint):
    """What a checkpoint evaluates with is the moving average."""
    content = read_checkpoint(checkpoint)
    assert set(content["current_model_state"]) == set(content["state_dict"])
    assert any(not torch.equal(a, content["current_model_state"][n]) for n, a in content["state_dict"].items())
    with pytest.raises(ConfigurationError):
        EMA(decay=1.0)


def test_quickstart_reaches_96_percent(capsys):
    """In 12 of its 30 epochs."""
    options = ["--trainer.max_epochs", "12", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", *QUICK, *options])
    with Path("runs/quickstart/version_0/metrics.csv").open() as file:
        top1 = [float(row["test/top1"]) for row in csv.DictReader(file) if row.get("test/top1")]
    assert top1[-1] >= 0.96


def test_resuming_keeps_the_metrics(tmp_path):
    args = [*LONGER, "--run.folder", str(tmp_path / "runs")]
    main(args)
    run = tmp_path / "runs" / "quickstart" / "version_0"
    first = (run / "metrics.csv").read_text()
    for epochs in ("2", "3"):
        main([*args, "--trainer.max_epochs", epochs, "--ckpt_path", "last"])
    assert (run / "metrics.0.csv").read_text() == first
    assert (run / "metrics.1.csv").is_file()
    assert (run / "metrics.csv").is_file()


def test_a_run_that_is_refused_a_resumption_is_as_it_was(capsys):
    short = ["fit", *SHORT, "--run.test", "false", "--trainer.limit_val_batches", "1"]
    main(short)
    folder = Path("runs/quickstart/version_0")
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "metrics.csv")}
    stops([*short, "--trainer.max_epochs", "2", "--ckpt_path", "last"], "schedule .* ends at step 3, not at 6", capsys)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob("config.*.yaml")) + list(folder.glob("metrics.*.csv"))


def test_a_conversion_goes_on_by_its_own_command():
    main(["fit", *SHORT, "--run.test", "false", "--model.network", "test_resnet", "--run.name", "source"])
    source = "runs/source/version_0/checkpoints/last.ckpt"
    words = [*LONGER, "--model.network", "test_resnet", "--model.pretrained", source, "--trainer.callbacks", "Convert"]
    words += ["--run.name", "c", "--run.monitors", "false", "--ckpt_path", "last"]
    for epochs in ("1", "2"):
        main([*words, "--trainer.max_epochs", epochs])
    content = read_checkpoint("runs/c/version_0/checkpoints/last.ckpt")
    assert content["global_step"] == 6
    assert content["hyper_parameters"]["network"] == "spiking"


@pytest.mark.parametrize("name", ["resnet18_cifar.c100", "msnn_resnet12_tiny.digits"])
def test_a_checkpoint_has_the_network_of_the_entry_it_started_from(name):
    config = zoo.info(name)
    shape = {"num_classes": config["num_classes"], "in_chans": config["input_size"][0]}
    task = SpikingClassifier(name, **shape, pretrained=True)
    content = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(content)
    hparams = content["hyper_parameters"]
    assert hparams["network"] == name.partition(".")[0]
    assert not hparams["pretrained"]
    again = SpikingClassifier(**hparams)
    again.load_state_dict(task.state_dict())
    images = torch.rand(2, *config["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), task.eval()(images))


def test_a_run_from_an_entry_needs_it_no_longer(tmp_path, monkeypatch):
    """Nor does an entry of another network that has taken its name change the run's."""
    name, found = "msnn_resnet12_tiny.mine", []
    for context in ("shared", "isolated"):
        main(["fit", *SHORT, "--run.test", "false", "--model.network_kwargs", f"{{context: {context}}}",
              "--run.name", context])  # fmt: skip
        shutil.rmtree(tmp_path / "zoo", ignore_errors=True)
        zoo.export(f"runs/{context}/version_0/checkpoints/best.ckpt", name, tmp_path / "zoo")
        if context == "shared":
            monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
            program = [sys.executable, "-m", "lightning_msnn"]
            words = ["--run.test", "false", "--model.network", name, "--model.pretrained", "true", "--run.name", "own"]
            subprocess.run([*program, *LONGER, *words], check=True, capture_output=True)
            monkeypatch.delenv("LIGHTNING_MSNN_ZOO")
    checkpoint = "runs/own/version_0/checkpoints/best.ckpt"
    assert read_checkpoint(checkpoint)["hyper_parameters"]["network_kwargs"]["context"] == "shared"
    for there in (True, False):
        if there:
            monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
        else:
            monkeypatch.delenv("LIGHTNING_MSNN_ZOO")
        for given in ([], ["--model.network", name]):
            words = ["test", *FEW_TESTS, "--ckpt_path", checkpoint, "--trainer.logger", "false", *given]
            main(words)
            found.append(SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True).network.arguments)
    assert all(arguments == found[0] for arguments in found)
    words = [*LONGER, "--trainer.max_epochs", "2", "--model.network", name, "--model.pretrained", "true"]
    main([*words, "--run.name", "own", "--ckpt_path", "last"])
    assert read_checkpoint("runs/own/version_0/checkpoints/last.ckpt")["global_step"] == 6


def test_last_without_a_run_begins_one():
    main(["fit", *SHORT, "--run.test", "false", "--ckpt_path", "last"])
    assert Path("runs/quickstart/version_0/checkpoints/last.ckpt").is_file()


def test_last_without_loggers():
    args = [*LONGER, "--trainer.logger", "false", "--ckpt_path", "last"]
    main(args)
    main([*args, "--trainer.max_epochs", "2"])
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6


def test_without_checkpoints():
    Path("none.yaml").write_text("trainer: {enable_checkpointing: false, callbacks: []}\n")
    main(["fit", *SHORT, "--config", "none.yaml", "--run.test", "false"])
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_checkpoint_io_of_ones_own(tmp_path):
    Path("own.yaml").write_text("trainer: {plugins: {class_path: lightning.fabric.plugins.TorchCheckpointIO}}\n")
    main(["fit", *SHORT, "--config", "own.yaml", "--run.test", "false"])
    assert list(Path("runs").rglob("last.ckpt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_read_only_run_folder(tmp_path, capsys):
    (tmp_path / "runs").mkdir(mode=0o500)
    fails(["fit", *SHORT, "--run.folder", str(tmp_path / "runs")], "cannot write to .* is read-only", capsys)


def test_read_only_run_folder_as_the_system_says(monkeypatch, capsys):
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    fails(["fit", *SHORT], "cannot write to 'runs/quickstart': .* is read-only", capsys)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_configurations_of_trainers(name, capsys):
    """Each goes on top of every recipe; here, without GPUs, the trainer refuses it, and nothing else does."""
    args = [*QUICK, "--config", f"trainer/{name}"]
    fails(["fit", *args], "trainer: .*GPU|No supported gpu", capsys)
    if name == "ddp":
        fails(["fit", *args, "--trainer.accelerator", "cpu"], "sync_batchnorm must be false on CPUs, not true", capsys)
    main(["fit", *SHORT, "--config", f"trainer/{name}", "--trainer.accelerator", "cpu", "--trainer.strategy", "auto",
          "--trainer.devices", "1", "--trainer.sync_batchnorm", "false", "--run.test", "false"])  # fmt: skip
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert ("current_model_state" in last) == (name == "ddp")


def test_the_verb_alone_trains():
    main(["fit", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu",
          "--run.test", "false"])  # fmt: skip
    content = torch.load("runs/msnn_resnet12_tiny_digits/version_0/checkpoints/best.ckpt", weights_only=True)
    assert content["hyper_parameters"]["in_chans"] == 1


def test_what_another_library_says_comes_without_what_it_was_given(monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.network", "resnet18", "--model.pretrained", "true"])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "lightning-msnn: error: model, data or trainer cannot be made as given: the hub cannot be reached"


def test_the_end_of_a_training_is_known(monkeypatch):
    seen = []

    def stop(self):
        seen.append((self.config.fit.trainer.max_epochs, self.config.fit.trainer.max_steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(MSNNCLI, "instantiate_classes", stop)
    for args in ([], ["--trainer.max_steps", "9"], ["--trainer.max_epochs", "3"]):
        with pytest.raises(KeyboardInterrupt):
            main(["fit", *args])
    assert seen == [(30, -1), (None, 9), (3, -1)]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split()[-1] == lightning_msnn.__version__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model.lr", "0.1"], "model.lr is 0.1, but .*last.ckpt has 0.004"),
        (["--model.network", "msnn_vit12_tiny"], "model.network is 'msnn_vit12_tiny', but .* has 'msnn_resnet12_tiny'"),
        (["--data.batch_size", "32"], "data.batch_size is 32, but .* has 64"),
        (["--data", "lightning_msnn.data.CIFAR100"], "data is .*CIFAR100, but .* has .*Digits"),
        (["--trainer.max_epochs", "7"], "cosine schedule .* ends at step 3, not at 21"),
        (["--run.ema", "0.5"], "run.ema is 0.5, but .*last.ckpt has 0.99"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision is 'bf16-mixed', but .*last.ckpt has '32-true'"),
        (["--trainer.gradient_clip_val", "0.1"], "trainer.gradient_clip_val is 0.1, but .*last.ckpt has None"),
    ],
)
def test_a_resume_refuses_other_options(run, tmp_path, given, message, capsys):
    shutil.copytree(run.parent, tmp_path / "runs" / "quickstart")
    fails(["fit", *SHORT, *given, "--run.folder", str(tmp_path / "runs"), "--ckpt_path", "last"], message, capsys)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_another_network_than_the_checkpoints_is_refused(verb, checkpoint, capsys):
    args = [verb, "--ckpt_path", str(checkpoint), "--model.network", "msnn_vit12_tiny"]
    fails(args, "model.network is 'msnn_vit12_tiny', but .*best.ckpt has 'msnn_resnet12_tiny'", capsys)


def test_test_writes_beside_the_checkpoint(run, checkpoint):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parent.name[:5] != "test_"}
    number = len(list(run.glob("test_*")))
    main(["test", "--ckpt_path", str(checkpoint), "--trainer.accelerator", "cpu", *FEW_TESTS])
    made = {path.name for path in (run / f"test_{number}").iterdir()}
    assert {"metrics.csv", "energy.json", "energy.png", "config.yaml"} <= made
    assert "spike_rate.png" in made
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path().iterdir())


def test_an_entry_says_its_data_and_preprocessing(tmp_path, capsys, images):
    """Its image size, its normalisation, its classes and channels: the accuracy is that of its card."""
    entry = ["--model.network", "msnn_resnet12_tiny.digits", "--model.pretrained", "true"]
    main(["test", *entry, "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--run.monitors", "false"])
    shown = capsys.readouterr().out
    assert float(re.search(r"test/top1\W+([\d.]+)", shown)[1]) == pytest.approx(
        zoo.info("msnn_resnet12_tiny.digits")["top1"] / 100, abs=0.01
    )
    # Data of the user's are seen as the entry's.
    root = tmp_path / "own"
    for part in ("train", "test"):
        for i in range(10):
            png(root / part / str(i) / "0.png", np.full((20, 20, 3), 25 * i, dtype=np.uint8))
    Path("grey.py").write_text(
        "from lightning_msnn.data import ImageFolder\n\n\nclass Grey(ImageFolder):\n    in_chans = 1\n"
    )
    sys.path.insert(0, str(Path().absolute()))
    seen = []
    try:
        from grey import Grey

        original = Grey.on_after_batch_transfer

        def watch(self, batch, index):
            seen.append((self.mean, self.std, self.image_size))
            return original(self, batch, index)

        Grey.on_after_batch_transfer = watch
        main(["test", *entry, "--data", "grey.Grey", "--data.root", str(root), "--trainer.accelerator", "cpu",
              "--trainer.logger", "false", "--run.monitors", "false"])  # fmt: skip
    finally:
        sys.path.pop(0)
    assert set(seen) == {(Digits.mean, Digits.std, 16)}
    fails(
        ["test", *entry, "--model.num_classes", "7"], "num_classes is 7, but msnn_resnet12_tiny.digits has 10", capsys
    )


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_msnn.tasks import Task


class Data(LightningDataModule):
    def __init__(self, number: int, batch_size: int = 4):
        super().__init__()
        self.number, self.batch_size = number, batch_size

    def loader(self):
        images = torch.randn(self.number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, images.mean((1, 2, 3))), self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Named(Data):
    num_classes, in_chans = 1, 3


class Plain(LightningModule):
    def __init__(self, width: int = 2, num_classes: int = 5):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(3 * 8 * 8, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0].flatten(1)).squeeze(1) - batch[1]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("test/error", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Brightness(Task):
    def __init__(self, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)

    def losses(self, outputs, targets):
        return (outputs.squeeze(1) - self.hparams["scale"] * targets).square()
"""


@pytest.fixture
def own(monkeypatch):
    """A module, a task and data in a file outside the package."""
    Path("own_code").mkdir()
    Path("own_code/own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(Path("own_code").absolute()))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    _class_parser.cache_clear()
    return ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]


@pytest.mark.parametrize(("kind", "classes"), [("Data", 5), ("Named", 1)])
def test_any_module_and_any_data(own, kind, classes, capsys):
    args = [
        "--model",
        "own_parts.Plain",
        "--model.width",
        "3",
        "--data",
        f"own_parts.{kind}",
        "--data.number",
        "12",
        *own,
    ]
    main(["fit", *args])
    run = Path(f"runs/plain_{kind.lower()}/version_0")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last.ckpt"], "no val/top1 is logged"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"] == {"width": 3, "num_classes": classes}, "the data's where it has one"
    assert {section: last["cli"][section] for section in BASES} == {
        "model": "own_parts.Plain",
        "data": f"own_parts.{kind}",
    }
    assert "test/error" in capsys.readouterr().out
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    fails(["test", "--ckpt_path", checkpoint], "has own_parts.Plain: give --model own_parts.Plain", capsys)
    given = ["test", "--ckpt_path", checkpoint, "--model", "own_parts.Plain"]
    fails(given, f"has own_parts.{kind}: give --data own_parts.{kind}", capsys)
    main([*given, "--data", f"own_parts.{kind}", "--data.number", "8", *own])
    assert "test/error" in capsys.readouterr().out
    fails(["fit", *args, "--model.widht", "3"], "unknown option 'model.widht' of own_parts.Plain; did you mean 'width'",
          capsys)  # fmt: skip


@pytest.mark.filterwarnings("ignore:no neuron fired")  # a network that learns a single number
def test_a_task_of_ones_own(own):
    """A subclass of the base task says its loss; all else works: optimizer, schedule, averages, checkpoints, energy."""
    main(["fit", "--model", "own_parts.Brightness", "--model.scale", "2", "--data", "own_parts.Named", "--data.number",
          "12", "--run.best", "val/loss", "--run.best_mode", "min", "--run.ema", "0.9",
          "--trainer.log_every_n_steps", "1", *own])  # fmt: skip
    run = Path("runs/msnn_resnet12_tiny_named/version_0")
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["hyper_parameters"]["scale"] == 2.0
    assert best["hyper_parameters"]["num_classes"] == 1
    with (run / "metrics.csv").open() as file:
        columns = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"val/loss", "test/loss", "train/lr"} <= columns
    assert (run / "energy.json").is_file()


def test_imagenet_from_a_small_folder_in_its_layout(tmp_path):
    """Data, recipe and network for 224 pixels, from files of any size to a test of what was kept."""
    names = ("n01440764", "n01443537")
    for part, number in (("train", 6), ("val", 2)):
        for label, name in enumerate(names):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.random.default_rng((label, i, number)).integers(0, 255, (60 + i, 90, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
    main([
        "fit", "--config", "data/imagenet", "--config", "recipe/imagenet", "--data.root", str(tmp_path / "images"),
        "--data.batch_size", "4", "--data.val_fraction", "0.2", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.name", "imagenet",
    ])  # fmt: skip
    content = read_checkpoint("runs/imagenet/version_0/checkpoints/best.ckpt")
    assert content["class_names"] == list(names)
    assert content["hyper_parameters"]["network"] == "msnn_resnet20_224"
    assert content["preprocessing"]["image_size"] == 224
    weights = {name.partition("network.")[2]: value.shape for name, value in content["state_dict"].items()}
    assert weights["stem.conv.weight"] == (48, 3, 7, 7)
    assert weights["head.fc.weight"] == (2, 384)
    with Path("runs/imagenet/version_0/metrics.csv").open() as file:
        assert [row["test/top1"] for row in csv.DictReader(file) if row.get("test/top1")], "val/ is the test set"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "here"], "CSVLogger"),
        (["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=here"], "CSVLogger"),
        (["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"], "EarlyStopping"),
    ],
)
def test_objects_by_the_names_of_their_classes(options, path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, *options, "--print_config"])
    assert stop.value.code in (0, None)
    assert (
        f"class_path: lightning.pytorch.{'loggers' if 'Logger' in path else 'callbacks'}.{path}"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--data.root", "../data"), ("--run.folder", "../runs"), ("--run.name", "mine.v2")),
        *(("--data.root", "./a.b/c.d"), ("--trainer.default_root_dir", "mine.v2")),
    ],
)
def test_values_with_points_are_no_classes(option, value, capsys):
    """They are not imported: a file of the user's own of that name is not run."""
    Path("mine.py").write_text("raise SystemExit('run')")
    sys.path.insert(0, "")
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *QUICK, option, value, "--print_config"])
    finally:
        sys.path.remove("")
    assert stop.value.code in (0, None)
    assert f"{option.rpartition('.')[2]}: {value}\n" in capsys.readouterr().out


class Score(Protocol):
    weight: float

    def score(self, x): ...


class Even:
    weight = 0.5

    def score(self, x):
        return x


class Scored(LightningModule):
    def __init__(self, score: Score | None = None):
        super().__init__()


def test_an_object_of_a_protocol_by_the_name_of_its_class(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model", f"{__name__}.Scored", "--model.score", f"{__name__}.Even", "--print_config"])
    assert stop.value.code in (0, None)
    assert f"class_path: {__name__}.Even" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["Nonsense", "no.such.Logger", "../Logger", "collections.OrderedDict", "3", "lightning.pytorch.loggers.Nonsense"],
)
def test_no_such_class(name, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, "--trainer.logger", name])
    assert "trainer.logger must be Logger, " in (said := capsys.readouterr().err)
    assert said.strip().endswith(f"not {name!r}")


def test_a_folder_that_a_logger_is_given_has_no_effect():
    options = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "elsewhere", "--run.best", "null"]
    with pytest.warns(
        UserWarning, match="save_dir 'elsewhere' of CSVLogger has no effect: run.folder and run.name say"
    ):
        main(["fit", *SHORT, *options, "--run.test", "false"])
    assert [path.name for path in Path().iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("folder", "place"),
    [("exp", "exp/"), ("exp", "./exp"), ("a/b", "a/b"), ("exp", "runs"), ("exp", "."), ("exp", None)],
)
def test_a_folder_that_is_that_of_the_run_is_not_told(folder, place, recwarn):
    options = [] if place is None else ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", place]
    main(["fit", *SHORT, "--run.best", "null", "--run.test", "false", "--run.folder", folder, *options])
    assert not [w for w in recwarn if "has no effect" in str(w.message)]
    assert [path.name for path in Path().iterdir()] == [folder.partition("/")[0]]
