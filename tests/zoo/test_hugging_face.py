"""Entries through the Hugging Face hub, whose place a folder takes: its own client needs no test here."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lightning_msnn import zoo
from lightning_msnn.entries import entries, read_config
from lightning_msnn.errors import ConfigurationError
from tests.test_security import NETWORK, small_checkpoint

DIGITS = "msnn_resnet12_tiny.digits"


class Hub:
    """``hf_hub_download`` on a folder of repositories."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def download(self, repo_id, filename, revision=None, cache_dir=None):
        if not (self.folder / repo_id / filename).is_file():
            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return str(self.folder / repo_id / filename)

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", made.download)
    return made


def own_entry(folder, tag, **fields):
    """An entry made of a checkpoint, which is not measured."""
    torch.save(small_checkpoint(), folder / "mine.ckpt")
    return zoo.export(folder / "mine.ckpt", f"{NETWORK}.{tag}", folder / "zoo", **fields)


def logits(network):
    with torch.no_grad():
        return network.eval()(torch.linspace(-2, 2, 2 * 256).view(2, 1, 16, 16))


def test_an_entry_is_uploaded_and_fetched(hub, tmp_path):
    for name, folder in ((DIGITS, entries()[DIGITS]), ("int8", own_entry(tmp_path, "mine", dtype="int8"))):
        hub.upload_folder(f"me/{name}", folder)
        own, fetched = (
            timm.create_model(f"{way}", pretrained=True) for way in (f"local-dir:{folder}", f"hf-hub:me/{name}")
        )
        assert torch.equal(logits(fetched), logits(own))
        assert fetched.arguments == own.arguments
        assert list(fetched.pretrained_cfg["label_names"]) == read_config(folder)["class_names"]
    assert not torch.equal(logits(timm.create_model(f"hf-hub:me/{DIGITS}")), logits(zoo.load(DIGITS)))


def test_what_is_damaged_is_refused(hub):
    hub.upload_folder("me/mine", entries()[DIGITS])
    weights = hub.folder / "me/mine" / "model.safetensors"
    state = load_file(weights)
    state["head.fc.bias"] += 1
    save_file(state, weights)
    with pytest.raises(ConfigurationError, match="is refused: its sha256 is "):
        timm.create_model("hf-hub:me/mine", pretrained=True)
    weights.unlink()
    with pytest.raises(ConfigurationError, match="weights of me/mine cannot be fetched: "):
        timm.create_model("hf-hub:me/mine", pretrained=True)


@pytest.mark.parametrize("name", entries())
def test_cards_are_in_the_format_of_the_hub(name):
    card, config = ModelCard.load(entries()[name] / "README.md").data, zoo.info(name)
    kind = config["data"]["class_path"].rpartition(".")[2]
    task = "audio-classification" if kind == "SpokenDigits" else "image-classification"
    assert (card.library_name, card.license, card.pipeline_tag) == ("timm", "apache-2.0", task)
    assert card.model_name == name
    results = {result.metric_name: result for result in card.eval_results}
    assert [results[f"{top} accuracy"].metric_value for top in ("Top-1", "Top-5")] == [config["top1"], config["top5"]]
    assert {(r.metric_type, r.dataset_split, r.dataset_name, r.task_type) for r in results.values()} == {
        ("accuracy", "test", kind, task)
    }
    assert card.datasets == ([f"uoft-cs/{kind.lower()}"] if kind.startswith("CIFAR") else None)
    assert ("spiking-neural-network" in card.tags) == ("spike_rate" in config)
