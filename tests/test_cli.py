"""The command line, as a user runs it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import main, read_checkpoint
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import NETWORKS

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--config", str(CONFIGS / "quickstart.yaml")]
FEW_TESTS = ["--trainer.limit_test_batches", "1"]  # operations of the network and its twins are counted on them
SHORT = [
    *QUICK,
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "3", "--trainer.enable_model_summary", "false"),
]


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


def test_saved_config_runs_again(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["network"] == "msnn_resnet12_tiny"
    main(["fit", "--config", str(run / "config.yaml"), "--run.folder", "again", "--trainer.logger", "false",
          "--run.test", "false"])  # fmt: skip
    assert not list(Path("again").rglob("metrics.csv"))


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
    args = ["fit", *SHORT, "--run.test", "false", "--run.folder", str(tmp_path / "runs")]
    main(args)
    main([*args, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert [p.name for p in (tmp_path / "runs" / "quickstart").iterdir()] == ["version_0"]
    last = torch.load(tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
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
        "init_args: {project: msnn, save_dir: ., offline: true}}}\n"
    )
    main(["fit", *SHORT, "--config", "w.yaml", "--run.test", "false"])
    assert list(Path("wandb").glob("offline-run-*"))
    assert Path("runs/quickstart/version_0/metrics.csv").is_file(), "the default loggers stay"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(config):
    """Each names a network and data that exist, and data that is not here is said so."""
    content = yaml.safe_load(config.read_text())
    network = content["model"]["network"]
    assert network in (zoo.list_models() if content["model"].get("pretrained") else NETWORKS)
    if "Digits" in content["data"]["class_path"]:
        return
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config)])
    assert stop.value.code == 2
    assert not list(Path().iterdir())


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
            "--model.in_chans", "3", "--data.cache_dir", str(root.parent / "cache")]  # fmt: skip


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
    "missing checkpoint": (["--ckpt_path", "none.ckpt"], "no checkpoint at 'none.ckpt'"),
    "bad number": (["--model.lr", "-1"], "lr must be .*-1"),
    "bad smoothing": (["--model.label_smoothing", "1.0"], r"label_smoothing .*\[0, 1\).*1.0"),
    "bad schedule": (["--model.schedule", "cosin"], "'cosin'.*did you mean 'cosine'"),
    "bad optimizer": (["--model.optimizer", "adam"], "'adam'.*did you mean 'adamw'"),
    "not a number": (["--model.lr", "fast"], "lr.*fast"),
    "not an integer": (["--trainer.max_epochs", "foo"], "trainer.max_epochs: Expected a int, not .foo.$"),
    "unknown data": (["--data", "lightning_msnn.data.CIFAR1000"], "CIFAR1000"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "bad val_fraction": (["--data.val_fraction", "1.0"], "val_fraction.*1.0"),
}  # fmt: skip


def fails(args, message, capsys):
    """Run the command line; it must end with one sentence, status 2 and nothing written."""
    import re

    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert error[-1].startswith("lightning-msnn: error: ")
    assert re.search(message, error[-1]), error[-1]
    assert not any("Traceback" in line for line in error)
    assert sorted(Path().rglob("*")) == before, "nothing may be written"


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, capsys):
    args, message = BAD[case]
    fails(["fit", *SHORT, *args], message, capsys)


def test_unknown_key_in_yaml(capsys):
    Path("bad.yaml").write_text("model:\n  network_kwarg: {theta: 0.1}\n")
    fails(["fit", *SHORT, "--config", "bad.yaml"], "network_kwarg.*did you mean .*network_kwargs", capsys)


def test_class_count_of_a_folder(folder, capsys):
    fails(["fit", *SHORT, *folder_args(folder)], "num_classes is 10.*ImageFolder has 2", capsys)


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
    main(["fit", *QUICK, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    with Path("runs/quickstart/version_0/metrics.csv").open() as file:
        top1 = [float(row["test/top1"]) for row in csv.DictReader(file) if row.get("test/top1")]
    assert top1[-1] >= 0.96


def test_resuming_keeps_the_metrics(tmp_path):
    args = ["fit", *SHORT, "--run.test", "false", "--run.folder", str(tmp_path / "runs")]
    main(args)
    run = tmp_path / "runs" / "quickstart" / "version_0"
    first = (run / "metrics.csv").read_text()
    for epochs in ("2", "3"):
        main([*args, "--trainer.max_epochs", epochs, "--ckpt_path", "last"])
    assert (run / "metrics.0.csv").read_text() == first
    assert (run / "metrics.1.csv").is_file()
    assert (run / "metrics.csv").is_file()


def test_last_without_a_run_begins_one():
    main(["fit", *SHORT, "--run.test", "false", "--ckpt_path", "last"])
    assert Path("runs/quickstart/version_0/checkpoints/last.ckpt").is_file()


def test_last_without_loggers():
    args = ["fit", *SHORT, "--run.test", "false", "--trainer.logger", "false", "--ckpt_path", "last"]
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
def test_configurations_of_processes(name, capsys):
    """Each goes on top of every other; here, without GPUs, the trainer refuses it, and nothing else does."""
    overlay = CONFIGS / "processes" / f"{name}.yaml"
    fails(["fit", *QUICK, "--config", str(overlay), "--trainer.accelerator", "gpu"], "trainer: .*GPU|No supported gpu",
          capsys)  # fmt: skip
    main(["fit", *SHORT, "--config", str(overlay), "--trainer.accelerator", "cpu", "--trainer.strategy", "auto",
          "--trainer.devices", "1", "--trainer.sync_batchnorm", "false", "--run.test", "false"])  # fmt: skip
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["lr_base_size"] == 128
    assert ("current_model_state" in last) == (name == "ddp")
