"""A task whose network is another that was trained, converted: what of it a task has to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_msnn.conversion import (
    RectifierSpike,
    adopt,
    assign_windows,
    calibrate,
    image_shape,
    trace,
)
from lightning_msnn.entries import find, read_config
from lightning_msnn.errors import ConfigurationError, suggestion
from lightning_msnn.runs.checkpoints import is_checkpoint, read_checkpoint
from lightning_msnn.runs.strategies import shards_weights

__all__ = ["check_strategy", "convert_network", "fit_neurons", "without_shape"]

_OPTIONS = ("image_size", "windows", "teacher")


def convert_network(network: nn.Module, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the network of a task, with neurons that are fitted to its first batch.

    Args:
        network: The network with its weights; changed in place.
        hparams: Hyper-parameters of the task; ``convert`` is true, or a dictionary of ``windows`` (as in
            :func:`lightning_msnn.convert`), ``image_size`` (side in pixels of the images that it is traced with; by
            default the network's own) and ``teacher`` (whether the network itself is the teacher where none is
            named; true).

    Returns:
        The hyper-parameters that change: those with which the converted network is built again.

    Raises:
        ConfigurationError: If an option is not allowed, or the network cannot be converted.
    """
    given = hparams["convert"]
    if not isinstance(given, bool | Mapping):
        raise ConfigurationError(f"convert must be true, false or a dictionary of {', '.join(_OPTIONS)}, not {given!r}")
    options = dict(given) if isinstance(given, Mapping) else {}
    for name in options:
        if name not in _OPTIONS:
            hint = suggestion(name, _OPTIONS)
            raise ConfigurationError(f"unknown option {name!r} of convert: allowed are {', '.join(_OPTIONS)}{hint}")
    if not isinstance(options.get("teacher", True), bool):
        raise ConfigurationError(
            f"teacher of convert must be true or false, not {options['teacher']!r}: another network is named by teacher"
        )
    shape = image_shape(network, options.get("image_size", hparams.get("img_size")))
    layers = assign_windows(trace(network, torch.empty(1, *shape, device="meta")), options.get("windows", "single"))
    own = getattr(network, "arguments", None)  # a twin of this package's says how it was built
    source = str(getattr(network, "architecture", hparams["network"].partition(".")[0]))
    arguments = dict(own if isinstance(own, dict) else hparams["network_kwargs"] or {})
    arguments = without_shape(arguments)
    if hasattr(getattr(network, "patch_embed", None), "img_size"):
        arguments.setdefault("img_size", list(shape[1:]))
    adopt(network, source, arguments, layers)
    named = {name: hparams[name] for name in ("num_classes", "in_chans")}
    network.arguments |= named  # type: ignore[operator]
    rank_zero_info("%d layers of %s receive spikes", len(layers), source)
    teacher = hparams["teacher"]
    if teacher is None and options.get("teacher", True):
        teacher = _source_as_teacher(hparams)
    kwargs = {"source": source, "source_kwargs": arguments, "layers": layers}
    changed = {"network": "spiking", "network_kwargs": kwargs, "teacher": teacher}
    return {**changed, "pretrained": False, "twin": None, "convert": False}


def without_shape(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a network less those that a task has of its own, the numbers of classes and channels."""
    return {name: value for name, value in arguments.items() if name not in ("num_classes", "in_chans")}


def _source_as_teacher(hparams: Mapping[str, Any]) -> str | None:
    """Name what a network started from, if that has the same classes and channels."""
    source = hparams["init_from"]
    if source is not None:
        known = read_checkpoint(source)["hyper_parameters"] if is_checkpoint(source) else read_config(find(source))
        classes, channels = known.get("num_classes"), known.get("in_chans", (known.get("input_size") or [None])[0])
        named = str(known.get("network", known.get("architecture"))).partition(".")[0]
        if named != hparams["network"].partition(".")[0]:  # some of its weights
            rank_zero_info("no teacher: what the network started from is another one, %s", named)
            return None
    elif hparams["pretrained"]:
        source = hparams["network"]
        cfg = timm.get_pretrained_cfg(source)
        classes, channels = cfg.num_classes, cfg.input_size[0]
    if source is None or (classes, channels) != (hparams["num_classes"], hparams["in_chans"]):
        rank_zero_info("no teacher: what the network started from has other classes, or it started at random")
        return None
    rank_zero_info("the teacher is %s, the network itself before it was converted", source)
    return f"{hparams['network']}:{source}" if is_checkpoint(source) else str(source)


def check_strategy(strategy: Strategy) -> None:
    """Raise a ConfigurationError for a strategy that shards the weights, with which no neurons can be fitted."""
    if shards_weights(strategy):
        raise ConfigurationError(
            f"convert must be left out with {type(strategy).__name__}, which shards the weights: convert with another "
            "strategy, for one step at least, and go on from its checkpoint"
        )


def fit_neurons(task: pl.LightningModule, network: nn.Module, images: Tensor) -> None:
    """Let the neurons of a converted network begin by the first batch of a training; processes take their mean.

    Args:
        task: The task that is being trained.
        network: The network.
        images: What the network is given for the batch, ``(B, C, H, W)``.
    """
    with task.trainer.precision_plugin.forward_context():
        calibrate(network, images)
    for neuron in (module for module in network.modules() if isinstance(module, RectifierSpike)):
        for value in (neuron.log_threshold, neuron.log_scale):
            value.data.copy_(task.trainer.strategy.reduce(value.data.clone(), reduce_op="mean"))
