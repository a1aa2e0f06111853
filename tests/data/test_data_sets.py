import hashlib
import pickle
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from image_files import MakeTree, ready, write_image

from lightning_msnn.data import CIFAR10, CIFAR100, Digits, ImageFolder, TinyImageNet200
from lightning_msnn.data import folder as folder_file
from lightning_msnn.data.archives import Archive
from lightning_msnn.data.datasets import ArrayDataset, FileDataset
from lightning_msnn.errors import ConfigurationError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_digits_parts() -> None:
    first, second = (ready(Digits(seed=seed))._datasets for seed in (0, 1))
    assert {name: len(part) for name, part in first.items()} == {"train": 1294, "val": 144, "test": 359}
    for part in first.values():
        shares = torch.bincount(part.targets, minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.02
    every = torch.cat([first[name].images[first[name].indices] for name in ("train", "val", "test")])
    assert len(every.unique(dim=0)) == 1797
    assert torch.equal(first["test"].images, second["test"].images), "the test part does not depend on the seed"
    assert not torch.equal(first["val"].indices, second["val"].indices)


def test_digits_values_and_statistics() -> None:
    module = Digits(image_size=8)
    pixels, _ = module.read("train")
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (1438, 1, 8, 8))
    assert set(pixels.unique().tolist()) == {round(value * 255 / 16) for value in range(17)}
    scaled = pixels.double() / 255
    assert module.mean == (round(scaled.mean().item(), 4),)
    assert module.std == (round(scaled.std(correction=0).item(), 4),)


@pytest.fixture
def official(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small CIFAR in the official layout, whose checksums torchvision is told."""
    kind: type[CIFAR10] = request.param
    source = kind.official
    folder = tmp_path / "official" / source.base_folder
    folder.mkdir(parents=True)
    label = "labels" if kind is CIFAR10 else "fine_labels"
    generator = np.random.default_rng(0)
    arrays: dict[str, list[Any]] = {}
    for attribute, number in (("train_list", 3), ("test_list", 2)):
        table, held = [], []
        for name, _ in getattr(source, attribute):
            data = generator.integers(0, 256, (number * 10, 3072), dtype=np.uint8)
            targets = [index % 10 for index in range(number * 10)]
            (folder / name).write_bytes(pickle.dumps({"data": data, label: targets}))
            table.append([name, md5(folder / name)])
            held.append((data.reshape(-1, 3, 32, 32), targets))
        arrays[attribute] = held
        monkeypatch.setattr(source, attribute, table)
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: kind.classes}))
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta)})
    return kind, folder, arrays


@pytest.mark.parametrize("official", [CIFAR10, CIFAR100], indirect=True)
def test_cifar_in_the_official_layout(official: Any) -> None:
    kind, folder, arrays = official
    module = kind(str(folder.parent))
    module.check("fit")
    for part, attribute in (("train", "train_list"), ("test", "test_list")):
        images, classes = module.read(part)
        assert np.array_equal(images, np.concatenate([data for data, _ in arrays[attribute]]))
        assert classes.tolist() == [target for _, targets in arrays[attribute] for target in targets]
    assert kind(str(folder.parent), image_size=16).read("test")[0].shape[1:] == (3, 16, 16)
    file = folder / kind.official.train_list[0][0]
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ConfigurationError, match=r"not the official one.*data.download: true"):
        module.setup("fit")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine that serves ``tmp_path``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


def archive_of(tmp_path: Path, source: Path) -> Path:
    path = tmp_path / f"{source.name}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, source.name)
    return path


@pytest.mark.parametrize("official", [CIFAR100], indirect=True)
def test_download(official: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, folder, _ = official
    path = archive_of(tmp_path, folder)
    monkeypatch.setattr(kind, "archive", Archive(server + path.name, md5(path), folder.name))
    root = tmp_path / "new" / "place"
    module = kind(root=str(root), download=True)
    module.check("fit")  # nothing is wrong yet, and nothing is written
    assert not root.parent.exists()
    ready(module)
    assert [entry.name for entry in root.iterdir()] == [folder.name]
    path.unlink()
    ready(kind(root=str(root), download=True))  # there already


@pytest.mark.parametrize("official", [CIFAR100], indirect=True)
@pytest.mark.parametrize("wrong", ["sum", "address", "archive"])
def test_failed_download_leaves_nothing(
    official: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    kind, folder, _ = official
    path = archive_of(tmp_path, folder)
    if wrong == "archive":
        path.write_bytes(path.read_bytes()[:-1000])
    url = server + ("nothing.tar.gz" if wrong == "address" else path.name)
    monkeypatch.setattr(kind, "archive", Archive(url, "0" * 32 if wrong == "sum" else md5(path), folder.name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigurationError, match="cannot download http:") as caught:
        kind(root=str(tmp_path / "new"), download=True).prepare_data()
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    wnids = [f"n{index * 7 % 200:08d}" for index in range(200)]  # not sorted
    for index, wnid in enumerate(wnids):
        for image in range(2):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", 2 * index + image, (8, 8))
        write_image(root / "val" / "images" / f"val_{index}.JPEG", 1000 + index, (8, 8))
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    lines = [f"val_{index}.JPEG\t{wnid}\t0\t0\t7\t7" for index, wnid in enumerate(wnids)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    words = [f"{wnid}\tword{wnid[-3:]}, synonym" for wnid in sorted(wnids)[3:]]
    (root / "words.txt").write_text("n00000000\tcrane, bird\nn00000001\tcrane\nn99999999\tunused\n" + "\n".join(words))
    return root


@pytest.mark.parametrize("inner", [True, False])
def test_tiny_imagenet(tiny: Path, inner: bool) -> None:
    module = ready(TinyImageNet200(root=str(tiny if inner else tiny.parent), image_size=8, val_fraction=0.5))
    assert module.class_names[:5] == ["crane (n00000000)", "crane (n00000001)", "n00000002", "word003", "word004"]
    assert len(set(module.class_names)) == 200
    assert [len(module._datasets[name]) for name in ("train", "val", "test")] == [200] * 3
    assert module.read("train")[1].tolist() == [k for k in range(200) for _ in range(2)]
    wnids = (tiny / "wnids.txt").read_text().split()
    lines = sorted(f"val_{index}.JPEG" for index in range(200))
    numbers = [sorted(wnids).index(wnids[int(line[4:-5])]) for line in lines]
    assert module.read("test")[1].tolist() == numbers


def test_image_folder_classes_and_val_as_test(make_tree: MakeTree) -> None:
    root = make_tree(["zebra", "ape"], test_name="val")
    (root / "test").mkdir()
    write_image(root / "test" / "unlabelled.png", 0)  # ImageNet's test set: images without class folders
    module = ready(ImageFolder(root=str(root), image_size=16))
    assert module.class_names == ["ape", "zebra"]
    assert module.num_classes == 2
    assert len(module._datasets["test"]) == 4
    assert ImageFolder().image_size == 224


def test_image_folder_with_one_part(make_tree: MakeTree) -> None:
    trained = ImageFolder(str(make_tree(["a", "b"], test=0)), image_size=16)
    trained.setup("fit")
    with pytest.raises(ConfigurationError, match=r"no folder '.*test'.*test/<class>/ or val/<class>/"):
        trained.check("test")
    tested = ImageFolder(str(make_tree(["a", "b"], train=0, name="other")), image_size=16)
    tested.setup("test")
    assert tested.class_names == ["a", "b"]
    with pytest.raises(ConfigurationError, match=r"no folder '.*train'"):
        tested.check("fit")


@pytest.mark.parametrize(
    ("in_memory", "count", "size", "kind"),
    [
        (None, 8, 2**32, ArrayDataset),
        (None, 7, 2**32, FileDataset),
        (True, 1, 1, ArrayDataset),
    ],
)
def test_image_folder_in_memory_or_not(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, in_memory: bool | None, count: int, size: int, kind: type
) -> None:
    monkeypatch.setattr(folder_file, "MEMORY_IMAGES", count)
    monkeypatch.setattr(folder_file, "MEMORY_BYTES", size)
    root = str(make_tree(["a", "b"]))
    module = ready(ImageFolder(root=root, image_size=16, in_memory=in_memory))
    assert isinstance(module._datasets["train"], kind)
    assert module.augment.crop_padding == (2 if kind is ArrayDataset else 0)


def test_image_folder_on_the_fly(make_tree: MakeTree) -> None:
    root = str(make_tree(["a", "b"], size=(40, 30)))
    options: dict[str, Any] = {"image_size": 16, "val_fraction": 0.25, "batch_size": 8}
    flying, held = (ready(ImageFolder(root, in_memory=memory, **options)) for memory in (False, True))
    for name in ("val", "test"):
        (images, targets), (others, theirs) = (next(iter(module._loader(name))) for module in (flying, held))
        assert torch.equal(images, others)
        assert torch.equal(targets, theirs)  # type: ignore[arg-type]
    dataset = flying._datasets["train"]
    torch.manual_seed(0)
    (crop, target), (other, _) = dataset[0], dataset[0]
    assert (crop.shape, int(target)) == ((3, 16, 16), 0)
    assert not torch.equal(crop, other)  # a random crop each time
    torch.manual_seed(0)
    assert torch.equal(dataset[0][0], crop)


@pytest.mark.slow
def test_real_cifar100(cifar100: Path) -> None:
    module = CIFAR100(str(cifar100))
    images, targets = module.read("train")
    assert torch.bincount(targets).tolist() == [500] * 100
    pixels = images.float() / 255
    for channel in range(3):
        assert pixels[:, channel].mean().item() == pytest.approx(module.mean[channel], abs=1e-4)
        assert pixels[:, channel].std().item() == pytest.approx(module.std[channel], abs=1e-4)
