"""The pages: their code in Python runs, and their commands are understood by the programs that they call.

A command is parsed as far as to the point where something would be built. The two commands of README that install are
taken apart: what they install must be there, and what they run is parsed.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.distributed.run import get_args_parser

from lightning_msnn import zoo
from lightning_msnn.cli import MSNNCLI, main
from lightning_msnn.export import FORMATS
from lightning_msnn_cli import OTHERS, make_parser
from tests.conftest import ROOT, rest_is_slow
from tests.pages import PAGES, blocks, commands

PYTHON = {page.relative_to(ROOT).as_posix(): blocks(page, "python") for page in PAGES if blocks(page, "python")}
ELSEWHERE = {
    "docs/export.md": "tests/export/test_export.py executes it",
    "docs/extending.md": "tests/test_extending.py executes it",
    "docs/own-network.md": "tests/tasks/test_own_network.py executes it",
}
"""Pages whose Python is not executed here, and why."""

OPTIONS_OF_FIT = re.compile(r"--(model|data|trainer|run|optimizer|config|ckpt_path)\b")


def inline(page):
    """Code within the text of a page: commands, and options and values of ``fit`` as commands."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", text):
        if "..." in span:
            continue
        if re.match(r"(\w+=\S+ )?lightning-msnn \w+ -", span) or span.startswith("python "):
            yield span
        elif OPTIONS_OF_FIT.match(span) and " " in span:
            yield f"lightning-msnn fit {span}"
        elif re.match(r"(model|data|trainer|run): \{.*\}$", span):
            yield f"lightning-msnn fit --config {shlex.quote(span)}"


def all_commands():
    """Every command of every page, once, and its page."""
    seen = {}
    for page in PAGES:
        fenced = [line for block in blocks(page, "bash") for line in commands(block.text)]
        yaml_blocks = [f"lightning-msnn fit --config {shlex.quote(block.text)}" for block in blocks(page, "yaml")]
        indented = re.findall(r"^    (python .+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        for line in [*fenced, *yaml_blocks, *indented, *inline(page)]:
            for part in line.split(" && "):
                seen.setdefault(part, page.name)
    return seen


COMMANDS = all_commands()


class ParsedError(Exception):
    """The program has understood its arguments."""


def _parsed(*_):
    raise ParsedError


@pytest.fixture
def folder(tmp_path, monkeypatch, own_definitions):
    """A folder with the files that commands name."""
    for block in (block for page in PAGES for block in blocks(page) if block.file):
        (tmp_path / block.file).write_text(block.text)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my.py").write_text(
        "from lightning.pytorch import LightningDataModule, LightningModule\n"
        "class Module(LightningModule):\n    pass\nclass DataModule(LightningDataModule):\n    pass\n"
    )
    data = {"mine": "ImageFolder", "msnn_resnet12_tiny_spokendigits": "SpokenDigits"}
    for run in {"quickstart", "baseline", "spiking", "mynet", "msnn_resnet12_cifar100", *data}:
        file = tmp_path / "runs" / run / "version_0" / "checkpoints" / "best.ckpt"
        file.parent.mkdir(parents=True)
        kinds = {"model": "tasks.SpikingClassifier", "data": f"data.{data.get(run, 'Digits')}"}
        torch.save({"state_dict": {}, "cli": {key: f"lightning_msnn.{kind}" for key, kind in kinds.items()}}, file)
        (file.parents[1] / "config.yaml").write_text(f"run: {{name: {run}}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse_lightning(args, monkeypatch):
    """Have the command line parse arguments."""
    if args[0] in OTHERS:
        given = make_parser(args[0]).parse_args(args[1:])
        assert args[0] != "export" or given.to in FORMATS
        return
    for i, (option, value) in enumerate(pairwise(list(args))):
        if option == "--config" and isinstance(yaml.safe_load(value), dict):  # a configuration that stands on the page
            Path(f"page{i}.yaml").write_text(value)
            args[i + 1] = f"page{i}.yaml"
    verb = {args[0]: LightningCLI.subcommands()[args[0]]}  # of all four it takes four times as long
    monkeypatch.setattr(MSNNCLI, "subcommands", staticmethod(lambda: verb))
    monkeypatch.setattr(MSNNCLI, "before_instantiate_classes", _parsed)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    with pytest.raises((ParsedError, SystemExit)) as stopped:
        main(args)
    assert stopped.type is ParsedError or (stopped.value.code == 0 and re.search(r"--(\w+\.)?help", " ".join(args)))


def parse_python(args, monkeypatch):
    """Have a program in Python parse arguments."""
    if Path(args[0]).is_file():  # of the page itself: tests of what it shows run it
        compile(Path(args[0]).read_text(), args[0], "exec")
        return
    module, rest = (args[1], args[2:]) if args[0] == "-m" else (args[0], args[1:])
    monkeypatch.setattr(sys, "argv", [module, *rest])
    parse = argparse.ArgumentParser.parse_args
    stop = lambda self, args=None, namespace=None: _parsed(parse(self, args, namespace))  # noqa: E731
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    place, start = (module, runpy.run_module) if args[0] == "-m" else (str(ROOT / module), runpy.run_path)
    with pytest.raises(ParsedError):
        start(place, run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{COMMANDS[c]}: {c[:70]}".replace("\n", " ") for c in COMMANDS])
def test_a_command_is_understood(command, folder, monkeypatch, capsys):
    program, *args = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=\w+$", word)]
    program = program.removeprefix(".venv/bin/")
    if program == "torchrun":
        given = get_args_parser().parse_args(args)
        assert given.module
        program, args = given.training_script, given.training_script_args
    elif program == "srun":
        program, *args = args
    match program:
        case "lightning-msnn" | "lightning_msnn":
            parse_lightning(args, monkeypatch)
        case "python":
            parse_python(args, monkeypatch)
        case "pip":
            extras = [extra for found in re.findall(r"\[(.+)\]", args[-1]) for extra in found.split(",")]
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert args[0] == "install"
            assert set(extras) <= known.keys()
        case "pytest":
            assert all((ROOT / arg).exists() for arg in args if "/" in arg)
            assert {arg for arg in args if arg.startswith("-")} <= {"-n", "-k", "-m", "--runslow"}
        case _:
            others = ("python3 -m venv .venv", "source .venv/bin/activate", "ruff check .", "ruff format --check .")
            assert " ".join((program, *args)) in (*others, "mypy", "mkdocs build --strict", "pre-commit install")


def test_commands_are_found():
    """Else none could fail."""
    assert sum(command.startswith("lightning-msnn") for command in COMMANDS) > 30
    assert sum(command.startswith("python -m") for command in COMMANDS) > 8
    assert ".venv/bin/lightning-msnn fit --config quickstart" in COMMANDS


@pytest.mark.parametrize("wrong", ["--model.thetas 1", "--config recipe/slow"])
def test_a_wrong_command_is_noticed(wrong, folder, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        parse_lightning(["fit", *wrong.split()], monkeypatch)
    assert "lightning-msnn: error" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/concepts.md"])
def test_sentences_are_short(page):
    """Thirty words at most; a cell of a table and an item of a list is text of its own."""
    text = re.sub(r"```.*?```|\]\([^)]*\)", " ", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    parts = [cell for part in re.split(r"\n\n|\n(?=[-|])", text) for cell in part.split("|")]
    sentences = [sentence.split() for part in parts for sentence in re.split(r"[.!?]\s", part)]
    assert not [" ".join(words) for words in sentences if len(words) > 30]


# Python

QUICK = ["README.md", "docs/getting-started.md"]


@pytest.mark.filterwarnings("error::UserWarning", "ignore:The number of training batches")  # which are few here
@pytest.mark.parametrize("page", rest_is_slow(sorted(PYTHON.keys() - ELSEWHERE.keys()), QUICK))
def test_python_runs(page, folder, monkeypatch, capsys):
    """The blocks of a page, one after another in one namespace, with few batches where they train."""
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("apple.png")
    for part in ("TRAIN", "VAL", "TEST"):
        monkeypatch.setenv(f"PL_TRAINER_LIMIT_{part}_BATCHES", "1")
    monkeypatch.setenv("PL_TRAINER_ACCELERATOR", "cpu")
    monkeypatch.setenv("WANDB_SILENT", "true")
    namespace = {}
    for block in PYTHON[page]:
        exec(compile(block.text, f"{page}: {block.heading}", "exec"), namespace)
    printed = capsys.readouterr().out.split()
    if joules := namespace.get("joules"):
        assert (joules if isinstance(joules, float | torch.Tensor) else joules.compute()) > 0
    if "task" in namespace:
        assert namespace["task"].trainer.global_step == namespace["task"].trainer.max_epochs
    if page == "README.md":
        assert printed[0] in zoo.info("msnn_resnet12.c100")["class_names"]
    if page == "docs/energy.md":
        (table,) = (block.text.split() for block in blocks(ROOT / page, "text"))
        assert {word for word in table if "stages." in word} == {word for word in printed if "stages." in word}
    if page == "docs/getting-started.md":
        assert float(printed[0].rstrip("%")) > 90
