"""How the families are registered with timm: configurations, zoo entries and the builder."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._registry import get_arch_pretrained_cfgs
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose, suggestion
from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.weights import NUMBERS, WEIGHTS_FILE, entries, read_config, read_weights

__all__ = ["MIN_SIZE", "PRESETS", "create", "default_cfg", "entry_cfg", "zoo_cfgs"]

MIN_SIZE = 8
"""Smallest side of an input image in pixels."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "context": "isolated",
        "windows": "alternate",
        "norm": False,
        "mlp": "gelu",
        "coding": "bernoulli",
        "surrogate": "rectangular",
        "tau": 0.4,
        "learn_tau": False,
        "projection": "sine",
        "theta": 0.25,
    },
}
"""Arguments of a network under one name; any of them can be given beside it. ``paper`` is the network as published
(arXiv 2401.10843): isolated windows, no normalisation, GELU MLP, linear patch merging, Bernoulli coding of each mixer's
input, rectangular surrogate, fixed decay."""


def default_cfg(size: int = 32, num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> dict[str, Any]:
    """Return timm's pretrained configuration of a network.

    Args:
        size: Side of the images that it was made for, in pixels.
        num_classes: Classes of the read-out.
        in_chans: Channels of the images.
        **kwargs: Further fields, or others in place of these.
    """
    return {
        "num_classes": num_classes,
        "input_size": (in_chans, size, size),
        "min_input_size": (in_chans, MIN_SIZE, MIN_SIZE),
        "fixed_input_size": False,
        "pool_size": (math.ceil(size / 16), math.ceil(size / 16)),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5)[:in_chans],
        "std": (0.5, 0.5, 0.5)[:in_chans],
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.10843",
        **kwargs,
    }


def entry_cfg(folder: Path) -> dict[str, Any]:
    """Return timm's pretrained configuration of a zoo entry.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If its ``config.json`` is broken.
    """
    config = read_config(folder)
    channels, height, _ = config["input_size"]
    return default_cfg(
        height,
        config["num_classes"],
        channels,
        file=str(folder / WEIGHTS_FILE),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        label_names=tuple(config["class_names"]),
    )


def zoo_cfgs(*architectures: str) -> dict[str, dict[str, Any]]:
    """Return timm's pretrained configurations of architectures and of their zoo entries, by ``<architecture>.<tag>``.

    Without a tag, an architecture is untrained, with timm's usual 1,000 classes and 3 channels.

    Args:
        *architectures: Registered names.
    """
    cfgs = {name: entry_cfg(f) for name, f in entries().items() if name.partition(".")[0] in architectures}
    # timm makes the first tag with weights the default of its architecture, unless a starred tag comes after it.
    return cfgs | {f"{architecture}.untrained*": default_cfg() for architecture in architectures}


def _builder_arguments() -> set[str]:
    """Names of the arguments that timm's builder takes besides those of the network."""
    names = set(signature(build_model_with_cfg).parameters) - {"kwargs"}
    return names | {"features_only", "feature_cls", "out_indices"}


def _settle_numbers(state: dict[str, Tensor], model: nn.Module, given: Collection[str]) -> dict[str, Tensor]:
    """Let theta and tau that are given beside ``pretrained`` take the place of the entry's.

    Those that are not given are the entry's, also where they begin to be learnt.

    Args:
        state: Weights of the entry, changed in place.
        model: The network, as its arguments have made it.
        given: Names of the arguments that are given.

    Returns:
        The weights.
    """
    for name, mine in model.state_dict().items():
        module, _, last = name.rpartition(".")
        fixed, learnt = NUMBERS.get(module.rpartition(".")[2], ("", ""))
        if last not in (fixed, learnt):
            continue
        if fixed in given:
            state.pop(f"{module}.{learnt if last == fixed else fixed}", None)
            state[name] = mine.clone()
        elif last == learnt and f"{module}.{fixed}" in state:
            state[name] = torch.logit(state.pop(f"{module}.{fixed}")).expand_as(mine).clone()
    return state


def create(
    network: type[nn.Module], variant: str, pretrained: bool, defaults: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a registered network as timm builds its own: weights, feature extraction, overrides.

    Args:
        network: Class of the network.
        variant: Its registered name.
        pretrained: Whether to load the weights of its zoo entry, or of the first one if no tag names it.
        defaults: Arguments of the class by which the variant differs; those of a zoo entry or a caller override them.
        **kwargs: Arguments of the class, or of timm's builder; ``preset`` stands for those of :data:`PRESETS`, which
            other arguments override.

    Raises:
        ConfigurationError: If an argument is not known to either, or there are no weights.
    """
    allowed = (set(signature(MSNN).parameters) | set(signature(network).parameters)) - {"mixer", "kwargs"}
    for name in kwargs.keys() - allowed - _builder_arguments() - {"preset"}:
        raise ConfigurationError(
            f"unknown argument {name!r} of {variant}: allowed are {', '.join(sorted({*allowed, 'preset'}))}"
            f"{suggestion(name, allowed)}"
        )
    kwargs = {**choose(PRESETS, kwargs.pop("preset", "default"), "preset"), **kwargs}
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    try:
        cfg = resolve_pretrained_cfg(variant, given, overlay)
    except RuntimeError as error:  # of a tag that timm does not know
        raise ConfigurationError(
            f"unknown network '{variant}.{given}': pretrained are {', '.join(timm.list_pretrained('msnn*')) or 'none'}"
        ) from error
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        tagged = [name for name, c in get_arch_pretrained_cfgs(variant).items() if c.has_weights]
        if given or not tagged:  # a tag that was asked for is not replaced by another
            raise ConfigurationError(
                f"no weights for {variant}{'.' + cfg.tag if cfg.tag else ''}: "
                f"pretrained are {', '.join(timm.list_pretrained('msnn*')) or 'none'}"
            )
        cfg = get_arch_pretrained_cfgs(variant)[tagged[0]]
    given_numbers = {"theta", "tau"} & kwargs.keys()
    if cfg.file and Path(cfg.file).name == WEIGHTS_FILE:
        # An entry says how its network was made, and its weights are read here, where their hash is checked.
        folder = Path(cfg.file).parent
        kwargs = {**read_config(folder)["network_kwargs"], **kwargs}
        if pretrained:
            cfg = replace(cfg, state_dict=read_weights(folder))
    kwargs = {**(defaults or {}), **kwargs}
    arguments = {name: value for name, value in kwargs.items() if name in allowed}
    try:
        model: nn.Module = build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_cfg=asdict(cfg),
            pretrained_filter_fn=partial(_settle_numbers, given=given_numbers),
            feature_cfg={"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"},
            **kwargs,
        )
    except RuntimeError as error:
        if not (pretrained and "loading state_dict" in str(error)):
            raise
        raise ConfigurationError(f"{cfg.file} does not fit {variant}: {' '.join(str(error).split())}") from error
    if isinstance(model, MSNN):
        model.architecture = variant
        model.arguments = {**arguments, "num_classes": model.num_classes, "in_chans": model.in_chans}
    # Else every copy of the network would carry its weights twice.
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    return model
