from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from image_files import MakeTree
from torch import Tensor, nn

from lightning_msnn.data import CIFAR10, ImageFolder
from lightning_msnn.errors import ConfigurationError
from tests.callbacks.training import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Probe(pl.LightningModule):
    """A linear classifier that keeps what it was given."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def step(self, name: str, batch: Any) -> Tensor:
        images, targets = batch
        self.seen[name].append((images, targets))
        return nn.functional.cross_entropy(self.net(images), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_without_a_trainer(make_tree: MakeTree, tmp_path: Path, workers: int) -> None:
    """Floats, normalised and augmented: in a plain loop, from loaders in a Trainer, and after a training."""
    root = str(make_tree(["a", "b"], size=(16, 16)))
    module = ImageFolder(root, image_size=16, batch_size=4, flip=1.0, crop_padding=0, num_workers=workers)
    module.setup()
    (plain,) = module.test_dataloader()
    assert plain[0].dtype == torch.float32
    pixels = module._datasets["train"].images.flip(-1).float() / 255  # type: ignore[union-attr]
    known = {
        ((x - torch.tensor(module.mean).view(3, 1, 1)) / torch.tensor(module.std).view(3, 1, 1)).sum() for x in pixels
    }
    assert all(any(torch.isclose(x.sum(), y) for y in known) for images, _ in module.train_dataloader() for x in images)
    model, runner = Probe(3 * 16 * 16, 2), quiet(tmp_path, max_epochs=1)
    runner.fit(model, module.train_dataloader(), module.val_dataloader())
    runner.test(model, module, verbose=False)
    runner.test(model, module.test_dataloader(), verbose=False)
    (again,) = module.test_dataloader()
    for images, targets in (*model.seen["test"], again):
        assert torch.equal(images, plain[0])
        assert torch.equal(targets, plain[1])
    assert torch.equal(module.on_after_batch_transfer(again, 0)[0], plain[0])


def test_training_images_grow(make_tree: MakeTree, tmp_path: Path) -> None:
    root = str(make_tree(CIFAR10.classes))
    options: dict[str, Any] = {"val_fraction": 0.5, "batch_size": 20, "crop_padding": 0, "flip": 0.0}
    module = CIFAR10(root=root, train_sizes={1: 16, 3: 24}, **options)
    model = Probe(3, 10)
    model.net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    quiet(tmp_path, max_epochs=5, num_sanity_val_steps=1).fit(model, module)
    assert [images.shape[-1] for images, _ in model.seen["train"]] == [32, 16, 16, 24, 24]
    assert {images.shape[-1] for images, _ in model.seen["val"]} == {32}
    # Of the same brightness: scaled, not cut.
    whole, small = (model.seen["train"][i][0].mean((0, 2, 3)) for i in (0, 1))
    torch.testing.assert_close(small, whole, rtol=0, atol=0.02)
    assert module.train_size(0) == 32
    assert module.train_size(100) == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_is_mirrored_in_every_second_epoch(make_tree: MakeTree, workers: int) -> None:
    """Held in memory or decoded by a worker; some in each epoch, and none that is validated."""
    root = str(make_tree(["a", "b"], size=(16, 16), train=20))
    options: dict[str, Any] = {"crop_padding": 0, "flip": "alternate", "image_size": 16, "batch_size": 4}
    module = ImageFolder(root, in_memory=not workers, num_workers=workers, **options)
    plain = ImageFolder(root, **options | {"flip": 0.0})
    for each in (module, plain):
        each.setup("fit")
    module._datasets["train"].crop = None
    originals = {image.numpy().tobytes() for images, _ in plain.train_dataloader() for image in images}
    loader, turns = module.train_dataloader(), []
    for epoch in (0, 1, 2, 5):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen = {}
        for image in (image for images, _ in loader for image in images):
            mirrored = image.numpy().tobytes() not in originals
            seen[(image.flip(-1) if mirrored else image).numpy().tobytes()] = mirrored
        assert seen.keys() == originals
        turns.append(seen)
    assert turns[2] == turns[0]
    assert turns[1] == turns[3] == {image: not mirrored for image, mirrored in turns[0].items()}
    assert 6 < sum(turns[0].values()) < 30
    for (ours, _), (theirs, _) in zip(module.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(ours, theirs)


def test_fit_decodes_no_test_image(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree(CIFAR10.classes)
    for file in root.glob("test/*/*.png"):
        file.write_text("not an image")
    module, model = CIFAR10(str(root), batch_size=4), Probe(3 * 32 * 32, 10)
    quiet(tmp_path, fast_dev_run=True).fit(model, module)
    with pytest.raises(ConfigurationError, match="cannot read the image"):
        quiet(tmp_path, fast_dev_run=True).test(model, module, verbose=False)
