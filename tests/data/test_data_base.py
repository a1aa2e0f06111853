from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from image_files import MakeTree, ready, write_image
from PIL import Image

from lightning_msnn.data import CIFAR10, CIFAR100, ArrayDataModule, Digits, ImageFolder, TinyImageNet200
from lightning_msnn.data.arrays import stratified_split
from lightning_msnn.data.datasets import Loader
from lightning_msnn.data.reading import decode_files, read_image
from lightning_msnn.errors import ConfigurationError

CLASSES = ["ant", "bee", "cat"]
MODULES = [CIFAR10, CIFAR100, Digits, ImageFolder, TinyImageNet200]


def batches_of(loader: Loader) -> list[Any]:
    """All batches; persistent workers end, for which torch waits five seconds if the garbage collector finds them."""
    try:
        return list(loader)
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


@pytest.mark.parametrize("counts", [[10, 10, 10], [500, 3, 41, 2], [7], [5] * 40])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.29, 0.97])
def test_split_is_complete_disjoint_and_stratified(counts: list[int], fraction: float) -> None:
    shuffle = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(9))
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[shuffle]
    train, val = stratified_split(targets, fraction, seed=4)
    assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(len(targets)))
    in_val = torch.bincount(targets[val], minlength=len(counts)).tolist()
    assert all(0 <= number < count for number, count in zip(in_val, counts, strict=True))
    assert all((number > 0) == (fraction > 0) for number in in_val)
    low = len(counts) if fraction else 0
    high = sum(count - 1 for count in counts)
    assert len(val) == min(max(int(fraction * len(targets) + 0.5), low), high)
    if all(1 <= fraction * count <= count - 1 for count in counts):
        # No class is bound by a rule, so each is rounded to one of its neighbours.
        assert all(abs(number - fraction * count) < 1 for number, count in zip(in_val, counts, strict=True))


def test_split_depends_on_the_seed_alone() -> None:
    targets = torch.arange(200) % 5
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stratified_split(targets, 0.2, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(stratified_split(targets, 0.2, 7)[1], first[1])
    assert not torch.equal(stratified_split(targets, 0.2, 8)[1], first[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 2.5), ("image_size", 0), ("val_fraction", 1.0), ("num_workers", -2), ("crop_padding", -1),
        ("flip", 2), ("policy", "autoaugmnt"), ("train_sizes", {0: 0}), ("train_sizes", {-1: 16}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name: str, value: Any) -> None:
    wrong = value if not isinstance(value, dict) else min(*value, *value.values())
    with pytest.raises(ConfigurationError, match=f"{name}.*{wrong}"):
        ImageFolder(**{name: value})


def test_missing_folders_are_named(make_tree: MakeTree, tmp_path: Path) -> None:
    for module, message in (
        (CIFAR100(), r"root is not given.*CIFAR100"),
        (CIFAR10("/nowhere"), r"'/nowhere' is not a folder.*--data.download true"),
        (TinyImageNet200("/nowhere"), r"'/nowhere' is not a folder.*--data.download true"),
        (ImageFolder("/nowhere"), r"'/nowhere' is not a folder(?!.*download)"),
        (CIFAR10(str(tmp_path)), r"no folder '.*train'.*--data.download true"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            module.check("fit")
    root = make_tree(CLASSES)
    for file in (root / "train" / "bee").iterdir():
        file.rename(file.with_suffix(".txt"))
    module = ImageFolder(str(root))
    with pytest.raises(ConfigurationError, match=r"class folder '.*bee' holds no image: allowed are .bmp"):
        module.check("fit")
    module.check("test")
    (root / "test" / "cat").rename(root / "test" / "dog")
    with pytest.raises(ConfigurationError, match=r"lacks 'cat' and has 'dog', but its class folders must be exactly"):
        module.check("test")


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_image_is_named(make_tree: MakeTree, truncated: bool, in_memory: bool) -> None:
    root = make_tree(CLASSES)
    bad = root / "train" / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-600] if truncated else b"not an image")
    module = ImageFolder(str(root), image_size=16, in_memory=in_memory, val_fraction=0.0, num_workers=1 - in_memory)
    with pytest.raises(ConfigurationError, match=r"^cannot read the image '.*train/cat/2.png'") as caught:
        batches_of(ready(module).train_dataloader())
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "x.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 3)
    with pytest.raises(ConfigurationError, match=r"x.png'.*exceeds limit"):
        read_image(str(tmp_path / "x.png"), 8, 3)


def test_decoding_keeps_pixels_and_order(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{index}.png") for index in range(600)]
    for index, file in enumerate(files):
        Image.new("RGB", (4, 4), (index // 256, index % 256, 7)).save(file)
    pixels = decode_files(files, 4, 3)
    assert pixels.dtype == torch.uint8
    expected = torch.tensor([[index // 256, index % 256, 7] for index in range(600)], dtype=torch.uint8)
    assert torch.equal(pixels, expected.view(600, 3, 1, 1).expand(-1, -1, 4, 4))


@pytest.mark.parametrize("wide", [True, False])
def test_resize_takes_the_centre_of_the_shorter_side(tmp_path: Path, wide: bool) -> None:
    # Red ends, a green middle square with a blue centre.
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :10, 0] = pixels[:, 30:, 0] = 255
    pixels[:, 10:30, 1] = 255
    pixels[8:12, 18:22] = (0, 0, 255)
    image = Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2).copy())
    image.save(tmp_path / "x.png")
    result = read_image(str(tmp_path / "x.png"), 10, 3)
    scaled = image.resize((20, 10) if wide else (10, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(scaled.crop((5, 0, 15, 10) if wide else (0, 5, 10, 15))).transpose(2, 0, 1).astype(int)
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_modes(tmp_path: Path) -> None:
    def read(image: Image.Image, channels: int, suffix: str = "png") -> Any:
        image.save(tmp_path / f"x.{suffix}")
        return read_image(str(tmp_path / f"x.{suffix}"), 4, channels)[:, 0, 0].tolist()

    assert read(Image.new("L", (4, 4), 100), 3) == [100, 100, 100]
    assert read(Image.new("RGB", (4, 4), (100, 100, 100)), 1) == [100]
    assert read(Image.new("RGBA", (4, 4), (1, 2, 3, 0)), 3) == [1, 2, 3]
    assert read(Image.new("1", (4, 4), 1), 3) == [255, 255, 255]
    assert read(Image.fromarray(np.full((4, 4), 0x7FFF, dtype=np.uint16)), 3) == [127] * 3


def test_images_are_upright(tmp_path: Path) -> None:
    """The corner that a viewer shows at the top left is there, also of a camera that was held on its side."""
    upright = np.zeros((8, 8, 3), dtype=np.uint8)
    upright[:4, :4] = (250, 0, 0)
    upright[:4, 4:] = (0, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # row 0 of the file is the right side of the picture
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1))).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(str(tmp_path / "x.png"), 8, 3), upright.transpose(2, 0, 1))


class Odd(ArrayDataModule):
    """A data set whose base takes more than it does."""

    def __init__(self, level: float, where: str = "here") -> None:
        super().__init__(batch_size=3)


def test_a_checkpoint_chooses_how_inputs_are_made_and_no_files() -> None:
    everything = ImageFolder("/r", folder="/f", num_workers=3, image_size=48, policy="randaugment", train_sizes={2: 32})
    taken = ImageFolder.arguments_from(dict(everything.hparams))
    assert (taken["image_size"], taken["policy"], taken["train_sizes"]) == (48, "randaugment", {2: 32})
    assert not taken.keys() & {"root", "folder", "num_workers", "download", "pin_memory", "in_memory"}
    gone = {"time_steps": 1, "cache_dir": "/c", "self": 1, "kwargs": {"root": "x"}}
    assert ImageFolder.arguments_from({**everything.hparams, **gone}) == taken
    for kind in MODULES:
        assert kind(**kind.arguments_from(dict(kind().hparams))).hparams == kind().hparams
    for nothing in (None, [], "x"):
        assert Digits.arguments_from(nothing) == {}
    assert Odd.arguments_from(Odd(0.5).hparams) == {"level": 0.5, "where": "here"}
    for path in ("../x.csv", "os.path", ["a/b"], {"x": "a b"}):
        with pytest.raises(ConfigurationError, match="data.where must be given: it was .* in training, which a file"):
            Odd.arguments_from({"where": path})
        assert Odd.arguments_from({"where": path}, ("where",)) == Odd.arguments_from({"where": path}, None) == {}


def test_test_images_are_never_trained_or_validated_on(make_tree: MakeTree) -> None:
    root = make_tree(CLASSES, train=6, test=3)
    module = ready(ImageFolder(root=str(root), image_size=32, val_fraction=0.3, batch_size=4))

    def images(batches: Any) -> list[bytes]:
        return [image.numpy().tobytes() for pixels, _ in batches for image in pixels]

    module.trainer = Mock(world_size=1, global_rank=0)
    module.trainer.state.status = "running"  # so that batches are as they are stored
    train, val, test = (
        images(loader) for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    )
    on_disk = {part: set(images([(decode_files([str(f) for f in (root / part).glob("*/*.png")], 32, 3), 0)]))
               for part in ("train", "test")}  # fmt: skip
    assert set(test) == on_disk["test"]
    assert len(test) == 9
    assert set(train) <= on_disk["train"]
    assert set(val) <= on_disk["train"]
    assert not set(train) & set(val)
    assert (len(train), len(val)) == (12, 5)  # round(0.3 * 18), and 13 = 3 full batches and one image


class Numbers(ArrayDataModule):
    """NumPy's numbers, 36 to train on and 4 to validate, and targets that are no classes."""

    class_names, in_chans, image_size, needs_root = ["one"], 1, (1, 1), False

    def read(self, part: Any) -> Any:
        return np.arange(40, dtype=np.float32), np.linspace(0, 1, 40)

    def transform(self, inputs: torch.Tensor, training: bool) -> torch.Tensor:
        return inputs + 100


@pytest.mark.parametrize(("least", "passes"), [(3, 1), (25, 9)])
def test_an_epoch_of_few_samples_meets_each_as_often(least: int, passes: int) -> None:
    module = ready(Numbers(batch_size=12, min_batches=least))
    assert len(module.train_dataloader()) == 3 * passes
    assert len(module.val_dataloader().dataset) == 4
    met = torch.cat([numbers for numbers, _ in module.train_dataloader()])
    values, times = met.unique(return_counts=True)
    assert (len(values), set(times.tolist())) == (36, {passes})
    assert len(met[:36].unique()) < 36 or passes == 1  # the passes are shuffled together
    for devices in (2, 40):  # the second are more than there are samples
        module.trainer = Mock(world_size=devices, global_rank=devices - 1)
        assert len(module.train_dataloader()) >= least


def test_predict_needs_no_root(tmp_path: Path) -> None:
    for index, name in enumerate(["b.png", "a.JPG", "deep/er/c.webp", ".hidden.png"]):
        write_image(tmp_path / "in" / name, index, (50, 40))
    (tmp_path / "in" / "notes.txt").write_text("")
    module = CIFAR100(folder=str(tmp_path / "in"), batch_size=2)
    module.setup("predict")
    (first, names), (last, name) = module.predict_dataloader()
    assert (first.dtype, first.shape, last.shape) == (torch.float32, (2, 3, 32, 32), (1, 3, 32, 32))
    assert [*names, *name] == [str(tmp_path / "in" / file) for file in ("a.JPG", "b.png", "deep/er/c.webp")]
    Digits(folder=str(tmp_path / "in" / "b.png")).check("predict")
    for folder, message in (
        (None, "folder is not given"),
        (str(tmp_path / "no"), "no' must be a folder with files that end in .bmp"),
        (str(tmp_path / "in" / "notes.txt"), "notes.txt' must be a folder with files that end in .bmp"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Digits(folder=folder).check("predict")


def test_normalisation_is_exact() -> None:
    module = CIFAR10()
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (module.mean, module.std))
    assert torch.equal(module.transform(images, False), (images.float() / 255 - mean) / std)
