"""The tutorials: their commands are run, one after another, with few batches of few images."""

import csv
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_msnn import zoo
from lightning_msnn.cli import main
from tests.conftest import ROOT
from tests.pages import blocks, commands

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
FEW = [f"--trainer.limit_{part}_batches={number}" for part, number in (("train", 2), ("val", 1), ("test", 1))]
MORE = {"fit": [*QUIET, *FEW, "--trainer.max_epochs=1", "--trainer.enable_model_summary=false"], "predict": QUIET}
"""What verbs get beside a page's options."""


def run(words, monkeypatch):
    """Run a command of a page in this process."""
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    program, *args = words
    if args[0] == "report":
        main(["report", *args[1:], "--samples", "16"])
    elif program == "lightning-msnn":
        monkeypatch.setattr(sys, "argv", [program])
        main([*args, *MORE.get(args[0], [])])
    else:
        runpy.run_path(args[0], run_name="__main__")
        for images in Path("my_images").glob("*/*"):  # a few of each class
            for file in sorted(images.iterdir())[4:]:
                file.unlink()


def runs():
    """Versions of runs by name."""
    return {path.name: len(list(path.glob("version_*"))) for path in Path("runs").iterdir()}


def config(name):
    return yaml.safe_load(Path("runs", name, "version_0", "config.yaml").read_text())


def predictions():
    return list(csv.DictReader(Path("predictions.csv").open()))


def own_images():
    assert runs() == {"mine": 1}
    assert len(predictions()) == len(list(Path("my_images/test").glob("*/*.png"))) > 10
    info = zoo.info("msnn_resnet12_mine")
    assert info["class_names"] == [f"digit_{i}" for i in range(10)]
    assert info["top1_images"] == len(predictions())
    assert zoo.load("msnn_resnet12_mine").num_classes == 10
    assert Path("mine.pt2").is_file()


def getting_started():
    assert runs() == {"quickstart": 1}
    (row,) = predictions()
    assert row["file"].endswith("black.png")


def distil():
    assert runs() == {"digits_baseline": 1, "digits_student": 1}
    teacher = config("digits_student")["trainer"]["callbacks"][0]["init_args"]["source"]
    assert teacher.endswith("runs/digits_baseline/version_0/checkpoints/best.ckpt")


def fine_tune():
    (name,) = runs()
    assert config(name)["model"]["init_args"].items() >= {"network": "msnn_resnet12.c100", "pretrained": True}.items()


def energy():
    assert " µJ" in Path("msnn_resnet12_tiny.digits.html").read_text()


def again():
    assert runs() == {"quickstart": 2}


CHECKS = {"getting-started": getting_started, "own-images": own_images, "fine-tune": fine_tune, "distil": distil}
CHECKS |= {"energy": energy, "runs": again}


@pytest.mark.slow
@pytest.mark.parametrize("page", CHECKS)
def test_commands_run(page, tmp_path, monkeypatch, own_definitions, capsys):
    """Those that need no other data than there is."""
    monkeypatch.chdir(tmp_path)
    Path("some/images").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save("some/images/black.png")
    found = blocks(ROOT / "docs" / f"{page}.md")
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text)
    for line in (line for block in found if block.language == "bash" for line in commands(block.text)):
        if "cifar" not in line and not line.startswith(("python3 -m venv", "source ", "pip install ")):
            run(shlex.split(line), monkeypatch)
    CHECKS[page]()
