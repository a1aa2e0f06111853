"""Recordings through the command line, reports and the zoo."""

import csv
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from lightning_msnn import zoo
from lightning_msnn.cli import main

SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "2", "--trainer.enable_model_summary", "false", "--run.name", "r"),
    *("--trainer.limit_test_batches", "1"),
]
SMALL = "{depths: [1, 1], widths: [8, 8]}"
LAST = "runs/r/version_0/checkpoints/last.ckpt"


def tone(path, hertz, rate=8000, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 20000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    return tmp_path


@pytest.fixture
def digits(here):
    for digit in range(10):
        for speaker in ("theo", "yweweler", "nicolas", "ada"):
            for index in (0, 5, 6):
                tone(here / "fsdd" / f"{digit}_{speaker}_{index}.wav", 200 + 150 * digit + 5 * index)
    return here / "fsdd"


def fit(*args, small=SMALL):
    main(["fit", *args, *SHORT, "--model.network_kwargs", small, "--run.monitors", "false"])


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


SPEECH = ["--config", "data/spoken_digits", "--config", "recipe/tiny", "--data.root", "fsdd"]


@pytest.mark.slow
def test_speech_from_fit_to_a_zoo_entry(digits, here, capsys, monkeypatch):
    fit(*SPEECH, "--data.frames", "32", "--data.splits", "speakers")
    main(["test", "--ckpt_path", LAST, "--data.root", "fsdd", *SHORT[:2], "--run.monitors", "false"])
    tone(here / "some" / "one.wav", 400, rate=16000)
    tone(here / "some" / "two.wav", 900)
    for folder, number in (("some", 2), ("some/two.wav", 1)):
        main(["predict", "--ckpt_path", LAST, "--data.folder", folder, *SHORT[:2]])
        assert [Path(row["file"]).name for row in rows("predictions.csv")] == ["one.wav", "two.wav"][2 - number :]
    main(["report", LAST, "--root", "fsdd", "--out", "r.html", "--samples", "20"])
    page = Path("r.html").read_text()
    assert "of the test recordings of SpokenDigits correctly and takes" in page
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(here / "zoo"))
    main(["zoo", "export", LAST, "msnn_resnet12_tiny.mine", "--root", "fsdd"])
    main(["zoo", "verify", "msnn_resnet12_tiny.mine", "--root", "fsdd"])
    info = zoo.info("msnn_resnet12_tiny.mine")
    assert info["top1_images"] == 60, "the recordings of two speakers"
    made = info["data"]["init_args"]
    assert (made["mels"], made["frames"], made["splits"]) == (32, 32, "speakers")
    assert not {"root", "folder", "batch_size", "seed"} & made.keys()
    network, read = zoo.load("msnn_resnet12_tiny.mine"), zoo.transforms("msnn_resnet12_tiny.mine")
    seen = read("some/two.wav")
    assert seen.shape == tuple(info["input_size"]) == (1, 32, 32)
    said = network(seen[None]).softmax(1).max(1)
    (row,) = rows("predictions.csv")
    assert row["class"] == info["class_names"][int(said.indices)]
    assert float(row["probability"]) == pytest.approx(float(said.values), abs=1e-5)
    card = Path("zoo/msnn_resnet12_tiny.mine/README.md").read_text()
    assert "for 10 classes of recordings, 1x32x32 each." in card
    assert "M for a recording" in card
    assert "| energy of one recording, 45 nm CMOS |" in card
    assert "rate 8000 Hz" in card
    assert "mels 32, frames 32" in card


def test_what_is_tested_at_the_end_is_looked_for_before_the_training(digits, here, capsys):
    for file in digits.glob("*_0.wav"):
        file.unlink()
    with pytest.raises(SystemExit):
        main(["fit", *SPEECH, *SHORT])
    assert "has no recording of the test part" in (said := capsys.readouterr().err)
    assert "--run.test false leaves out the test at the end" in said
    assert not list(here.rglob("*.ckpt"))
    fit(*SPEECH, "--run.test", "false")
    assert Path(LAST).is_file()
