"""The command line, as a user runs it."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from lightning_msnn import zoo
from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import MSNNCLI, main
from lightning_msnn.cli.folders import begin_run, newest_run
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier

ENTRY = "msnn_resnet12_tiny.digits"
PRETRAINED = ["--model.network", ENTRY, "--model.pretrained", "true"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--trainer.limit_test_batches", "1", "--run.monitors", "false"]
QUICK = ["--config", "quickstart", *QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
LONGER = ["fit", *QUICK, "--run.test", "false", "--model.schedule", "constant"]
"""A schedule that is planned to its end refuses another one."""


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
    main(["fit", *QUICK, "--run.monitors", "true", "--trainer.default_root_dir", str(folder)])
    return folder / "quickstart" / "version_0"


@pytest.fixture
def checkpoint(run):
    return str(run / "checkpoints" / "best.ckpt")


@pytest.fixture
def images(tmp_path):
    """A folder of three digits as PNG files, one of them in a sub-folder."""
    folder = tmp_path / "images"
    for i in range(3):
        png(folder / ("more" if i == 2 else ".") / f"{i}.png", (16, 16))
    return folder


def png(path, shape=(8, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A class folder with two classes."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(4):
                png(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


def stops(args, message, capsys):
    """Run the command line; it must end with one sentence and status 2."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert error[-1].startswith("lightning-msnn: error: ")
    assert re.search(message, error[-1]), error[-1]
    assert len(error[-1]) < 450
    assert not any("Traceback" in line for line in error)


def fails(args, message, capsys):
    """As above, and nothing may be written."""
    before = sorted(Path().rglob("*"))
    stops(args, message, capsys)
    assert sorted(Path().rglob("*")) == before


def columns(file):
    """Columns of a table that have values."""
    with Path(file).open() as rows:
        return {name for row in csv.DictReader(rows) for name, value in row.items() if value}


# A run


def test_fit_leaves_everything(run):
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "curves.png", "energy.json", "energy.png"} <= files
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert {p.name for p in run.parent.iterdir()} == {"version_0"}
    assert {"train/top1", "val/top1", "val/top5", "test/top1", "val/loss"} <= columns(run / "metrics.csv")


def test_fit_ends_by_testing_the_best_weights(monkeypatch):
    """Not the last ones: of two epochs the first has the highest learning rate, which is to be best here."""
    tested = []
    monkeypatch.setattr(
        SpikingClassifier, "on_test_start", lambda task: tested.append(task.network.head.fc.weight.clone()), False
    )
    best = ["--trainer.callbacks+=BestCheckpoint", "--trainer.callbacks.monitor=train/lr"]
    main(["fit", *QUICK, "--trainer.max_epochs", "2", "--model.warmup_epochs", "0", *best])
    best, last = (
        read_checkpoint(f"runs/quickstart/version_0/checkpoints/{name}.ckpt")["state_dict"]["network.head.fc.weight"]
        for name in ("best", "last")
    )
    assert not torch.equal(best, last)
    assert len(tested) == 1
    assert torch.equal(tested[0], best)


def test_saved_config_runs_again(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["network"] == "msnn_resnet12_tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main(["fit", "--config", str(run / "config.yaml"), "--run.test", "false", "--run.monitors", "false"])
    assert {path: path.read_bytes() for path in before} == before, "nothing is overwritten"
    again = run.parent / "version_1"
    first, second = (read_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (run, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    shutil.rmtree(again)


def test_a_checkpoint_is_plain_values(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["class_names"] == [str(i) for i in range(10)]
    assert content["preprocessing"]["image_size"] == 16
    assert content["cli"]["data"] == "lightning_msnn.data.Digits"
    assert set(content["current_model_state"]) == set(content["state_dict"]), "beside their moving average"
    task = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.class_names == content["class_names"]
    with pytest.raises(ConfigurationError):
        EMA(decay=1.0)


def test_the_verb_trains_alone_and_with_an_optimizer_by_name():
    main(["fit", *QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--run.test", "false",
          "--optimizer", "RMSprop", "--optimizer.lr", "0.01", "--lr_scheduler", "ExponentialLR",
          "--lr_scheduler.gamma", "0.5"])  # fmt: skip
    last = read_checkpoint("runs/msnn_resnet12_tiny_digits/version_0/checkpoints/last.ckpt")
    assert last["hyper_parameters"]["in_chans"] == 1, "the data's"
    assert "square_avg" in next(iter(last["optimizer_states"][0]["state"].values()))
    assert last["lr_schedulers"][0]["gamma"] == 0.5


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
    assert not list(Path().iterdir()), "of runs that wrote nothing, nothing is left"


@pytest.mark.slow
def test_quickstart_reaches_96_percent():
    """In 12 of its 30 epochs."""
    options = ["--trainer.max_epochs", "12", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "quickstart", *options])
    with Path("runs/quickstart/version_0/metrics.csv").open() as file:
        top1 = [float(row["test/top1"]) for row in csv.DictReader(file) if row.get("test/top1")]
    assert top1[-1] >= 0.96


# Folders


def test_default_root_dir_says_where_runs_lie(tmp_path, monkeypatch):
    """And a resumed training goes on in the same folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder, root = tmp_path / "home" / "mine" / "quickstart" / "version_0", ["--trainer.default_root_dir", "~/mine"]
    main([*LONGER, *root, "--ckpt_path", "last"])  # there is none: a new training begins
    metrics = (folder / "metrics.csv").read_text()
    main([*LONGER, *root, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert (folder / "metrics.0.csv").read_text() == metrics
    assert (folder / "metrics.csv").is_file()
    main([*LONGER, *root, "--trainer.max_epochs", "2", "--ckpt_path", "last"])  # nothing is left to do
    assert (folder / "metrics.1.csv").is_file(), "it was not refused"
    assert not list(Path().iterdir())


TENSORBOARD = "[{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: .}}]"


@pytest.mark.parametrize(
    ("loggers", "files"),
    [
        pytest.param("true", {"metrics.csv", "curves.png"}, marks=pytest.mark.slow),
        ("false", {"curves.png"}),
        ("[lightning.pytorch.loggers.WandbLogger]", {"metrics.csv", "wandb"}),
        (TENSORBOARD, {"hparams.yaml", "curves.png"}),
    ],
)
def test_with_other_loggers_the_run_is_in_its_folder(loggers, files, monkeypatch):
    if "Wandb" in loggers:
        pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main([*LONGER, "--trainer.logger", loggers])
    folder = Path("runs/quickstart/version_0")
    assert {"best.ckpt", "last.ckpt"} == {path.name for path in (folder / "checkpoints").iterdir()}
    assert files <= {path.name for path in folder.iterdir()}
    assert [path.name for path in Path().iterdir()] == ["runs"]


def claim(base, queue):
    queue.put([begin_run(base).folder.name for _ in range(25)])


def test_no_two_processes_get_one_folder(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=claim, args=(tmp_path / "runs", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    names = [name for _ in processes for name in queue.get()]
    for process in processes:
        process.join()
    assert sorted(names) == sorted(f"version_{i}" for i in range(75))


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert begin_run(tmp_path / "runs").folder.name == "version_0"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "version_4").mkdir(parents=True)
    assert begin_run(tmp_path / "runs").folder.name == "version_4", "which the first process has made"


def test_folders_of_runs(tmp_path):
    assert newest_run(tmp_path / "no") is None
    for name in ("version_0", "version_2/checkpoints", "version_10", "version_x", "version_²", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "version_2" / "checkpoints" / "last.ckpt").touch()
    assert newest_run(tmp_path).name == "version_2"
    runs = [begin_run(tmp_path) for _ in range(2)]
    assert [run.folder.name for run in runs] == ["version_11", "version_12"]
    (runs[1].folder / "metrics.csv").touch()
    nested = begin_run(tmp_path / "more" / "x")
    for run in (*runs, nested):
        run.close()
    assert not (tmp_path / "version_11").exists(), "of a run that wrote nothing"
    assert (tmp_path / "version_12" / "metrics.csv").exists()
    assert not (tmp_path / "more").exists()


# Resuming


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model.lr", "0.1"], "model.lr is 0.1, but .*last.ckpt has 0.004"),
        (
            ["--optimizer", "SGD", "--optimizer.lr", "0.1"],
            "optimizer.class_path is 'torch.optim.SGD', but .*last.ckpt has None",
        ),
        (["--trainer.max_epochs", "7"], "cosine schedule .* ends at step 3, not at 21"),
        (["--model.network_kwargs.levels", "2"], "network_kwargs is {'levels': 2}, but .*last.ckpt has"),
        (["--run.ema", "0.5"], "run.ema is 0.5, but .*last.ckpt has 0.99"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision is 'bf16-mixed', but .*last.ckpt has '32-true'"),
    ],
)
def test_resuming_refuses_other_options(run, tmp_path, given, message, capsys):
    """And leaves the run as it was."""
    shutil.copytree(run.parent, "runs/quickstart")
    folder = Path("runs/quickstart/version_0")
    before = {path: path.read_bytes() for path in (folder / "config.yaml", folder / "metrics.csv")}
    stops(["fit", *QUICK, *given, "--ckpt_path", "last"], message, capsys)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(folder.glob("*.0.*"))


def test_weights_alone_are_not_resumed(checkpoint, capsys):
    rest = ("callbacks", "optimizer_states", "lr_schedulers")
    torch.save({key: value for key, value in read_checkpoint(checkpoint).items() if key not in rest}, "weights.ckpt")
    stops(["fit", *QUICK, "--ckpt_path", "weights.ckpt"], "fit cannot begin: .*contains only the model", capsys)


def test_two_processes_do_not_train_one_run(run, capsys):
    shutil.copytree(run.parent, "runs/quickstart")
    code = "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); print(flush=1)"
    place = "runs/quickstart/version_0"
    other = subprocess.Popen([sys.executable, "-c", f"{code}; input()", place], stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline()
    stops(["fit", *QUICK, "--ckpt_path", "last"], f"another process trains the run '{place}'", capsys)
    other.communicate("\n")


# Trained weights


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_checkpoint_says_model_and_data(verb, run, checkpoint, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and verb not in path.parts[-2]}
    behind = ["--config", "{ckpt_path: null}"]  # as the configuration of a run has it
    main([verb, "--ckpt_path", checkpoint, *behind, *QUIET, "--run.monitors", str(verb == "test").lower()])
    out = capsys.readouterr().out
    assert f"{'val' if verb == 'validate' else verb}/top1" in out
    assert ("times the first column" in out) == (verb == "test"), "test compares the network with its twins"
    assert {path: path.read_bytes() for path in before} == before
    assert "metrics.csv" in {path.name for path in (run / f"{verb}_0").iterdir()}, "beside the checkpoint"
    assert f"ckpt_path: {checkpoint}\n" in (run / f"{verb}_0" / "config.yaml").read_text()
    assert not list(Path().iterdir())


def test_predict_agrees_with_the_network(checkpoint, images):
    main(["predict", "--ckpt_path", checkpoint, "--data.folder", str(images), "--out", "p.csv", *QUIET])
    assert [p.name for p in Path().iterdir()] == ["p.csv"], "predict begins no run"
    task = SpikingClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with Path("p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        pixels = torch.from_numpy(np.array(Image.open(row["file"]))).float().view(1, 1, 16, 16) / 255
        with torch.no_grad():
            probability = task((pixels - Digits.mean[0]) / Digits.std[0]).softmax(1)[0]
        assert row["class"] == task.class_names[probability.argmax()]
        assert float(row["probability"]) == pytest.approx(probability.max().item(), abs=1e-5)


def test_an_entry_says_its_data_and_preprocessing(tmp_path, capsys, monkeypatch):
    main(["test", *PRETRAINED, *QUIET, "--trainer.limit_test_batches", "1.0", "--trainer.logger", "false"])
    shown = capsys.readouterr().out
    assert float(re.search(r"test/top1\W+([\d.]+)", shown)[1]) == pytest.approx(zoo.info(ENTRY)["top1"] / 100, abs=0.01)
    # Data of the user's are seen as the entry's.
    for part in ("train", "test"):
        for i in range(10):
            png(tmp_path / "own" / part / str(i) / "0.png", (20, 20, 3))
    Path("grey.py").write_text(
        "from lightning_msnn.data import ImageFolder\n\n\n"
        "class Grey(ImageFolder):\n"
        "    in_chans = 1\n\n"
        "    def on_after_batch_transfer(self, batch, index):\n"
        "        with open('seen', 'w') as file:\n"
        "            file.write(repr((self.mean, self.std, self.image_size)))\n"
        "        return super().on_after_batch_transfer(batch, index)\n"
    )
    main(["test", *PRETRAINED, "--run.imports", "grey.py", "--data", "grey.Grey", "--data.root", str(tmp_path / "own"),
          *QUIET, "--trainer.logger", "false"])  # fmt: skip
    config = zoo.info(ENTRY)
    assert Path("seen").read_text() == repr((tuple(config["mean"]), tuple(config["std"]), 16))


def test_what_is_not_evaluated(checkpoint, folder, tmp_path, capsys):
    for i in range(8):  # as many classes as the network knows
        for part in ("train", "test"):
            png(folder / part / f"class {i}" / "0.png")
    own = ["--data", "ImageFolder", "--data.root", str(folder)]
    torch.save({"w": 1}, "weights.ckpt")
    for args, message in (
        (["test"], "test needs trained weights: give --ckpt_path FILE"),
        (["predict", "--ckpt_path", checkpoint], "folder is not given"),
        (["test", "--ckpt_path", "none.ckpt"], "no checkpoint at 'none.ckpt'"),
        (["test", "--ckpt_path", "last"], "--ckpt_path last is for fit"),
        (["test", "--ckpt_path", "weights.ckpt"], "has no 'state_dict'"),
        (["test", "--ckpt_path", checkpoint, "--model.network", "msnn_vit12_tiny"], "'msnn_vit12_tiny', but .*best"),
        (
            ["test", "--ckpt_path", checkpoint, "--model.network_kwargs", "{levels: 4}"],
            "network_kwargs is {'levels': 4}, but .*best.* leave it out",
        ),
        (["test", "--ckpt_path", checkpoint, *own], "in_chans is 1, but ImageFolder has 3"),
    ):
        fails([*args, *QUIET], message, capsys)


@pytest.mark.slow
def test_imagenet_from_a_small_folder_in_its_layout(tmp_path):
    """Data, recipe and network for 224 pixels, from files of any size to a test of what was kept."""
    for part in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            for i in range(4):
                png(tmp_path / "images" / part / name / f"{i}.JPEG", (60 + i, 90, 3))
    main(["fit", "--config", "data/imagenet", "--config", "recipe/imagenet", "--data.root", str(tmp_path / "images"),
          "--data.batch_size", "2", "--data.val_fraction", "0.25", *QUIET, "--trainer.max_epochs", "1",
          "--trainer.limit_train_batches", "2", "--run.name", "imagenet"])  # fmt: skip
    content = read_checkpoint("runs/imagenet/version_0/checkpoints/best.ckpt")
    assert content["class_names"] == ["n01440764", "n01443537"]
    assert content["preprocessing"]["image_size"] == 224
    assert "test/top1" in columns("runs/imagenet/version_0/metrics.csv"), "val/ is the test set"
