"""The command that trains an entry and its twin, on a small copy of a data set's layout."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "train_zoo.sh"


def train_zoo(tmp_path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "EPOCHS": "1"}
    return subprocess.run(["bash", str(SCRIPT), *words], env=os.environ | more, capture_output=True, text=True)


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Two images for training and one for testing of each class."""
    generator, root = np.random.default_rng(0), tmp_path / "data" / "tiny-imagenet-200"
    wnids = [f"n{i:08d}" for i in range(200)]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids))
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for file in (folder / "0.JPEG", folder / "1.JPEG", root / "val" / "images" / f"{wnid}.JPEG"):
            Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(file)
    (root / "val" / "val_annotations.txt").write_text("".join(f"{wnid}.JPEG\t{wnid}\t0\t0\t63\t63\n" for wnid in wnids))
    return tmp_path / "data"


@pytest.mark.slow
def test_an_entry_and_its_twin_are_made(tiny_imagenet: Path, tmp_path: Path) -> None:
    words = ["msnn_resnet12_tiny", "tiny_imagenet", str(tiny_imagenet), str(tmp_path / "out")]
    words += ["--trainer.accelerator", "cpu"]
    words += ["--model.network_kwargs.depths", "[1, 1]", "--model.network_kwargs.widths", "[24, 24]"]
    done = train_zoo(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    names = ["msnn_resnet12_tiny.tiny_imagenet", "msnn_resnet12_tiny.tiny_imagenet_relu"]
    assert sorted(os.listdir(tmp_path / "out" / "zoo")) == names
    code = "import sys, timm, torch, lightning_msnn; model = timm.create_model(sys.argv[1], pretrained=True)"
    code += "; assert model(torch.rand(1, 3, 64, 64)).shape == (1, 200)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "LIGHTNING_MSNN_ZOO": str(tmp_path / "out" / "zoo")}
    for name in names:
        subprocess.run([sys.executable, "-c", code, name], env=env, check=True)
    again = train_zoo(tmp_path, *words)
    assert (again.returncode, again.stdout) == (0, ""), "what is made is not made again"
