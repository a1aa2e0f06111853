"""The command line, as a user runs it."""

import csv
import re
import runpy
import shlex
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

import lightning_msnn
from lightning_msnn import data, zoo
from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import MSNNCLI, configurations, main
from lightning_msnn.cli.folders import begin_run, newest_run
from lightning_msnn.data import Digits
from lightning_msnn.energy import SAMPLES
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.entries import entries
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import FORMATS
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.zoo.storing import DTYPES
from lightning_msnn.zoo.verification import BATCH
from lightning_msnn_cli import make_parser
from tests.conftest import NETWORKS, rest_is_slow

CONFIGS = Path(__file__).parents[1] / "configs"
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
    assert len(error[-1]) < 400
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
    main([verb, "--ckpt_path", checkpoint, *QUIET, "--run.monitors", str(verb == "test").lower()])
    out = capsys.readouterr().out
    assert f"{'val' if verb == 'validate' else verb}/top1" in out
    assert ("times the first column" in out) == (verb == "test"), "test compares the network with its twins"
    assert {path: path.read_bytes() for path in before} == before
    assert "metrics.csv" in {path.name for path in (run / f"{verb}_0").iterdir()}, "beside the checkpoint"
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


# Configurations


def test_at_most_25_configurations_are_shipped():
    files = [file for file in CONFIGS.rglob("*") if file.is_file()]
    assert sorted(configurations().values()) == sorted(files)
    assert len(files) <= 25


RECIPES = [name for name in configurations() if name.startswith("recipe/")]
PAIRS = [(dataset, recipe) for dataset in ("data/cifar100", "data/digits", "data/spoken_digits") for recipe in RECIPES]


@pytest.mark.parametrize(
    ("dataset", "recipe"), [p if p in PAIRS[::4] else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS]
)
def test_recipes_go_with_data(dataset, recipe, monkeypatch, capsys):
    """By name, in any order; settings are those of this data set."""
    seen = []

    def stop(self):
        seen.append(self.config.fit)
        raise KeyboardInterrupt

    monkeypatch.setattr(MSNNCLI, "before_instantiate_classes", stop)
    own = yaml.safe_load(configurations()[dataset].read_text())["data"]
    said = yaml.safe_load(configurations()[recipe].read_text())
    of_images = issubclass(vars(data)[own["class_path"].rpartition(".")[2]], data.ImageDataModule)
    if not of_images and said["data"].keys() - {"batch_size"}:
        stops(
            ["fit", "--config", dataset, "--config", recipe], "is not accepted|Key must be a string", capsys
        )  # a recipe for images
        return
    for order in [dataset, recipe], [recipe, dataset]:
        with pytest.raises(KeyboardInterrupt):
            main(["fit", *(f"--config={name}" for name in order)])
    assert all(config.model == seen[0].model for config in seen)
    assert seen[0].data.init_args.batch_size == said["data"]["batch_size"]
    assert said["model"].get("network", ENTRY) in [*NETWORKS, *entries()]
    if of_images and "flip" not in said["data"]:
        assert seen[0].data.init_args.flip == (0.0 if "digits" in dataset else 0.5), "not of the default data set"
    for config in seen:
        assert config.data.class_path.rpartition(".")[2] == own["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("entry", rest_is_slow(entries(), ["msnn_rnn12.c100", "spiking.resnet18_cifar_c100"]))
def test_commands_of_cards_are_understood(entry, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MSNNCLI, "before_instantiate_classes", stop)
    for name in ("command", "command_ann_twin"):
        if command := zoo.info(entry).get(name):
            # Three entries were taught block by block, which earlier versions did.
            with pytest.raises(SystemExit if "blocks" in command else KeyboardInterrupt):
                main(shlex.split(command)[1:])
            assert "Option 'blocks' is not accepted" in capsys.readouterr().err or "blocks" not in command


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_configurations_of_trainers(name, capsys):
    """Each goes on top of every recipe; here, without GPUs, the trainer refuses it, and nothing else does."""
    fails(
        ["fit", *QUICK[:2], "--config", f"trainer/{name}"], "cannot be made as given: .*(GPU|No supported gpu)", capsys
    )


# What a user can get wrong

BAD = {
    "verb": ("fitt", "the first argument must be one of fit, .* not 'fitt'; did you mean 'fit'"),
    "option": ("fit --model.netwrk x", "'netwrk' is not accepted; did you mean 'network'"),
    "option of the trainer": ("fit --trainer.max_epohcs 3", "max_epohcs 3; did you mean 'trainer.max_epochs'"),
    "option without its section": ("fit --lr 0.1", "unrecognized arguments: --lr 0.1; see --help"),
    "option in YAML": ("fit --config '{model: {network_kwarg: {a: 1}}}'", "did you mean 'network_kwargs'"),
    "option of a callback": (
        "fit --trainer.callbacks+=SpikeAnnealing --trainer.callbacks.untl=0.5", "'untl' .*did you mean 'until'"),
    "option that is missing": ("fit --trainer.callbacks Teacher", "trainer.callbacks: .* are required: source"),
    "a name of other libraries": ("fit --model.learning_rate 1", "did you mean 'lr'"),
    "callback": ("fit --trainer.callbacks SpikeAnealing", "not SpikeAnealing; did you mean 'SpikeAnnealing'"),
    "logger": ("fit --trainer.logger wandb", r"\[Logger, .*, not wandb; did you mean 'WandbLogger'"),
    "data": ("fit --data Cifar100", "not Cifar100; did you mean 'CIFAR100'"),
    "model": ("fit --model SpikingClasifier", "not SpikingClasifier; did you mean 'SpikingClassifier'"),
    "class of the user's": ("fit --model my.Net", "not my.Net; a file of yours .* imported with --run.imports"),
    "network": ("fit --model.network msnn_resnet21", "'msnn_resnet21'.*allowed are .*did you mean 'msnn_"),
    "entry": (
        "test --model.network msnn_vit12.c10O --model.pretrained true",
        "unknown zoo entry 'msnn_vit12.c10O'.* zoo list names all; did you mean 'msnn_vit12.c10"),
    "argument": ("fit --model.network_kwargs '{thetta: 0.1}'", "'thetta'.*did you mean 'theta'"),
    "optimizer": ("fit --model.optimizer adamv", "'adamv': allowed are adamw, .*did you mean 'adam"),
    "optimizer by its class": ("fit --optimizer AdamV", "not AdamV; did you mean 'Adam'"),
    "schedule": ("fit --model.schedule cosin", r"'one_cycle', 'triangle', 'constant'\]. Got value: cosin"),
    "precision": ("fit --trainer.precision bf61", "'bf16-mixed', .*not bf61"),
    "configuration": ("fit --config recipe/papr", "'recipe/papr'.*did you mean 'recipe/paper'"),
    "configuration like no other": ("fit --config xyz", "'xyz', neither a file nor .*recipe/.*,paper,"),
    "levels of too many": ("fit --model.network_kwargs.levels 16", "levels must be 15 at most, not 16"),
    "levels of a conversion": (
        "fit --trainer.callbacks+=Convert --trainer.callbacks.levels=a", "levels: Expected a .*int.*a"),
    "YAML that is none": ("fit --config '{model: {lr: [1}'", "cannot read the configuration.*while parsing"),
    "profile": (f"report {ENTRY} --profile cmos", "profile 'cmos': allowed are cmos_45nm, .*did you mean 'cmos_45nm'"),
    "format": (f"export {ENTRY} --to onx --out x.onnx", "'onx': allowed are nir, onnx, torch; did you mean 'onnx'"),
    "suffix": (f"export {ENTRY} --to onnx --out x.pt2", "out must end with .onnx for onnx, not be 'x.pt2'"),
    "no number": ("fit --model.lr fast", "lr: Expected a float. Got value: fast$"),
    "rate below 0": ("fit --model.lr -1", "lr must be .*-1"),
    "all for validation": ("fit --data.val_fraction 1.0", "val_fraction.*1.0"),
    "image size": ("fit --data.image_size 0", "image_size must be an integer of at least 1, not 0"),
    "other classes": ("fit --model.num_classes 12", "num_classes is 12.*Digits has 10"),
    "no root": ("fit --data ImageFolder", "root is not given"),
    "no folder": ("fit --data CIFAR100 --data.root /no/such/folder", "/no/such/folder"),
    "folder without classes": ("fit --data ImageFolder --data.root .", "'.' has no class folders: it needs train/<cl"),
    "no strategy": ("fit --trainer.strategy dpp", "cannot be made as given: .*dpp"),
    "schedule alone": ("fit --lr_scheduler StepLR --lr_scheduler.step_size 1", "lr_scheduler needs an optimizer"),
    "missing checkpoint": ("fit --ckpt_path none.ckpt", "no checkpoint at 'none.ckpt'"),
    "no folder for runs": ("fit --trainer.default_root_dir /proc/x", "cannot write to .*'/proc/x/msnn_"),
    "name that fsspec would read": ("fit --run.name resnet::lr1", "run.name must be of letters, .* not 'resnet::lr1'"),
    "name that is not UTF-8": ("fit --run.name \udcff", "run.name must be of letters.*udcff"),
    "folder is a file": (f"fit --trainer.default_root_dir {__file__}", "cannot write to .*test_cli.py"),
    **{
        f"{value} of a network": (f"fit --model.network_kwargs '{{{value}}}'", message)
        for value, message in {
            "levels: 0": "levels must be an integer of at least 1, not 0",
            "windows: alternat": "windows 'alternat': allowed are alternate, .*did you mean 'alternate'",
            "projection: sin": "projection 'sin': allowed are .*did you mean 'sine'",
            "theta: big": "theta must be one number, .*, not 'big'",
            "theta: -1": r"theta must be a number in \[0, 1\], not -1",
            "tau: x": r"tau must be a number in \[0, 1\], not 'x'",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, capsys):
    command, message = BAD[case]
    fails(shlex.split(command), message, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: [file.unlink() for file in (root / "train/cat").iterdir()], "train/cat"),
        (lambda root: shutil.rmtree(root / "test/dog"), "'dog'"),
        (lambda root: (root / "train/dog/2.png").write_bytes(b""), "dog/2.png"),
    ],
)
def test_bad_images(change, message, folder, capsys):
    change(folder)
    stops(
        ["fit", *QUICK, "--data", "ImageFolder", "--data.root", str(folder), "--data.image_size", "8"], message, capsys
    )


def test_a_metric_that_is_not_logged_stops_the_training_before_its_first_step(capsys):
    best = ["--trainer.callbacks+=BestCheckpoint", "--trainer.callbacks.monitor=val/top2"]
    stops(["fit", *QUICK, *best], "no metric 'val/top2' is logged.*did you mean 'val/top5'", capsys)
    assert not list(Path("runs").rglob("*.ckpt"))


def test_what_does_not_fit_the_data_is_said_in_one_sentence(capsys):
    stops(["fit", *QUICK, "--trainer.val_check_interval", "1000"], "cannot begin: .*val_check_interval", capsys)


def test_a_loss_that_is_not_finite_ends_with_status_1(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["fit", *QUICK, "--model.lr", "1e38", "--trainer.max_epochs", "3", "--run.every_n_steps", "1"])
    assert "lightning-msnn: error: the loss is not finite at step " in capsys.readouterr().err.splitlines()[-1]
    last = read_checkpoint("runs/quickstart/version_0/checkpoints/last.ckpt")
    assert last["global_step"] >= 1, "the last checkpoint stays"


# Help


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--help", "report "),
        ("test --help", "--ckpt_path FILE"),
        ("test --help all", "--trainer.limit_test_batches"),
        ("test --print_config", "seed_everything"),
        ("fit --trainer.callbacks.help SpikeAnnealing", "--trainer.callbacks.until"),
        ("export --help", "source"),
        ("zoo verify --help", "--device"),
        ("report --help", "name"),
        ("--version", lightning_msnn.__version__),
    ],
)
def test_help(args, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(args))
    assert stop.value.code in (0, None)
    assert said in capsys.readouterr().out
    assert not list(Path().iterdir())


def test_help_names_options_that_there_are(capsys):
    shown = []
    for args in ("fit --help", "predict --help", "predict --help all", "fit --model.help SpikingClassifier",
                 "predict --data.help ImageFolder"):  # fmt: skip
        with pytest.raises(SystemExit):
            main(args.split())
        said = capsys.readouterr().out
        assert "torch.nn.Linear" not in said, "modules that could be a network"
        shown.append(set(re.findall(r"^ +(?:-\w, )?--([\w.]+)", said, re.MULTILINE)))
    assert len(shown[0]) == 21
    assert shown[0] | shown[1] <= set.union(*shown[2:]) | {"config"}


def test_help_is_there_before_torch():
    code = "import sys\nfrom lightning_msnn_cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    for args in (["--help"], ["fit", "--help"], ["zoo", "--help"], ["export", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *args], stdout=subprocess.DEVNULL).returncode == 0


def test_what_is_written_down_for_help_is_so():
    """Names and numbers of modules that would import torch."""
    report, verify = (make_parser(verb).parse_args for verb in ("report", "zoo"))
    assert (report(["x"]).samples, report(["x"]).profile) == (SAMPLES, DEFAULT_PROFILE)
    assert verify(["verify", "x"]).batch_size == BATCH
    assert [verify(["export", "x", "y", "--dtype", name]).dtype for name in DTYPES] == list(DTYPES)
    assert ", ".join(f"{name} ({form.suffix})" for name, form in FORMATS.items()) in make_parser("export").format_help()


@pytest.mark.parametrize("module", ["lightning_msnn", "lightning_msnn.zoo", "lightning_msnn.report"])
def test_modules_are_commands_too(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "nonsense", "--more"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().err.startswith("lightning-msnn: error: ")


# Modules and data of the user's own

OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    def __init__(self, number: int, batch_size: int = 4):
        super().__init__()
        self.number, self.batch_size = number, batch_size

    def loader(self):
        images = torch.randn(self.number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, images.mean((1, 2, 3))), self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


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
"""


@pytest.fixture
def own(monkeypatch):
    """A module and data in a file outside the package."""
    Path("own_code").mkdir()
    Path("own_code/own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(Path("own_code").absolute()))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    return [*QUIET, "--trainer.max_epochs", "2"]


@pytest.mark.filterwarnings("ignore:no metric .val/top1. is logged")
def test_any_module_and_any_data(own, capsys):
    args = ["--model", "own_parts.Plain", "--model.width", "3", "--data", "own_parts.Data", "--data.number", "12"]
    main(["fit", *args, *own])
    run = Path("runs/plain_data/version_0")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last.ckpt"], "no val/top1 is logged"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"] == {"width": 3, "num_classes": 5}
    assert {"model": "own_parts.Plain", "data": "own_parts.Data"}.items() <= last["cli"].items()
    main(["fit", "--config", str(run / "config.yaml"), "--run.test", "false"])
    test = ["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data", "own_parts.Data", *own]
    main([*test, "--data.number", "8", "--model", "own_parts.Plain"])
    assert "test/error" in capsys.readouterr().out


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
