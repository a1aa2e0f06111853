"""Spike rate, synaptic operations, energy, silent and saturated neurons: torchmetrics classes and functions.

The functions take a :class:`lightning_msnn.metrics.Record`, which :func:`lightning_msnn.metrics.count_operations`
returns; the classes add up records. Their states are sums of integers alone, so that they are exact under any batch
split and any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.functional import energy as F
from lightning_msnn.metrics.counting import Record, layer_names

__all__ = [
    "Energy",
    "SaturatedNeurons",
    "SilentNeurons",
    "SpikeRate",
    "SynapticOperations",
    "energy",
    "saturated_neurons",
    "silent_neurons",
    "spike_rate",
    "synaptic_operations",
]


def _by_layer(layers: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """Name the values that are numbers and not zero throughout."""
    return {name: value for name, value in zip(layers, values, strict=True) if not bool(value.isnan())}


def _rates(layers: Sequence[str], counts: Tensor, by: str | None) -> Any:
    overall, each = F._spike_rate_compute(counts)
    return overall if by is None else _by_layer(layers, each)


def _joules(
    layers: Sequence[str],
    counts: Tensor,
    samples: Tensor,
    parameters: Tensor,
    on: str | F.Profile,
    skip_zeros: bool,
    by: str | None,
) -> Any:
    kinds = F.energy_by_kind(counts, float(samples), parameters, on, skip_zeros)
    if by == "kind":
        return {kind: value.sum() / samples for kind, value in kinds.items()}
    each = torch.stack(list(kinds.values())).sum(0) / samples
    return each.sum() if by is None else {n: e for n, e in _by_layer(layers, each).items() if bool(e > 0)}


def spike_rate(record: Record, by: str | None = None) -> Any:
    """Share of the neurons that fired.

    Args:
        record: What a network did.
        by: None for all layers as one, ``"layer"`` for each.

    Returns:
        A rate in [0, 1], float64, NaN without neurons; or rates by the name of the layer.

    Raises:
        ConfigurationError: If ``by`` is something else.
    """
    _check_by(by, ("layer",))
    return _rates(record.layers, record.counts, by)


def synaptic_operations(record: Record) -> dict[str, Tensor]:
    """Synaptic operations of one sample.

    Args:
        record: What a network did.

    Returns:
        ``dense``, ``accumulates``, ``multiply_accumulates`` and ``effective_multiply_accumulates``, float64, as
        :mod:`lightning_msnn.functional.energy` defines them.
    """
    return F._synaptic_operations_compute(record.counts, torch.tensor(record.samples))


def energy(
    record: Record,
    profile: str | F.Profile = F.DEFAULT_PROFILE,
    skip_zeros: bool = False,
    by: str | None = None,
) -> Any:
    """Energy of one sample in joules.

    Args:
        record: What a network did.
        profile: Name of an energy profile, a YAML file of one, or a profile.
        skip_zeros: Whether multiply-accumulates whose value is zero cost nothing.
        by: None for the whole, ``"layer"`` or ``"kind"`` for its parts.

    Returns:
        Joules, float64; or joules by the name of the layer or kind.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """
    _check_by(by, ("layer", "kind"))
    samples = torch.tensor(record.samples)
    return _joules(record.layers, record.counts, samples, record.parameters, profile, skip_zeros, by)


def silent_neurons(record: Record) -> Tensor:
    """Share of the neurons that never fired.

    Args:
        record: What a network did.

    Returns:
        A share in [0, 1], float64, NaN without neurons.
    """
    return F._share_compute(*_flat(record), saturated=False)


def saturated_neurons(record: Record) -> Tensor:
    """Share of the neurons that fired whenever they could.

    Args:
        record: What a network did.

    Returns:
        A share in [0, 1], float64, NaN without neurons.
    """
    return F._share_compute(*_flat(record), saturated=True)


def _check_by(by: str | None, allowed: Sequence[str]) -> None:
    if by is not None:
        choose(dict.fromkeys(allowed), by, "division of a metric")


def _flat(record: Record) -> tuple[Tensor, Tensor]:
    """How often each neuron of a record fired and could have fired, ``(neurons,)``."""
    fired = [f.flatten().cpu() for f in record.fired.values()]
    visits = [torch.full_like(f, v) for f, v in zip(fired, record.visits.values(), strict=True)]
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *fired]), torch.cat([none, *visits])


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
        zeros = torch.zeros(len(self.layers), len(F.FIELDS), dtype=torch.int64)
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
        self.counts, self.samples = F._update(self.counts, self.samples, record.counts, record.samples)


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
        return F._synaptic_operations_compute(self.counts, self.samples)


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
        profile: str | F.Profile = F.DEFAULT_PROFILE,
        skip_zeros: bool = False,
        by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        _check_by(by, ("layer", "kind"))
        self.profile = F.profile(profile)
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
        self.fired, self.visits = F._neurons_update(self.fired, self.visits, *_flat(record))

    def compute(self) -> Tensor:
        """Return the share, float64."""
        return F._share_compute(self.fired, self.visits, self.saturated)


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
