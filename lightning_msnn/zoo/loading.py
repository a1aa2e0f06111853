"""Trained networks by name, verified by hash, with their preprocessing."""

from fnmatch import fnmatch
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_msnn.entries import entries, find, read_config
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.registry import entry_cfg, is_ours, own_arguments
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import to_integers

__all__ = ["fixed_images", "info", "list_models", "load", "transforms"]


def list_models(filter: str = "*") -> list[str]:
    """List the entries of the zoo; ``timm.list_models("msnn*")`` lists architectures.

    Args:
        filter: Pattern of shell wildcards that a name must match.
    """
    return sorted(name for name in entries() if fnmatch(name, filter) or fnmatch(name.replace(".", "_"), filter))


def info(name: str) -> dict[str, Any]:
    """Return what ``config.json`` says of an entry: its network, preprocessing, class names, recipe and figures.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return read_config(find(name))


def load(
    name: str,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    device: str | torch.device | None = None,
    fuse: bool | None = None,
    integer: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load a network of the zoo in eval mode.

    Args:
        name: Name of the entry, in either spelling.
        pretrained: Whether to load its weights, whose sha256 is checked; nothing else is ever loaded.
        num_classes: Classes of a new read-out; by default the entry's own, with its weights.
        in_chans: Channels of the images; by default the entry's own. The stem is adapted as timm adapts its own.
        device: Device to move the network to.
        fuse: Fold batch norm into synapses and thresholds, which is faster, for inference only. Sums are rounded
            otherwise, so that a membrane next to its threshold may fire or not: logits of 2 to 3 % of the images
            change, and hardly ever the class. A gradient to the input is refused. By default only with ``integer``.
        integer: Run the synapses that receive spikes in integers of 8 bits, on CPUs and for inference only: see
            :func:`lightning_msnn.nn.integer.to_integers`. Weights are rounded to 8 bits; their sums are exact.
        **kwargs: Further arguments of the network, or ``features_only`` and ``out_indices`` of timm's.

    Raises:
        ConfigurationError: If there is no such entry, its files are not what they should be, an argument is not
            allowed, or the network does not run in integers.
    """
    if integer and fuse is False:
        raise ConfigurationError("integer folds batch norm, so fuse must not be false beside it: leave it out")
    if integer and device is not None and torch.device(device).type != "cpu":
        raise ConfigurationError(f"integer is for CPUs, so device must be 'cpu', not {str(device)!r}")
    folder = find(name)
    cfg = entry_cfg(folder)
    if not timm.is_model(cfg.architecture) or not is_ours(cfg.architecture):
        raise ConfigurationError(
            f"{folder} is of {cfg.architecture}, which is refused: allowed are {', '.join(timm.list_models('msnn*'))} "
            "and networks of modules that you have imported"
        )
    allowed = own_arguments(cfg.architecture) | {"features_only", "out_indices", "feature_cls"}
    if others := ", ".join(sorted(kwargs.keys() - allowed)):
        raise ConfigurationError(f"{others} is not an argument of {name}: allowed are {', '.join(sorted(allowed))}")
    given = {"num_classes": num_classes, "in_chans": in_chans, **kwargs}
    model: nn.Module = timm.create_model(cfg.architecture, pretrained, pretrained_cfg=cfg, **given).eval()
    if integer:
        return to_integers(model)
    return (fold_batch_norm(model) if fuse else model).to(device)


def transforms(name: str) -> Any:
    """Return the preprocessing of an entry, a function to the network's input ``(C, H, W)``.

    It takes a PIL image, or the path of a wav file where the entry was trained on recordings.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry, or it was trained on neither.
    """
    from lightning_msnn.trained import inputs_of_entry  # which takes Lightning

    return inputs_of_entry(name).transform()


def fixed_images(config: dict[str, Any]) -> Tensor:
    """Return two images that are the same everywhere, to compare logits with those of a card.

    For other data than images, whose values have no bounds, normalised values lie between -2 and 2.

    Args:
        config: What :func:`info` says of the entry.

    Returns:
        Images ``(2, C, H, W)``, normalised as the entry's data.
    """
    channels, height, width = config["input_size"]
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(size) for size in (2, channels, height, width)), indexing="ij"
    )
    pixels = (row * (7 + 4 * image) + column * 13 + channel * 29) % 256
    if "init_args" in config.get("data", {}):
        return pixels / 255 * 4 - 2
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std
