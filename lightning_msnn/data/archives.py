"""Download archives, compare them with their hashes, and unpack them into one folder."""

import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch.hub import download_url_to_file
from torchvision.datasets.utils import check_integrity

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
    """Download an archive to a folder and unpack it there, if its hashes are as expected.

    Raises:
        OSError: If it cannot be fetched or written.
        RuntimeError: If its SHA-256 sum is another.
        ValueError: If its MD5 sum is another; and what :func:`extract` raises.
    """
    path = Path(folder) / os.path.basename(archive.url)
    download_url_to_file(archive.url, str(path), hash_prefix=archive.sha256 or None, progress=False)
    if not check_integrity(str(path), archive.md5):
        raise ValueError(f"its MD5 sum is not {archive.md5}")
    extract(path, folder)
    path.unlink()


def extract(path: Path, folder: str | Path) -> None:
    """Unpack a tar or zip archive of files and folders; nothing is written if it has other members or is too large.

    Raises:
        ValueError: If it would unpack to more than 20 times its size.
        zipfile.BadZipFile: If it is damaged.
        tarfile.TarError: If it is damaged, or a member lies outside the folder or is no file or folder.
    """
    limit = LARGEST_GROWTH * max(path.stat().st_size, 2**20)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            _check_growth((member.file_size for member in zipped.infolist()), limit)
            zipped.extractall(folder)  # takes '/' and '..' out of names by itself
        return
    with tarfile.open(path) as tar:
        _check_growth((member.size for member in tar), limit)
        for member in tar:
            # Links can lead out of the folder past tarfile's own filter (CVE-2025-4517).
            if not (member.isfile() or member.isdir()):
                raise tarfile.TarError(f"its member {member.name!r} is neither a file nor a folder")
            tarfile.data_filter(member, str(folder))
        tar.extractall(folder, filter="data")


def _check_growth(sizes: Iterable[int], limit: int) -> None:
    total = 0
    for size in sizes:  # stops before an archive without an end is read to it
        total += size
        if total > limit:
            raise ValueError(f"it unpacks to more than {limit} bytes, {LARGEST_GROWTH} times its size")
