"""What the command line takes and what it refuses: configurations, what a user can get wrong, help, own modules."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_msnn
from lightning_msnn import data, zoo
from lightning_msnn.cli import MSNNCLI, configurations, main
from lightning_msnn.energy import SAMPLES
from lightning_msnn.energy.profiles import DEFAULT_PROFILE
from lightning_msnn.entries import entries
from lightning_msnn.export import FORMATS
from lightning_msnn.runs import read_checkpoint
from lightning_msnn.zoo.storing import DTYPES
from lightning_msnn.zoo.verification import BATCH
from lightning_msnn_cli import make_parser
from tests.conftest import NETWORKS, rest_is_slow
from tests.test_cli import ENTRY, QUICK, QUIET, _in_empty_folder, fails, stops  # noqa: F401  # the fixture is for all

CONFIGS = Path(__file__).parents[1] / "configs"


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
    "entry with YAML's other true": (
        "test --model.network msnn_vit12.c10O --model.pretrained True", "unknown zoo entry 'msnn_vit12.c10O'"),
    "argument": ("fit --model.network_kwargs '{thetta: 0.1}'", "'thetta'.*did you mean 'theta'"),
    "optimizer by its class": ("fit --optimizer AdamV", "not AdamV; did you mean 'Adam'"),
    "schedule": ("fit --model.schedule cosin", r"'one_cycle', 'triangle', 'constant'\]. Got value: cosin"),
    "precision": ("fit --trainer.precision bf61", "'bf16-mixed', .*not bf61"),
    "configuration": ("fit --config recipe/papr", "'recipe/papr'.*did you mean 'recipe/paper'"),
    "configuration like no other": ("fit --config xyz", "'xyz', neither a file nor .*recipe/.*,paper,"),
    "levels of a conversion": (
        "fit --trainer.callbacks+=Convert --trainer.callbacks.levels=a", "levels: Expected a .*int.*a"),
    "YAML that is none": ("fit --config '{model: {lr: [1}'", "cannot read the configuration.*while parsing"),
    "profile": (f"report {ENTRY} --profile cmos", "profile 'cmos': allowed are cmos_45nm, .*did you mean 'cmos_45nm'"),
    "format": (f"export {ENTRY} --to onx --out x.onnx", "'onx': allowed are nir, onnx, torch; did you mean 'onnx'"),
    "no number": ("fit --model.lr fast", "lr: Expected a float. Got value: fast$"),
    "rate below 0": ("fit --model.lr -1", "lr must be .*-1"),
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
    "folder is a file": (f"fit --trainer.default_root_dir {__file__}", "cannot write to .*test_cli_input.py"),
    "tau of a network": ("fit --model.network_kwargs '{tau: x}'", r"tau must be a number in \[0, 1\], not 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, capsys):
    command, message = BAD[case]
    fails(shlex.split(command), message, capsys)


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


class Trains(Data):
    test_dataloader = LightningDataModule.test_dataloader


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
    main(["fit", "--model", "own_parts.Plain", "--data", "own_parts.Trains", "--data.number", "8", *own])
    assert not list(Path("runs/plain_trains/version_0").glob("test*")), "there is nothing to test on"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"] == {"width": 3, "num_classes": 5}
    assert {"model": "own_parts.Plain", "data": "own_parts.Data"}.items() <= last["cli"].items()
    main(["fit", "--config", str(run / "config.yaml"), "--run.test", "false"])
    test = ["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data", "own_parts.Data", *own]
    main([*test, "--data.number", "8", "--model", "own_parts.Plain"])
    assert "test/error" in capsys.readouterr().out
