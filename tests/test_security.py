"""Files made to do harm: each is refused, and a canary proves that nothing of theirs ran."""

import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_msnn.cli import main
from lightning_msnn.data.archives import Archive, download_and_extract_archive, extract
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.weights import CONFIG_FILE, entries, read_config
from lightning_msnn.runs import AtomicCheckpointIO, read_checkpoint

QUICK = ["--config", str(Path(__file__).parents[1] / "configs" / "quickstart.yaml"), "--trainer.accelerator", "cpu"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that only a payload would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    return tmp_path / "canary"


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


def test_the_payload_works(canary: Path) -> None:
    """Else the tests below could not fail."""
    torch.save({"state_dict": {}, "x": Payload(canary)}, canary.with_name("x"))
    torch.load(canary.with_name("x"), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
def test_pickle_with_a_payload(canary: Path, kind: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = canary.with_name("bad.ckpt")
    content = {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"x": Payload(canary)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(SystemExit) as stop:
        main([verb, *QUICK, "--ckpt_path", str(path)])
    assert stop.value.code == 2
    assert "bad.ckpt' is not a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ConfigurationError, match="not a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)  # whatever is asked for
    assert not canary.exists()


def test_resuming_with_a_payload(canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = canary.parent / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "x": Payload(canary)}, last)
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, "--ckpt_path", "last"])
    assert "last.ckpt' is not a checkpoint" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/object/apply:builtins.exec [\"open('{}', 'w')\"]",
        "!!python/name:os.system",
    ],
)
@pytest.mark.parametrize("key", ["model", "seed_everything", "trainer"])
def test_yaml_with_python_tags(canary: Path, tag: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(f"{key}: {tag.format(canary)}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "--config", "bad.yaml"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()


def tar_with(path: Path, **member: Any) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo()
        for name, value in member.items():
            setattr(info, name, value)
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path


@pytest.mark.parametrize(
    "member",
    [
        {"name": "../canary"},
        {"name": "inside/../../canary"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "../canary"},
        {"name": "link", "type": tarfile.LNKTYPE, "linkname": "../canary"},
        {"name": "device", "type": tarfile.CHRTYPE},
        {"name": "pipe", "type": tarfile.FIFOTYPE},
    ],
)
def test_tar_that_leaves_its_folder(canary: Path, member: dict[str, Any]) -> None:
    place = canary.with_name("place")
    place.mkdir()
    with pytest.raises(tarfile.TarError):
        extract(tar_with(canary.with_name("x.tar.gz"), **member), place)
    assert not canary.exists()
    assert not list(place.iterdir())


def test_absolute_tar_stays_inside(canary: Path) -> None:
    place = canary.with_name("place")
    extract(tar_with(canary.with_name("x.tar.gz"), name=str(canary)), place)
    assert not canary.exists()
    assert (place / str(canary)[1:]).is_file()


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "/canary", "..\\canary"])
def test_zip_that_leaves_its_folder(canary: Path, name: str) -> None:
    path, place = canary.with_name("x.zip"), canary.with_name("place")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("first", "")
        archive.writestr(name, "x")
    with pytest.raises(ValueError, match="lies outside of its folder"):
        extract(path, place)
    assert not canary.exists()
    assert not place.exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_that_unpacks_without_end(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", bytes(2**25))
    else:
        tar_with(path, name="zeros", size=2**25)
    with pytest.raises(ValueError, match="unpacks to more than"):
        extract(path, tmp_path / "place")
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("url", ["http://example.org/x.zip", "ftp://example.org/x.zip", "file:///etc/passwd", "x.zip"])
def test_downloads_are_over_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="is not an https address"):
        download_and_extract_archive(Archive(url, "0" * 32, "x"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_checkpoint_with_overlapping_members(tmp_path: Path) -> None:
    """Nothing is compressed, but one piece of the file is said to be many members."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
        entry = archive.infolist()[0]
        for _ in range(50):
            archive.filelist.append(entry)
    with pytest.raises(ConfigurationError, match="would unpack to 53477376 bytes"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_size", [1, 16], "input_size"),
        ("input_size", [1, -16, 16], "input_size"),
        ("input_size", [1, 1e9, 16], "input_size"),
        ("mean", ["x"], "numbers are needed"),
        ("std", [], "numbers are needed"),
        ("num_classes", 10**12, "num_classes 1000000000000, but names 10 classes"),
        ("tag", "../../x", "is of"),
    ],
)
def test_fields_of_a_zoo_entry(tmp_path: Path, field: str, value: Any, message: str) -> None:
    """A wrong one is left out before a network is made of it."""
    source = entries()["msnn_resnet12_tiny.digits"]
    folder = tmp_path / source.name
    folder.mkdir()
    fields = {**json.loads((source / CONFIG_FILE).read_text()), field: value}
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match=message):
        read_config(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"architecture": "a"}', "\xff", "1e999999", "9" * 10_000])
def test_config_of_a_zoo_entry(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=CONFIG_FILE):
        read_config(tmp_path)
