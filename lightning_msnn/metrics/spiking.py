"""Spike rate, synaptic operations, energy, silent and saturated neurons as torchmetrics classes, which add up records.

Their states are sums of integers alone, so that they are exact under any batch split and any number of processes. The
functions of one record are in :mod:`lightning_msnn.energy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_msnn.energy.counting import Record, layer_names
from lightning_msnn.energy.measures import _check_by, _flat, _joules, _rates
from lightning_msnn.energy.profiles import (
    DEFAULT_PROFILE,
    FIELDS,
    Profile,
    _neurons_update,
    _share_compute,
    _synaptic_operations_compute,
    _update,
)
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.errors import ConfigurationError

__all__ = ["Energy", "SaturatedNeurons", "SilentNeurons", "SpikeRate", "SynapticOperations"]


class _CountMetric(Metric):
    """A metric whose states are the sums of a network's counts and samples.

    Args:
        model: The network whose records it adds up; it is not kept.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor
    samples: Tensor

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = layer_names(model)
        self.parameters_of_layers = torch.tensor([sum(p.numel() for p in m.parameters(False)) for m in model.modules()])
        zeros = torch.zeros(len(self.layers), len(FIELDS), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, record: Record) -> None:
        """Add a record of the network.

        Args:
            record: What the network did.

        Raises:
            ConfigurationError: If the record is of another network.
        """
        if record.layers != self.layers:
            raise ConfigurationError(
                f"the record has {len(record.layers)} layers and is of another network than this metric's, "
                f"which has {len(self.layers)}: give the metric the network that is counted"
            )
        self.counts, self.samples = _update(self.counts, self.samples, record.counts, record.samples)


class SpikeRate(_CountMetric):
    """Share of the neurons that fired, in [0, 1].

    Args:
        model: The network.
        by: None for all layers as one, ``"layer"`` for a dictionary of each.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``by`` is something else.
    """

    higher_is_better = False

    def __init__(self, model: nn.Module, by: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        _check_by(by, ("layer",))
        self.by = by

    def compute(self) -> Any:
        """Return the rate, or rates by layer, float64."""
        return _rates(self.layers, self.counts, self.by)


class SynapticOperations(_CountMetric):
    """Synaptic operations of one sample: dense, accumulates, multiply-accumulates and effective ones.

    Args:
        model: The network.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers by name, float64."""
        return _synaptic_operations_compute(self.counts, self.samples)


class Energy(_CountMetric):
    """Energy of one sample in joules.

    Args:
        model: The network.
        profile: Name of an energy profile, a YAML file of one, or a profile.
        skip_zeros: Whether multiply-accumulates whose value is zero cost nothing.
        by: None for the whole, ``"layer"`` or ``"kind"`` for a dictionary of its parts.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    higher_is_better = False

    def __init__(
        self,
        model: nn.Module,
        profile: str | Profile = DEFAULT_PROFILE,
        skip_zeros: bool = False,
        by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        _check_by(by, ("layer", "kind"))
        self.profile = find_profile(profile)
        self.skip_zeros = skip_zeros
        self.by = by

    def compute(self) -> Any:
        """Return joules, or joules by layer or kind, float64."""
        parameters = self.parameters_of_layers.to(self.counts.device)
        return _joules(self.layers, self.counts, self.samples, parameters, self.profile, self.skip_zeros, self.by)


class _NeuronMetric(Metric):
    """A metric whose states say how often each neuron fired and could have fired.

    Args:
        example: A record of the network for images of the size to come, for the shapes of its layers of neurons.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    saturated = False
    fired: Tensor
    visits: Tensor

    def __init__(self, example: Record, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shapes = _shapes(example.fired)
        neurons = sum(f.numel() for f in example.fired.values())
        for name in ("fired", "visits"):
            self.add_state(name, torch.zeros(neurons, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, record: Record) -> None:
        """Add a record of the network.

        Args:
            record: What the network did.

        Raises:
            ConfigurationError: If its layers of neurons have other shapes than those of the example.
        """
        if _shapes(record.fired) != self.shapes:
            raise ConfigurationError(
                f"the record's layers of neurons {_shapes(record.fired)} are not those of the example {self.shapes}: "
                "neurons are told apart by their place, so count images of one size"
            )
        self.fired, self.visits = _neurons_update(self.fired, self.visits, *_flat(record))

    def compute(self) -> Tensor:
        """Return the share, float64."""
        return _share_compute(self.fired, self.visits, self.saturated)


def _shapes(fired: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(f.shape) for name, f in fired.items()}


class SilentNeurons(_NeuronMetric):
    """Share of the neurons that never fired, in [0, 1].

    Args:
        example: A record of the network for images of the size to come.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """


class SaturatedNeurons(_NeuronMetric):
    """Share of the neurons that fired whenever they could, in [0, 1].

    Args:
        example: A record of the network for images of the size to come.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    saturated = True
