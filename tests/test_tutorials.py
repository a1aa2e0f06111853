"""The tutorials: their commands are run, one after another, with few batches of few images."""

import csv
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.report import main as report
from lightning_msnn.zoo.__main__ import main as zoo_main
from tests.conftest import ROOT
from tests.pages import blocks, commands

PAGES = ["getting-started", "own-images", "fine-tune", "distil", "energy", "runs"]
FEW = {
    "fit": [
        *(
            "--trainer.limit_train_batches",
            "2",
            "--trainer.limit_val_batches",
            "1",
            "--trainer.limit_test_batches",
            "1",
        ),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false"),
    ],
    "predict": ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"],
    "export": [],
}
PROGRAMS = {"lightning_msnn.zoo": zoo_main, "lightning_msnn.report": lambda args: report([*args, "--samples", "16"])}


def lines(page):
    """Commands of a page that need no other data than there is, with what they set in the environment."""
    found = [line for block in blocks(ROOT / "docs" / f"{page}.md", "bash") for line in commands(block.text)]
    for line in found:
        if "cifar" not in line and not line.startswith(("python3 -m venv", "source ", "pip install ")):
            yield shlex.split(line)


def run(words, monkeypatch):
    """Run a command of a page in this process."""
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    program, *args = words
    if (verb := f"lightning_msnn.{args[0]}") in PROGRAMS:
        PROGRAMS[verb](args[1:])
    elif program == "lightning-msnn":
        monkeypatch.setattr(sys, "argv", [program])
        more = FEW[args[0]]
        for option, value in zip(more[::2], more[1::2], strict=True):
            args += [option, value]
        main(args)
    elif args[0] == "-m":
        PROGRAMS[args[1]](args[2:])
    else:
        runpy.run_path(args[0], run_name="__main__")
        for images in Path("my_images").glob("*/*"):  # a few of each class
            for file in sorted(images.iterdir())[4:]:
                file.unlink()


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, own_definitions, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save("some/images/black.png")
    for block in blocks(ROOT / "docs" / f"{page}.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    done = 0
    for words in lines(page):
        run(list(words), monkeypatch)
        done += 1
    assert done >= 1
    CHECKS[page](tmp_path)


def runs(folder):
    """Versions of runs by name."""
    return {p.name: len(list(p.glob("version_*"))) for p in (folder / "runs").iterdir()}


def predictions(folder):
    return list(csv.DictReader((folder / "predictions.csv").open()))


def own_images(folder):
    assert runs(folder) == {"mine": 1}
    assert len(predictions(folder)) == len(list((folder / "my_images" / "test").glob("*/*.png"))) > 10
    info = zoo.info("msnn_resnet12_mine")
    assert info["class_names"] == [f"digit_{i}" for i in range(10)]
    assert info["top1_images"] == len(predictions(folder))
    assert zoo.load("msnn_resnet12_mine").num_classes == 10
    assert (folder / "mine.pt2").is_file()
    assert "msnn_resnet12" in timm.list_models("msnn*")


def getting_started(folder):
    assert runs(folder) == {"quickstart": 1}
    (row,) = predictions(folder)
    assert row["file"].endswith("black.png")


def distil(folder):
    assert runs(folder) == {"baseline": 1, "student": 1}
    saved = yaml.safe_load((folder / "runs/student/version_0/config.yaml").read_text())
    teacher = saved["trainer"]["callbacks"][1]["init_args"]["source"]
    assert teacher.endswith("runs/baseline/version_0/checkpoints/best.ckpt")


def fine_tune(folder):
    (name,) = runs(folder)
    saved = yaml.safe_load((folder / "runs" / name / "version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["network"] == "msnn_resnet12.c100"
    assert saved["model"]["init_args"]["pretrained"] is True


def energy(folder):
    page = (folder / "msnn_resnet12_tiny.digits.html").read_text()
    assert "µJ" in page


def again(folder):
    assert runs(folder) == {"quickstart": 2}


CHECKS = {
    "own-images": own_images,
    "getting-started": getting_started,
    "distil": distil,
    "fine-tune": fine_tune,
    "energy": energy,
    "runs": again,
}
