"""Checkpoints: written whole or not at all, and read as plain values only."""

from __future__ import annotations

import errno
import glob
import io
import os
import platform
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import timm
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, UnknownNameError
from lightning_msnn.models.registry import check_arguments, create_with, is_ours, own_arguments

__all__ = [
    "AtomicCheckpointIO",
    "is_checkpoint",
    "network_of",
    "network_state",
    "or_a_warning",
    "read_checkpoint",
    "write_whole",
]


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("hyper_parameters", "datamodule_hyper_parameters", "network_arguments", "preprocessing"), dict),
    **{"cli": dict, "class_names": list},
}
"""What a checkpoint may have beside Lightning's own fields, or leave out: dictionaries by name, and names."""


def _is(value: Any, kind: Any) -> bool:
    """Whether a field of a checkpoint is nothing, or of its type with names in it."""
    return value is None or (isinstance(value, kind) and all(isinstance(name, str) for name in value))


def _colours(value: Any) -> bool:
    numbers = value if isinstance(value, list | tuple) else []
    return bool(numbers) and all(type(v) in (int, float) and abs(v) < 1e30 for v in numbers)


def _sizes(value: Any) -> bool:
    sizes = value if isinstance(value, list | tuple) else [value]
    return bool(sizes) and all(type(size) is int and 0 < size < 2**16 for size in sizes)


_PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "image_size": _sizes,
    "mean": _colours,
    "std": lambda value: _colours(value) and 0 not in value,
}
"""What the fields of a preprocessing are, where they are there."""


def _write(content: Any, file: IO[bytes]) -> None:
    if isinstance(content, bytes):
        file.write(content)
    else:
        torch.save(content, file)


@contextmanager
def _of_the_system() -> Iterator[None]:
    """Raise what goes wrong with a service as an OSError: each has errors of its own."""
    try:
        yield
    except (OSError, ConfigurationError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _put(content: Any, url: str) -> None:
    """Hand an object to a service; what is wrong with the object or the URL is no fault of the service."""
    with _of_the_system():
        try:
            files, path = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"nothing can be written to {url!r}: {error}") from error
    if isinstance(files, LocalFileSystem):
        return write_whole(content, path)
    buffer = io.BytesIO()
    _write(content, buffer)
    with _of_the_system():
        files.makedirs(os.path.dirname(path), exist_ok=True)
        with files.transaction:  # what a service has to keep an older object until then
            files.pipe_file(path, buffer.getvalue())


def write_whole(content: Any, path: str | Path) -> None:
    """Save bytes, or plain values and tensors, so that the file is there whole or not at all, whatever happens.

    The bytes go to a hidden file of this process in the same folder, are flushed to the disk, and only then get the
    final name, which replaces an older file in one step. What processes that were killed left there is removed.

    Args:
        content: Bytes, which are the file; or what ``torch.save`` can write and ``torch.load(weights_only=True)`` read.
        path: The file, or any URL that fsspec knows, whose service decides how safe it is.

    Raises:
        OSError: If the folder cannot be written or is full, and an older file of that name is as it was; or for
            whatever a service raises.
        ConfigurationError: If a URL is of no kind that fsspec knows here.
    """
    if "://" in str(path):
        return _put(content, str(path))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            _write(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch hides a full disk behind an error of its own
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power cut could undo the new name
    finally:
        os.close(folder)
    for other in path.parent.glob(f".*.{glob.escape(platform.node())}.*.partial"):
        try:
            os.kill(int(other.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (PermissionError, ValueError):  # another user's process, and a name that is not ours
            continue


@contextmanager
def or_a_warning(what: str, errors: type[Exception] = OSError, so: str = "", done: str = "written") -> Iterator[None]:
    """Warn of a full disk or a service that is down: it is no reason to lose a training, or the test that follows."""
    try:
        yield
    except errors as error:
        name = type(error).__name__
        reason = (error.strerror or str(error) or name) if isinstance(error, OSError) else f"{name}: {error}"
        rank_zero_warn(f"{what} cannot be {done} ({reason}){so}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU; plain values only, so that no code in it can run.

    Of a network it may give arguments of the network's own, and not what is fetched from where: ``pretrained`` is
    false among the hyper-parameters that are returned, for the weights are in the checkpoint.

    Args:
        path: File that ``lightning-msnn fit`` or a Trainer has written.

    Returns:
        Its content.

    Raises:
        ConfigurationError: If there is no such file, it is not a Lightning checkpoint, gives other arguments, or has
            weights of a network that are not finite.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"no checkpoint at {str(path)!r}: give the path of a .ckpt file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            # torch compresses nothing. An archive that unpacks to more than it is was made to fill the memory.
            if unpacked > os.path.getsize(path):
                raise ValueError(f"it would unpack to {unpacked} bytes, more than the file has")
            # torch writes checksums but does not compare them.
            if damaged := archive.testzip():
                raise ValueError(f"{damaged!r} in it is not what was written: the disk or a copy has changed it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make torch raise, the file is not a checkpoint
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise ConfigurationError(
            f"{str(path)!r} is not a checkpoint: torch cannot read it as plain values ({reason})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigurationError(f"{str(path)!r} is not a checkpoint of Lightning: it has no 'state_dict'")
    for field, kind in _FIELDS.items():
        if not _is(content.get(field, kind()), kind):
            raise ConfigurationError(
                f"{str(path)!r} is not a checkpoint of this package: its {field} is of another type"
            )
    for field, good in _PREPROCESSING.items():
        if field in (seen := content.get("preprocessing") or {}) and not good(seen[field]):
            raise ConfigurationError(f"{str(path)!r} is refused: its preprocessing has {field} {seen[field]!r}")
    hparams = content.get("hyper_parameters")
    if isinstance(hparams, dict):
        name, given = hparams.get("network"), hparams.get("network_kwargs")
        if isinstance(name, str) and timm.is_model(name) and isinstance(given, dict):
            check_arguments(given, own_arguments(name), repr(str(path)))
            network_state(content)
        if "pretrained" in hparams:
            hparams["pretrained"] = False
    return content


def is_checkpoint(source: str) -> bool:
    """Whether a name is that of a checkpoint's file, not of a network."""
    return Path(source).suffix == ".ckpt"


def _plain(content: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a dictionary in a checkpoint, empty if there is none."""
    value = content.get(field)
    return {key: v for key, v in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}


def network_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the network in a checkpoint, by their names in the network.

    They are those that the checkpoint evaluates with: the moving average where there is one.

    Args:
        content: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`, as read.

    Raises:
        ConfigurationError: If one is no tensor, says to be larger than what there is of it, or is not finite.
    """
    prefix, state = "network.", {}
    for name, value in content["state_dict"].items():
        if isinstance(name, str) and name.startswith(prefix):
            whole = isinstance(value, Tensor) and value.layout is torch.strided
            if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ConfigurationError(f"{name} of a checkpoint is no tensor that is stored whole")
            if value.is_floating_point() and not value.float().isfinite().all():
                raise ConfigurationError(f"{name} of a checkpoint has values that are not finite")
            state[name[len(prefix) :]] = value.contiguous()
    return state


def network_of(content: dict[str, Any], path: str | Path, named: str | None = None) -> nn.Module:
    """Make the network of a checkpoint, with its weights and none from elsewhere.

    Args:
        content: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`, as read.
        path: Where it was read, for the message.
        named: Registered name of a network of timm's own that the user expects there; others need not be named.

    Raises:
        ConfigurationError: If it is of another task, is of a network that is neither registered by this package or the
            user's code nor named, gives arguments that are not of the network's own, or its weights do not fit.
    """
    hparams, made = _plain(content, "hyper_parameters"), _plain(content, "network_arguments")
    name = hparams.get("network")
    if not isinstance(name, str) or not timm.is_model(name) or not (is_ours(name) or name == named):
        raise UnknownNameError(
            f"{str(path)!r} is of network {name!r}, which is refused: allowed are "
            f"{', '.join(timm.list_models('msnn*'))} and one that is named beside it",
            "" if timm.is_model(str(name)) else "network",
            str(name),
        )
    given = _plain(hparams, "network_kwargs") | {k: hparams[k] for k in ("num_classes", "in_chans") if k in hparams}
    if hparams.get("img_size") is not None and timm.get_pretrained_cfg(name.partition(".")[0]).fixed_input_size:
        given.setdefault("img_size", hparams["img_size"])
    state = network_state(content)
    check_arguments(made or given, own_arguments(name), repr(str(path)), state)
    # The arguments of an entry that it was started from are among those with which the network was made.
    name = name.partition(".")[0] if made else name
    try:
        return create_with(name, made or given, state)
    except Exception as error:  # whatever the values in a file make torch raise
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"{str(path)!r} is of network {name!r}, which cannot be made of it: {reason}"
        ) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, safe against interruptions, full disks and code in strangers' files.

    A checkpoint that cannot be written costs a warning, not the training; whatever an earlier one wrote then stays,
    even where a callback asks for its removal. Checkpoints are read as plain values only.
    """

    def __init__(self) -> None:
        self._failed = self._written = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all.

        Args:
            checkpoint: What to save.
            path: File to write, or any URL that fsspec knows.
            storage_options: Not allowed, as for :class:`~lightning.fabric.plugins.TorchCheckpointIO`.

        Raises:
            TypeError: If storage options are given.
            ConfigurationError: If a URL is of no kind that fsspec knows here.
        """
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        self._failed = True
        so = ", and the checkpoints written before are kept" if self._written else ", and there is none yet"
        with or_a_warning(f"the checkpoint {str(path)!r}", so=f": training goes on{so}"):
            write_whole(checkpoint, path)
            self._failed, self._written = False, True

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as :func:`read_checkpoint` does, on the CPU; of a URL, which Lightning reads, plain values.

        Raises:
            ConfigurationError: If it is not a checkpoint.
        """
        url = "://" in str(path)
        content: dict[str, Any] = super().load_checkpoint(path, weights_only=True) if url else read_checkpoint(path)
        self._written = True
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless the one that was to take its place could not be written."""
        if not self._failed and Path(path).suffix == ".ckpt" and ".." not in Path(path).parts:
            with or_a_warning(f"the checkpoint {str(path)!r}", Exception, done="removed"):
                super().remove_checkpoint(path)
