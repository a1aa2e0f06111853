"""Networks through the Hugging Face hub, from and to a server on this machine."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lightning_msnn import data, zoo
from lightning_msnn.entries import FACTS, entries, read_config
from lightning_msnn.export import export
from lightning_msnn.zoo.card import write_card
from tests.test_security import NETWORK, SHAPE, small_checkpoint
from tests.zoo.hub_server import Hub

ENTRIES = list(entries())
DIGITS = "msnn_resnet12_tiny.digits"


def own_entry(folder, tag):
    """An entry made of a checkpoint, which is not measured."""
    torch.save(small_checkpoint(), folder / "mine.ckpt")
    return zoo.export(folder / "mine.ckpt", f"{NETWORK}.{tag}", folder / "zoo")


def changed(source, folder, **changes):
    """Copy an entry, with other fields in its ``config.json``."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a client of the hub found there."""
    folder = tmp_path_factory.mktemp("hub")
    mine = own_entry(folder, "mine")
    damaged = changed(entries()[DIGITS], folder / "damaged")
    state = load_file(damaged / "model.safetensors")
    state["head.fc.bias"] += 1
    save_file(state, damaged / "model.safetensors")
    empty = changed(entries()[DIGITS], folder / "empty")
    (empty / "model.safetensors").unlink()
    eighth = changed(entries()[DIGITS], folder / "int8")
    (eighth / "model.safetensors").unlink()
    export(DIGITS, to="weights", dtype="int8", out=eighth / "model.safetensors")
    facts = json.loads((eighth / "config.json").read_text())
    facts[FACTS]["sha256"] = hashlib.sha256((eighth / "model.safetensors").read_bytes()).hexdigest()
    (eighth / "config.json").write_text(json.dumps(facts))
    foreign = changed(entries()[DIGITS], folder / "foreign", architecture="msnn_rnn12_tiny")
    served = {"damaged": damaged, "empty": empty, "int8": eighth, "foreign": foreign, **entries()}
    hub = Hub(folder / "uploaded", {f"zoo/{name}": path for name, path in served.items()})
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_a_token",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "tests.zoo.hub_client", str(mine), str(eighth)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=400)
    hub.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_fetched_as_it_is(name, found):
    config = zoo.info(name)
    same, names, results, licence = found[name]
    assert same
    assert names == config["class_names"]
    assert [[metric, value] for _, metric, value in results] == [
        ["Top-1 accuracy", config["top1"]],
        ["Top-5 accuracy", config["top5"]],
    ]
    assert licence == "apache-2.0"


def test_an_entry_in_8_bits_is_fetched_as_it_is(found):
    assert found["int8"][0]


def test_ones_own_is_uploaded_and_pushed(found):
    assert found["uploaded"]
    assert found["pushed"]
    assert not found["untrained"], "without its weights it is another"


def test_a_network_of_the_hub_takes_other_arguments(found):
    logits, pyramid = found["other"]
    assert logits == [3, 5]
    assert pyramid == [[3, width] for width in SHAPE["widths"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged", "is refused: its sha256 is "),
        ("empty", "weights of zoo/empty cannot be fetched from the hub: "),
        ("foreign", "does not fit msnn_rnn12_tiny: "),
    ],
)
def test_what_is_damaged_is_refused(name, message, found):
    assert message in found["refused"][name]
    assert "\n" not in found["refused"][name]


@pytest.mark.parametrize("name", ENTRIES)
def test_cards_are_in_the_format_of_the_hub(name):
    text = (entries()[name] / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    card, config = ModelCard(text).data, zoo.info(name)
    assert (card.library_name, card.license) == ("timm", "apache-2.0")
    kind = config["data"]["class_path"].rpartition(".")[2]
    assert card.pipeline_tag == TASKS.get(kind, ("image-classification",))[0]
    assert card.model_name == name
    top1 = next(result for result in card.eval_results if result.metric_name == "Top-1 accuracy")
    assert (top1.metric_type, top1.metric_value, top1.dataset_split) == ("accuracy", config["top1"], "test")
    assert top1.dataset_name == kind
    assert card.datasets == ([f"uoft-cs/{kind.lower()}"] if kind.startswith("CIFAR") else None)
    assert ("spiking-neural-network" in card.tags) == ("spike_rate" in config)


TASKS = {
    "SpeechCommands": ("audio-classification", "audio-classification"),
    "SpokenDigits": ("audio-classification", "audio-classification"),
    "EventFrames": ("video-classification", "video-classification"),
    "TimeSeries": (None, "time-series-classification"),  # the hub has forecasts of series alone
}
"""Classes of data that are no images, with the task that the hub lists a card under, and that of its results."""


CLASSIFIED = [name for name in data.__all__ if not re.search("DataModule|Augmentation|Forecast", name)]


@pytest.mark.parametrize("name", CLASSIFIED)
def test_the_task_of_a_card_is_that_of_its_data(name, tmp_path):
    folder = own_entry(tmp_path, "mine")
    content = json.loads((folder / "config.json").read_text())
    content[FACTS] |= {"top1": 50.0, "data": {"class_path": f"lightning_msnn.data.{name}"}}
    (folder / "config.json").write_text(json.dumps(content))
    write_card(folder)
    card = ModelCard((folder / "README.md").read_text()).data
    listed, measured = TASKS.get(name, ("image-classification",) * 2)
    assert card.pipeline_tag == listed
    assert [result.task_type for result in card.eval_results] == [measured]
    assert measured in card.tags
    assert ("image-classification" in card.tags) == (measured == "image-classification")


def test_a_card_says_nothing_that_is_not_known(tmp_path):
    """Of one's own network that is not measured yet, with a licence and a tag that YAML would read otherwise."""
    folder = own_entry(tmp_path, "no")
    matter = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert "model-index" not in matter
    assert "datasets" not in matter
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"]["license"] = "mine: all\n---\nof it"
    content[FACTS]["top1"] = 50.0
    (folder / "config.json").write_text(json.dumps(content))
    write_card(folder)
    matter = yaml.safe_load((folder / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n"))
    assert matter["license"] == "mine: all\n---\nof it"
    assert read_config(folder)["license"] == "mine: all\n---\nof it"
    assert matter["model-index"][0]["name"] == f"{NETWORK}.no"
