"""Archives from the net: fetched over https, compared with their hash, and unpacked into one folder and no other."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

__all__ = ["Archive", "download_and_extract_archive", "extract"]

#: An archive of images, which are compressed already, grows by a few per cent when it is unpacked.
LARGEST_GROWTH = 20


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
    """Unpack a tar or zip archive.

    Raises:
        ValueError: If it would unpack to a multiple of its size, or a member of a zip archive lies outside the folder.
        zipfile.BadZipFile: If it is damaged.
        tarfile.TarError: If it is damaged, or a member lies outside the folder or is no file, folder or link inside it.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            _check_growth(path, (entry.file_size for entry in zipped.infolist()))
            for name in zipped.namelist():
                if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
                    raise ValueError(f"its member {name!r} lies outside of its folder")
            zipped.extractall(folder)
        return
    with tarfile.open(path) as tar:
        _check_growth(path, (member.size for member in tar))
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")


def _check_growth(path: Path, sizes: Iterable[int]) -> None:
    limit = LARGEST_GROWTH * max(path.stat().st_size, 2**20)
    total = 0
    for size in sizes:
        total += size
        if total > limit:
            raise ValueError(f"it unpacks to more than {limit} bytes, {LARGEST_GROWTH} times its size")


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{parts.scheme}://{parts.netloc} is not an https address")


class _Redirect(HTTPRedirectHandler):
    """Follow redirects to https only."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
