"""Archives from the net: fetched over https, compared with their hash, and unpacked into one folder and no other."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

__all__ = ["Archive", "download_and_extract_archive", "extract"]

#: An archive of images, which are compressed already, grows by a few per cent when it is unpacked.
LARGEST_GROWTH = 20
#: The largest of our data sets has 120,000.
MOST_MEMBERS = 1_000_000
LONGEST_HEADER = 2**20

#: How a packed tar archive is read, by its first bytes.
PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class Archive(NamedTuple):
    """Where a data set is downloaded from.

    Args:
        url: Address of a tar or zip archive.
        md5: Its MD5 sum, as the source publishes it.
        folder: The folder that it unpacks to.
        sha256: Its SHA-256 sum, compared too if given.
    """

    url: str
    md5: str
    folder: str
    sha256: str = ""


def download_and_extract_archive(archive: Archive, folder: str | Path) -> None:
    """Download an archive to a folder and unpack it there, if its hashes are the expected ones.

    Raises:
        OSError: If it cannot be fetched or written.
        ValueError: If address, hash or content are not what they must be.
        zipfile.BadZipFile: If it is damaged.
        tarfile.TarError: If it is damaged, or a member lies outside the folder.
    """
    path = Path(folder) / os.path.basename(urlsplit(archive.url).path)
    _check_address(archive.url)
    hashes = {"MD5": (hashlib.md5(usedforsecurity=False), archive.md5), "SHA-256": (hashlib.sha256(), archive.sha256)}
    with build_opener(_Redirect).open(archive.url, timeout=60) as source, path.open("wb") as file:
        while block := source.read(2**20):
            file.write(block)
            for digest, _ in hashes.values():
                digest.update(block)
    for name, (digest, expected) in hashes.items():
        if expected and digest.hexdigest() != expected:
            raise ValueError(f"its {name} sum is {digest.hexdigest()}, and {expected} was expected")
    extract(path, folder)
    path.unlink()


def extract(path: Path, folder: str | Path) -> None:
    """Unpack a tar or zip archive of files and folders; nothing is written if one member is something else.

    Raises:
        ValueError: If it has more than a million members, would unpack to a multiple of its size, or a member of a zip
            archive lies outside the folder.
        zipfile.BadZipFile: If it is damaged.
        tarfile.TarError: If it is damaged, or a member lies outside the folder or is no file or folder.
    """
    limit = LARGEST_GROWTH * max(path.stat().st_size, 2**20)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            _check_growth((entry.file_size for entry in zipped.infolist()), limit)
            for name in zipped.namelist():
                if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
                    raise ValueError(f"its member {name!r} lies outside of its folder")
            zipped.extractall(folder)
        return
    with path.open("rb") as file:
        start = file.read(6)
    unpack = next((unpack for magic, unpack in PACKED.items() if start.startswith(magic)), open)
    try:
        with unpack(path, "rb") as stream, tarfile.open(fileobj=_Bounded(stream, limit), mode="r:") as tar:
            _check_growth((member.size for member in tar), limit)
            for member in tar:
                # Links can lead out of the folder past tarfile's own filter (CVE-2025-4517).
                if not (member.isfile() or member.isdir()):
                    raise tarfile.TarError(f"its member {member.name!r} is neither a file nor a folder")
                tarfile.data_filter(member, str(folder))
            tar.extractall(folder, filter="data")
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(str(error)) from error


def _check_growth(sizes: Iterable[int], limit: int) -> None:
    total = 0
    for number, size in enumerate(sizes):
        if number == MOST_MEMBERS:
            raise ValueError(f"it has more than {MOST_MEMBERS} members")
        total += size
        if total > limit:
            raise ValueError(f"it unpacks to more than {limit} bytes, {LARGEST_GROWTH} times its size")


class _Bounded(io.RawIOBase):
    """The unpacked bytes of a tar archive, of which only so many are read, and no large piece at once.

    tarfile reads a header into memory whole, and a header can say of itself that it is as long as it likes.
    """

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit = stream, limit

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, position: int, whence: int = 0) -> int:
        _check_growth([position], self._limit)
        return int(self._stream.seek(position, whence))

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise ValueError(f"one of its headers has {size} bytes, and {LONGEST_HEADER} are allowed")
        _check_growth([self.tell() + size - LONGEST_HEADER], self._limit)
        return bytes(self._stream.read(size))


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{parts.scheme}://{parts.netloc} is not an https address")


class _Redirect(HTTPRedirectHandler):
    """Follow redirects to https only."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
