"""Archives that are made to do harm, and those that are not."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from lightning_msnn.data import archives
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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_inside_the_folder_too(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        add(tar, "file", content=b"x")
        add(tar, "link", kind, "file")
    with pytest.raises(tarfile.TarError, match="'link' is neither a file nor a folder"):
        extract(tmp_path / "x.tar.gz", tmp_path / "place")
    assert not (tmp_path / "place").exists(), "what comes before it is not written either"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_as_long_as_it_likes(tmp_path: Path, kind: bytes) -> None:
    """17 MB of zeros are packed to 17 kB, less than an archive may grow; tarfile would hold them all at once."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 17 * 2**20
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf() + bytes(header.size)))
    with pytest.raises(ValueError, match="one of its headers has 17825792 bytes"):
        extract(path, tmp_path / "place")
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_too_many_members(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 20)
    path = tmp_path / f"x.{suffix}"

    def write(number: int) -> None:
        if suffix == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for index in range(number):
                    archive.writestr(str(index), "")
        else:
            with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as tar:
                for index in range(number):
                    add(tar, str(index))

    write(21)
    with pytest.raises(ValueError, match="more than 20 members"):
        extract(path, tmp_path / "place")
    assert not (tmp_path / "place").exists()
    write(20)
    extract(path, tmp_path / "place")
    assert len(list((tmp_path / "place").iterdir())) == 20


def test_a_size_that_is_not_true(tmp_path: Path) -> None:
    """The archive ends long before the member does; a sparse one would take no room in it."""
    member = tarfile.TarInfo("x")
    member.size = 2**40
    (tmp_path / "x.tar").write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(ValueError, match="unpacks to more than"):
        extract(tmp_path / "x.tar", tmp_path / "place")
    sparse = bytearray(tarfile.TarInfo("x").tobuf())
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[483:495] = struct.pack(">12s", b"%011o" % 2**32)
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    (tmp_path / "x.tar").write_bytes(bytes(sparse) + bytes(1024))
    with pytest.raises(ValueError, match="unpacks to more than"):
        extract(tmp_path / "x.tar", tmp_path / "place")
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("mode", ["", "gz", "bz2", "xz"])
def test_every_packing(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    with tarfile.open(path, f"w:{mode}") as tar:
        add(tar, "folder", tarfile.DIRTYPE)
        add(tar, "folder/" + "long" * 60, content=b"content" * 100_000)
    extract(path, tmp_path / "place")
    (file,) = (tmp_path / "place" / "folder").iterdir()
    assert file.read_bytes() == b"content" * 100_000
    if mode:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises((tarfile.TarError, OSError)):
            extract(path, tmp_path / "other")
