"""Trained networks by name, verified by hash, with their preprocessing."""

from fnmatch import fnmatch
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from lightning_msnn.models.registry import entry_cfg
from lightning_msnn.models.weights import entries, find, read_config
from lightning_msnn.nn.folding import fold_batch_norm

__all__ = ["fixed_images", "info", "list_models", "load", "transforms"]


def list_models(filter: str = "*", pretrained: bool = True) -> list[str]:
    """List the networks of the zoo.

    Args:
        filter: Pattern of shell wildcards that a name must match.
        pretrained: List the entries with weights; else every registered architecture too.
    """
    names = list(entries())
    if not pretrained:
        names += timm.list_models("msnn*")
    return sorted(name for name in names if fnmatch(name, filter) or fnmatch(name.replace(".", "_"), filter))


def info(name: str) -> dict[str, Any]:
    """Return the ``config.json`` of an entry: its network, recipe and measured figures.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return read_config(find(name))


def _cfg(name: str) -> PretrainedCfg:
    """Return timm's configuration of an entry, also of one that came after the package was imported."""
    folder = find(name)
    architecture, _, tag = folder.name.partition(".")
    return PretrainedCfg(**entry_cfg(folder), architecture=architecture, tag=tag)


def load(
    name: str,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    device: str | torch.device | None = None,
    fuse: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load a network of the zoo in eval mode.

    Args:
        name: Name of the entry, in either spelling.
        pretrained: Whether to load its weights, whose sha256 is checked.
        num_classes: Classes of a new read-out; by default the entry's own, with its weights.
        in_chans: Channels of the images; by default the entry's own. The stem is adapted as timm adapts its own.
        device: Device to move the network to.
        fuse: Fold batch norm into synapses and thresholds: the same outputs, faster, for inference only.
        **kwargs: Further arguments of the network.

    Raises:
        ConfigurationError: If there is no such entry, its files are not what they should be, or an argument is not
            allowed.
    """
    cfg = _cfg(name)
    model: nn.Module = timm.create_model(
        cfg.architecture, pretrained, pretrained_cfg=cfg, num_classes=num_classes, in_chans=in_chans, **kwargs
    )
    model.eval()
    return (fold_batch_norm(model) if fuse else model).to(device)


def transforms(name: str) -> Any:
    """Return the preprocessing of an entry, a function from a PIL image to the network's input ``(C, H, W)``.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return create_transform(**resolve_data_config(_cfg(name).to_dict()))


def fixed_images(config: dict[str, Any]) -> Tensor:
    """Return two images that are the same everywhere, to compare logits with those of a card.

    Args:
        config: ``config.json`` of the entry.

    Returns:
        Images ``(2, C, H, W)``, normalised as the entry's data.
    """
    channels, height, width = config["input_size"]
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(size) for size in (2, channels, height, width)), indexing="ij"
    )
    pixels = (row * (7 + 4 * image) + column * 13 + channel * 29) % 256
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std
