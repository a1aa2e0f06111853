"""Archives that are made to do harm, and those that are not."""

import io
import os
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from lightning_msnn.data.archives import extract


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    tar.addfile(member, io.BytesIO(content))


def test_links_past_the_limit_of_a_path(tmp_path: Path) -> None:
    """CVE-2025-4517: links whose targets are longer than the system resolves lead out of the folder."""
    long, place = "d" * 247, tmp_path / "place"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        path = ""
        for letter in "abcdefghijklmnop":
            add(tar, os.path.join(path, long), tarfile.DIRTYPE)
            add(tar, os.path.join(path, letter), tarfile.SYMTYPE, long)
            path = os.path.join(path, long)
        link = os.path.join("/".join("abcdefghijklmnop"), "l" * 254)
        add(tar, link, tarfile.SYMTYPE, "../" * 16)
        add(tar, "escape", tarfile.SYMTYPE, f"{link}/../canaries")
        add(tar, "escape/canary", content=b"out")
    (tmp_path / "canaries").mkdir()
    with pytest.raises(tarfile.TarError, match="is neither a file nor a folder"):
        extract(tmp_path / "x.tar", place)
    assert not place.exists()
    assert not list((tmp_path / "canaries").iterdir())


@pytest.mark.parametrize("name", ["/outside", "../outside", "folder/../../outside"])
@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_nothing_is_written_outside_the_folder(tmp_path: Path, name: str, suffix: str) -> None:
    path, place = tmp_path / f"x.{suffix}", tmp_path / "a" / "place"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "x")
        extract(path, place)  # without the part of the name that leads out
    else:
        with tarfile.open(path, "w:gz") as tar:
            add(tar, name, content=b"x")
        with nullcontext() if name == "/outside" else pytest.raises(tarfile.TarError):
            extract(path, place)
    assert all(place in file.parents for file in tmp_path.rglob("*outside"))
    assert not Path("/outside").exists()


@pytest.mark.parametrize("suffix", ["tar.xz", "zip"])
def test_an_archive_that_grows(tmp_path: Path, suffix: str) -> None:
    path, content = tmp_path / f"x.{suffix}", bytes(21 * 2**20)
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x", content)
    else:
        with tarfile.open(path, "w:xz") as tar:
            add(tar, "x", content=content)
    with pytest.raises(ValueError, match="unpacks to more than 20971520 bytes, 20 times its size"):
        extract(path, tmp_path / "place")
    assert not (tmp_path / "place").exists()
