"""What a user can get wrong: each is one sentence that names the value, an exit status, and nothing left behind."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_msnn.cli import main
from lightning_msnn.entries import entries

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--config", str(CONFIGS / "quickstart.yaml"), "--trainer.accelerator", "cpu"]
ENTRY = "msnn_resnet12_tiny.digits"
Case = tuple[Callable[[Path], list[str]], str]


def options(*args: str, verb: str = "fit") -> Callable[[Path], list[str]]:
    """The quickstart with other options."""
    return lambda _: [verb, *QUICK, *args]


def config(text: str) -> Callable[[Path], list[str]]:
    """The quickstart with a second configuration file."""

    def make(folder: Path) -> list[str]:
        (folder / "bad.yaml").write_text(text)
        return ["fit", *QUICK, "--config", str(folder / "bad.yaml")]

    return make


def picture(path: Path, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).save(path)


def images(change: Callable[[Path], Any], *args: str) -> Callable[[Path], list[str]]:
    """A folder of two classes with something wrong in it."""

    def make(folder: Path) -> list[str]:
        root = folder / "images"
        for part in ("train", "test"):
            for name in ("cat", "dog"):
                for i in range(4):
                    picture(root / part / name / f"{i}.png")
        change(root)
        return [
            *("fit", *QUICK, "--data", "lightning_msnn.data.ImageFolder", "--data.root", str(root)),
            *("--data.image_size", "8", "--model.in_chans", "3", "--model.num_classes", "2"),
            *args,
        ]

    return make


def checkpoint(write: Callable[[Path], Any], verb: str = "test") -> Callable[[Path], list[str]]:
    """A checkpoint that is none."""

    def make(folder: Path) -> list[str]:
        write(folder / "bad.ckpt")
        return [verb, *QUICK, "--ckpt_path", str(folder / "bad.ckpt")]

    return make


def entry(change: Callable[[Path], Any], hashed: bool = True) -> Callable[[Path], list[str]]:
    """A zoo with one entry that has something wrong in it."""

    def make(folder: Path) -> list[str]:
        place = folder / "zoo" / ENTRY
        shutil.copytree(entries()[ENTRY], place)
        os.environ["LIGHTNING_MSNN_ZOO"] = str(folder / "zoo")  # put back by the fixture
        change(place)
        if hashed:
            fields = json.loads((place / "config.json").read_text())
            fields["lightning_msnn"]["sha256"] = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
            (place / "config.json").write_text(json.dumps(fields))
        return ["test", *QUICK, "--model.network", ENTRY, "--model.pretrained", "true"]

    return make


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces a size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def bomb(path: Path) -> None:
    """A zip archive of a few kilobytes that unpacks to 64 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))


def flip_bit(place: Path) -> None:
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "model.safetensors").write_bytes(content)


def rename_tensor(place: Path) -> None:
    state = load_file(place / "model.safetensors")
    state["stem.conv.wait"] = state.pop("stem.conv.weight")
    save_file(state, place / "model.safetensors")


def cat(root: Path) -> Path:
    return root / "train" / "cat" / "0.png"


FOLDER = ("--data", "lightning_msnn.data.ImageFolder", "--model.in_chans", "3", "--model.num_classes", "2")

CASES: dict[str, Case] = {
    # Command lines
    "no such verb": (lambda _: ["fitt"], "fitt"),
    "unknown option": (options("--model.netwrk", "x"), "netwrk.*did you mean"),
    "option of the trainer": (options("--trainer.max_epohcs", "3"), "max_epohcs.*did you mean.*max_epochs"),
    "no number": (options("--model.lr", "fast"), "lr.*fast"),
    "an epoch below zero": (
        options("--data.train_sizes", "{-1: 8}"), "an epoch of data.train_sizes must be an integer .* not -1$"),
    "nothing for an epoch": (
        config("data: {train_sizes: {0: null}}"), "data.train_sizes of epoch 0 must be a number, not null$"),
    "sizes for a network of one": (
        options("--model.network", "vit_tiny_patch16_224", "--data.train_sizes", "{3: 12}", "--model.network_kwargs",
                "{patch_size: 4, depth: 1, img_size: 16}"),
        "vit_tiny_patch16_224 takes images of 16x16 pixels alone, but Digits has 12"),
    "no integer": (options("--trainer.max_epochs", "1.5"), "max_epochs.*1.5"),
    "no device": (options("--trainer.devices", "-3"), "trainer.*`devices`.* > 0"),
    "no strategy": (options("--trainer.strategy", "dpp"), "trainer.*'dpp'"),
    "sharding on a CPU": (options("--trainer.strategy", "fsdp"), "trainer.*fsdp.*GPU"),
    "no precision": (options("--trainer.precision", "8-bits"), "precision must be 64, 32, .* or null, not '8-bits'"),
    "clipped below zero": (options("--trainer.gradient_clip_val", "-1"), "gradient_clip_val.*at least 0 or null.*-1"),
    "no option of an optimizer": (
        options("--optimizer", "torch.optim.SGD", "--optimizer.lrr", "1"), "optimizer: Option 'lrr' is not accepted$"),
    "a rate of an optimizer in words": (
        options("--optimizer", "torch.optim.SGD", "--optimizer.lr", "fast"), "optimizer: lr: Expected a <class 'float"),
    "a callback without what it needs": (
        options("--trainer.callbacks", '[{"class_path": "EarlyStopping"}]'),
        "trainer.callbacks: the following arguments are required: monitor$"),
    "no option of a callback": (
        options("--trainer.callbacks", '[{"class_path": "Timer", "init_args": {"druation": 1}}]'),
        "trainer.callbacks: Option 'druation' is not accepted"),
    "no accelerator": (options("--trainer.accelerator", "gqu"), "trainer.*'gqu'"),
    "negative steps": (options("--run.every_n_steps", "-1"), "every_n_steps.*-1"),
    "run folder is a file": (options("--run.folder", __file__), "cannot write to.*test_bad_inputs.py"),
    "nothing to evaluate": (options(verb="test"), "--ckpt_path FILE"),
    "checkpoint is missing": (options("--ckpt_path", "no.ckpt"), "no checkpoint at 'no.ckpt'"),
    "checkpoint on the net": (options("--ckpt_path", "http://x/y.ckpt"), "no checkpoint at 'http://x/y.ckpt'"),
    "no folder to predict": (options("--model.pretrained", "true", verb="predict"), "folder is not given"),
    # Configurations
    "no configuration": (options("--config", "nowhere.yaml"), "nowhere.yaml"),
    "YAML that is none": (config("model: {lr: [1"), "bad.yaml|while parsing"),
    "YAML is a list": (config("- 1\n- 2\n"), "bad.yaml|Unable to parse|must be|expected|not"),
    "YAML with a Python tag": (config("model: {lr: !!python/object/apply:os.getcwd []}"), "python/object"),
    "unknown key": (config("model: {network_kwarg: {theta: 0.1}}"), "network_kwarg.*did you mean .*network_kwargs"),
    "unknown network": (config("model: {network: msnn_resnet21}"), "'msnn_resnet21'.*did you mean"),
    "unknown window": (config("model: {network_kwargs: {windows: round}}"), "'round'.*allowed are"),
    "unknown projection": (config("model: {network_kwargs: {projection: cosin}}"), "'cosin'.*did you mean 'sine'"),
    "theta is not finite": (config("model: {network_kwargs: {theta: .nan}}"), "theta.*nan"),
    "theta is a word": (config("model: {network_kwargs: {theta: abcd}}"), "theta must be a number .*, not 'abcd'"),
    "rate is infinite": (config("model: {lr: .inf}"), "lr must be.*inf"),
    "smoothing of one": (config("model: {label_smoothing: 1.0}"), r"label_smoothing.*\[0, 1\).*1.0"),
    "unknown optimizer": (config("model: {optimizer: adamww}"), "'adamww'.*did you mean 'adamw'"),
    "wrong number of classes": (config("model: {num_classes: 12}"), "num_classes is 12.*Digits has 10"),
    "wrong number of channels": (config("model: {in_chans: 3}"), "in_chans is 3.*Digits has 1"),
    "class that is none of ours": (config("data: {class_path: os.system}"), "os.system"),
    "callback that is none": (config("trainer: {callbacks: [{class_path: pathlib.Path}]}"), "pathlib.Path|Path"),
    "average that never moves": (
        config("trainer: {callbacks: [{class_path: lightning_msnn.callbacks.EMA, init_args: {decay: 1.5}}]}"), "1.5"),
    "all for validation": (config("data: {init_args: {val_fraction: 1.0}}"), "val_fraction.*1.0"),
    "no batch": (config("data: {init_args: {batch_size: 0}}"), "batch_size.*0"),
    # Data folders and images
    "no root": (options(*FOLDER), "root is not given"),
    "root is missing": (options(*FOLDER, "--data.root", "/no/such"), "'/no/such' is not a folder"),
    "class without images": (images(lambda root: [f.unlink() for f in (root / "train/cat").iterdir()]), "train/cat"),
    "class only to train": (images(lambda root: shutil.rmtree(root / "test/dog")), "'dog'"),
    "no training part": (images(lambda root: shutil.rmtree(root / "train")), "train"),
    "empty image": (images(lambda root: cat(root).write_bytes(b"")), "cat/0.png"),
    "text for an image": (images(lambda root: cat(root).write_text("hello")), "cat/0.png"),
    "truncated image": (images(lambda root: cat(root).write_bytes(cat(root).read_bytes()[:70])), "cat/0.png"),
    "absurd header": (images(lambda root: cat(root).write_bytes(png_header(60_000, 60_000))), "cat/0.png.*pixels"),
    "header beyond all limits": (
        images(lambda root: cat(root).write_bytes(png_header(2**31 - 1, 2**31 - 1))), "cat/0.png.*pixels"),
    "PostScript under another name": (
        images(lambda root: cat(root).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")),
        "cat/0.png"),
    "folder to predict is empty": (
        lambda folder: [*options("--model.pretrained", "true", verb="predict")(folder), "--data.folder", str(folder)],
        "holds no image"),
    # Checkpoints
    "empty checkpoint": (checkpoint(lambda path: path.write_bytes(b"")), "bad.ckpt' is not a checkpoint"),
    "text for a checkpoint": (checkpoint(lambda path: path.write_text("x" * 999)), "bad.ckpt' is not a checkpoint"),
    "checkpoint of an object": (
        checkpoint(lambda path: torch.save({"state_dict": Path("x")}, path)), "bad.ckpt' is not a checkpoint"),
    "checkpoint of weights alone": (checkpoint(lambda path: torch.save({"w": 1}, path)), "has no 'state_dict'"),
    "half a checkpoint": (
        checkpoint(lambda path: (torch.save({"state_dict": {"w": torch.zeros(999)}}, path),
                                 path.write_bytes(path.read_bytes()[:2000]))), "bad.ckpt' is not a checkpoint"),
    "checkpoint that unpacks without end": (checkpoint(bomb, "fit"), "would unpack to 67108864 bytes"),
    "checkpoint is a folder": (checkpoint(lambda path: path.mkdir()), "no checkpoint at"),
    # Zoo entries
    "unknown entry": (options("--model.network", "msnn_resnet12_tiny.digit"), "msnn_resnet12_tiny.digit'"),
    "flipped bit": (
        entry(flip_bit, hashed=False), "model.safetensors is refused: its sha256"),
    "pickle for safetensors": (
        entry(lambda p: torch.save({"x": 1}, p / "model.safetensors")), "is not a safetensors file"),
    "renamed tensor": (entry(rename_tensor), "stem.conv.wait"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", "")


def test_there_are_at_least_40() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = CASES[case]
    args = make(tmp_path)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    if os.environ["LIGHTNING_MSNN_ZOO"]:  # entries are registered when the package is imported
        done = subprocess.run(
            [sys.executable, "-m", "lightning_msnn", *args], capture_output=True, text=True, timeout=300
        )
        code, said = done.returncode, done.stderr.strip()
    else:
        with pytest.raises(SystemExit) as stop:
            main(args)
        code, said = stop.value.code, capsys.readouterr().err.strip()
    assert code == 2
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("lightning-msnn: error: ")
    assert re.search(message, last), last
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before, "nothing lost, nothing left"
