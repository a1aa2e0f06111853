"""The one loader of trained networks: checkpoints, entries of the zoo, timm."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lightning_msnn import data, zoo
from lightning_msnn.data import Digits, ImageFolder
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.trained import load_trained

DIGITS = "msnn_resnet12_tiny.digits"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a classifier of digits that has learnt nothing."""
    task = SpikingClassifier(in_chans=1)
    task.preprocessing = {"data": "Digits", "image_size": 16, "mean": [0.3], "std": [0.4]}
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(content)
    content["datamodule_hyper_parameters"] = {"root": "/theirs", "num_workers": 9, "batch_size": 7, "image_size": 16}
    path = tmp_path_factory.mktemp("checkpoint") / "mine.ckpt"
    torch.save(content, path)
    return path, task.eval()


def test_a_checkpoint(checkpoint):
    path, task = checkpoint
    trained = load_trained(path)
    assert (trained.name, trained.architecture, trained.input_size) == ("mine.ckpt", "msnn_resnet12_tiny", (1, 16, 16))
    assert (trained.mean, trained.std, trained.data) == ([0.3], [0.4], "lightning_msnn.data.Digits")
    assert trained.data_args == {"batch_size": 7, "image_size": 16}, "where data lies is the user's choice"
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        # A task lays images out as channels_last, and the order of sums may follow.
        assert torch.equal(trained.network(images.to(memory_format=torch.channels_last)), task(images))
    module = trained.data_module(batch_size=3)
    assert (module.batch_size, module.mean, module.root) == (3, (0.3,), None)


@pytest.mark.parametrize("name", [DIGITS, DIGITS.replace(".", "_")])
def test_an_entry(name):
    trained, config = load_trained(name), zoo.info(DIGITS)
    assert trained.info == config
    assert (trained.class_names, trained.mean) == (config["class_names"], config["mean"])
    module = trained.test_data(batch_size=8)
    images, _ = module.on_after_batch_transfer(next(iter(module.test_dataloader())), 0)
    with torch.no_grad():
        assert torch.equal(trained.network(images), zoo.load(DIGITS)(images))


def test_a_network_of_timm(monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)
    trained = load_trained("resnet18.a1_in1k")
    assert (trained.input_size, len(trained.class_names), trained.data) == ((3, 224, 224), 1000, "")
    with pytest.raises(ConfigurationError, match="resnet18.a1_in1k names no data"):
        trained.data_module()


@pytest.mark.parametrize("name", [DIGITS, "msnn_resnet12.c100"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_images_are_prepared_as_predict_does(name, mode, tmp_path):
    """In any size, colours and orientation."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 57, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    image.save(tmp_path / "0.png", exif=exif)
    config = zoo.info(name)
    kind = getattr(data, config["data"]["class_path"].rpartition(".")[2])
    module = kind(folder=str(tmp_path), image_size=config["input_size"][1])
    module.mean, module.std = config["mean"], config["std"]
    module.setup("predict")
    predicted, _ = module.on_after_batch_transfer(next(iter(module.predict_dataloader())), 0)
    with Image.open(tmp_path / "0.png") as file:
        assert torch.equal(zoo.transforms(name)(file), predicted[0])


def test_other_classes_of_the_same_number_are_refused(checkpoint, tmp_path):
    for part in ("train", "test"):
        for i in range(10):
            (tmp_path / part / f"class {i}").mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / part / f"class {i}" / "0.png")
    trained = load_trained(checkpoint[0])
    trained.check(Digits())
    with pytest.raises(ConfigurationError, match="ImageFolder has the classes 'class 0', .* but mine.ckpt knows '0', "):
        trained.check(ImageFolder(root=str(tmp_path)))
    reversed_ = type("Reversed", (Digits,), {"classes": Digits.classes[::-1]})
    with pytest.raises(ConfigurationError, match="in this order"):
        trained.check(reversed_())


def test_the_size_of_images(checkpoint):
    with pytest.raises(ConfigurationError, match="image_size is 8, but mine.ckpt is for 16 x 16"):
        load_trained(checkpoint[0], image_size=8)
    with pytest.raises(ConfigurationError, match="image_size must be an integer of at least 1, not 0"):
        load_trained(DIGITS, image_size=0)
