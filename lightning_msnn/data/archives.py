"""Download archives, compare them with their hashes, and unpack them into one folder."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from torch.hub import download_url_to_file
from torchvision.datasets.utils import check_integrity

__all__ = ["Archive", "download_and_extract_archive"]


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
        ValueError: If its MD5 sum is another; and what :func:`shutil.unpack_archive` raises.
    """
    path = Path(folder) / os.path.basename(archive.url)
    download_url_to_file(archive.url, str(path), hash_prefix=archive.sha256 or None, progress=False)
    if not check_integrity(str(path), archive.md5):
        raise ValueError(f"its MD5 sum is not {archive.md5}")
    if path.suffix == ".zip":
        shutil.unpack_archive(path, folder)
    else:
        shutil.unpack_archive(path, folder, filter="data")
    path.unlink()
