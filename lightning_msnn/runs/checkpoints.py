"""Checkpoints, read as plain values only, and files that are written whole or not at all."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, UnknownNameError, brief
from lightning_msnn.models.registry import check_arguments, is_ours, make_network, own_arguments, own_class

__all__ = ["AtomicCheckpointIO", "is_checkpoint", "network_of", "network_state", "read_checkpoint", "write_whole"]


def write_whole(content: Any, path: str | Path) -> None:
    """Write a file that is there whole or not at all, whatever happens.

    Args:
        content: Bytes, or what ``torch.save`` can write.
        path: The file, or any URL that fsspec knows.

    Raises:
        ConfigurationError: If it cannot be written there.
    """
    if not isinstance(content, bytes):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    files, name = url_to_fs(str(path))
    files.makedirs(os.path.dirname(name), exist_ok=True)
    if isinstance(files, LocalFileSystem):
        target = Path(name)
        if target.exists() and not target.is_file():
            raise ConfigurationError(f"{name!r} is no file, so that it is not replaced: give the path of a file")
        partial = target.with_name(f".{target.name}.partial")  # in the same folder, which makes the last step one
        try:
            partial.write_bytes(content)
            partial.replace(target)
        except OSError as error:
            with suppress(OSError):  # of a folder that cannot be written at all
                partial.unlink()
            raise ConfigurationError(f"cannot write {name!r}: {error.strerror}") from error
    else:
        with files.transaction, files.open(name, "wb") as file:
            file.write(content)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, which a kill at any moment leaves whole.

    Lightning's own are written in the folder for temporary files and then moved. Where that is another file system, the
    move is a copy, and a kill leaves half of it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all, to a file or any URL that fsspec knows."""
        write_whole(checkpoint, path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU; plain values only, so that no code in it can run.

    It may give a network only the network's own arguments. ``pretrained`` is false in the hyper-parameters that are
    returned, since the weights are in the checkpoint.

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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make torch raise, the file is not a checkpoint
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise ConfigurationError(
            f"{str(path)!r} is not a checkpoint: torch cannot read it as plain values ({reason})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigurationError(f"{str(path)!r} is not a checkpoint of Lightning: it has no 'state_dict'")
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
    """Whether a name is the path of a checkpoint, not the name of a network."""
    return Path(source).suffix == ".ckpt"


def network_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the network in a checkpoint, by their names in the network.

    Where the weights have a moving average, it is the average.

    Args:
        content: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`, as read.

    Raises:
        ConfigurationError: If one is not finite.
    """
    prefix, state = "network.", {}
    for name, value in content["state_dict"].items():
        if name.startswith(prefix):
            if value.is_floating_point() and not value.float().isfinite().all():
                raise ConfigurationError(f"{name} of a checkpoint has values that are not finite")
            state[name.removeprefix(prefix)] = value.contiguous()
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
    hparams, made = content.get("hyper_parameters") or {}, content.get("network_arguments") or {}
    name = str(hparams.get("network"))
    own = not timm.is_model(name) and own_class(name) is not None
    if not own and not (timm.is_model(name) and (is_ours(name) or name == named)):
        raise UnknownNameError(
            f"{str(path)!r} is of network {name!r}, which is refused: allowed are "
            f"{', '.join(timm.list_models('msnn*'))}, one that is named beside it and your own classes once imported",
            "" if timm.is_model(name) else "network",
            name,
        )
    given = dict(hparams.get("network_kwargs") or {})
    given |= {key: hparams[key] for key in ("num_classes", "in_chans") if key in hparams}
    state = network_state(content)
    if not own:
        check_arguments(made or given, own_arguments(name), repr(str(path)))
    # Of checkpoints of earlier versions: arguments of an entry that it was started from are among those it was made of.
    name = name.partition(".")[0] if made else name
    try:
        network = make_network(name, **(made or given))
        network.load_state_dict(state)
    except Exception as error:  # whatever the values in a file make torch raise
        raise ConfigurationError(
            f"{str(path)!r} is of network {name!r}, which cannot be made of it: {brief(error)}"
        ) from error
    return network
