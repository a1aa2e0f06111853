"""Converted networks in timm's registry: ``spiking``, made of any other network there.

>>> timm.create_model("spiking", source="resnet18", num_classes=10, layers=["layer1.0.conv2"])

It is the source's own class with other layers, so that what timm asks of a network holds for it as for the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from lightning_msnn.conversion.converting import make_layers_spiking
from lightning_msnn.conversion.tracing import trace
from lightning_msnn.errors import ConfigurationError, brief, check_integer, suggestion
from lightning_msnn.models.registry import BUILDER, build, make_network, own_class, zoo_cfgs

__all__ = ["adopt", "image_shape", "spiking"]

default_cfgs = generate_default_cfgs(zoo_cfgs("spiking"))

own_arguments = ("source", "source_kwargs", "layers", "levels", "image_size", "img_size", "global_pool")
"""Arguments that a file may give, timm's too: see :func:`lightning_msnn.models.registry.own_arguments`."""

_OF_ALL = ("num_classes", "in_chans", "global_pool")


def image_shape(model: nn.Module, size: int | Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return the shape ``(C, H, W)`` of the images that a network of timm's is traced with.

    Args:
        model: The network.
        size: Side of the images in pixels, or height and width; by default those of the network's own configuration.
    """
    channels, *sides = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        sides = list(size) if isinstance(size, list | tuple) and len(size) == 2 else [size, size]
    elif fixed:
        sides = list(fixed)
    height, width = (check_integer("image_size", side, 1) for side in sides)
    return getattr(model, "in_chans", channels), height, width


def adopt(
    model: nn.Module, source: str, source_kwargs: Mapping[str, Any], layers: Iterable[str], levels: int = 1
) -> nn.Module:
    """Make a network's layers spiking, in place, and give it ``architecture`` and ``arguments`` to be built again.

    Args:
        model: The network.
        source: Its name in timm's registry.
        source_kwargs: Its arguments beside ``num_classes`` and ``in_chans``.
        layers: Names of the layers that receive spikes.
        levels: Levels of the spikes.
    """
    make_layers_spiking(model, layers, levels)
    model.architecture = "spiking"  # type: ignore[assignment]
    made: Any = {"source": source, "source_kwargs": dict(source_kwargs), "layers": list(layers), "levels": levels}
    model.arguments = made
    model._model_args = dict(made)  # type: ignore[assignment]  # which timm writes into a config.json, as this:
    if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict):
        cfg["architecture"] = "spiking"
    return model


def _build(
    source: str = "",
    source_kwargs: Mapping[str, Any] | None = None,
    layers: Any = None,
    image_size: int | None = None,
    levels: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """Build the source without weights and convert it; see :func:`spiking`."""
    shared = {name: kwargs.pop(name) for name in _OF_ALL if name in kwargs}
    given = kwargs | dict(source_kwargs or {})  # what builds the source is kept with it
    if not isinstance(source, str) or source == "spiking" or not (timm.is_model(source) or own_class(source)):
        hint = suggestion(str(source), timm.list_models())
        raise ConfigurationError(
            f"unknown source {source!r} of a spiking network: allowed is any of timm.list_models(){hint}"
        )
    if refused := ", ".join(sorted(BUILDER & given.keys())):
        raise ConfigurationError(f"source_kwargs must not have {refused}: allowed are arguments of the network itself")
    try:
        model = make_network(source, **{**shared, **given})
    except TypeError as error:  # of an argument that it does not have
        raise ConfigurationError(f"{source} cannot be built with {sorted(given)}: {brief(error)}") from error
    if not isinstance(layers, list | tuple | None):
        raise ConfigurationError(f"layers must be a list of names of layers, not {layers!r}")
    if layers is None:
        plan = trace(model, torch.empty(1, *image_shape(model, image_size), device="meta"))
        layers = [row.layer for row in plan.spiking]
    if shared.get("num_classes") == 0:  # and no classifier, which receives spikes in some
        modules = dict(model.named_modules())
        layers = [name for name in layers if not isinstance(modules.get(name), nn.Identity)]
    adopt(model, source, given, layers, levels)
    named = {name: getattr(model, name) for name in ("num_classes", "in_chans") if hasattr(model, name)}
    model.arguments |= shared | named  # type: ignore[operator]
    return model


@register_model  # type: ignore[untyped-decorator]
def spiking(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network of timm's whose layers behind rectifiers receive spikes.

    Args:
        pretrained: Whether to load the weights of a zoo entry, which says how the network was built too. Without one,
            the neurons are not fitted: see :func:`lightning_msnn.conversion.calibrate`.
        **kwargs: ``source``, its name in the registry; ``source_kwargs``, its arguments; ``layers``, names of those
            that receive spikes, or ``image_size``, with which they are found as :func:`lightning_msnn.convert` finds
            them; ``levels`` of the spikes; and what every network of timm's takes.

    Raises:
        ConfigurationError: If an argument is not allowed, or there are no weights.
    """
    if pretrained and not kwargs.get("pretrained_cfg"):
        raise ConfigurationError("no weights for spiking: name a zoo entry, or convert a network that is trained")
    own, features = {*own_arguments, "num_classes", "in_chans"}, {"feature_cls": "getter", "out_indices": None}
    model, given = build(_build, "spiking", pretrained, own, kwargs, {}, feature_cfg=features)
    if theirs := timm.get_pretrained_cfg(given["source"]):
        trained = {"file", "hf_hub_id"} & model.pretrained_cfg.keys()  # type: ignore[union-attr, operator]
        images = () if trained else ("input_size", "pool_size", "mean", "std", "crop_pct", "interpolation")
        shared = {name: getattr(theirs, name) for name in ("first_conv", "classifier", *images)}
        model.pretrained_cfg |= shared  # type: ignore[operator]
    named = {name: value for name, value in given.items() if name in own}
    model._model_args = {**named, **getattr(model, "arguments", {})}  # type: ignore[assignment]  # for timm
    return model
