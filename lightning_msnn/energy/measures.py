"""What a record says: spike rate, synaptic operations, energy, silent and saturated neurons.

Functions of a :class:`~lightning_msnn.energy.Record`, which :func:`~lightning_msnn.energy.count_operations` returns;
:mod:`lightning_msnn.metrics` has a torchmetrics class for each, which adds up records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.energy.counting import Record
from lightning_msnn.energy.profiles import (
    DEFAULT_PROFILE,
    Profile,
    _share_compute,
    _spike_rate_compute,
    _synaptic_operations_compute,
    energy_by_kind,
)
from lightning_msnn.errors import choose

__all__ = ["energy", "saturated_neurons", "silent_neurons", "spike_rate", "synaptic_operations"]


def _by_layer(layers: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """Name the values that are numbers and not zero throughout."""
    return {name: value for name, value in zip(layers, values, strict=True) if not bool(value.isnan())}


def _rates(layers: Sequence[str], counts: Tensor, by: str | None) -> Any:
    overall, each = _spike_rate_compute(counts)
    return overall if by is None else _by_layer(layers, each)


def _joules(
    layers: Sequence[str],
    counts: Tensor,
    samples: Tensor,
    parameters: Tensor,
    on: str | Profile,
    skip_zeros: bool,
    by: str | None,
) -> Any:
    kinds = energy_by_kind(counts, float(samples), parameters, on, skip_zeros)
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
        :mod:`lightning_msnn.energy.profiles` defines them.
    """
    return _synaptic_operations_compute(record.counts, torch.tensor(record.samples))


def energy(
    record: Record,
    profile: str | Profile = DEFAULT_PROFILE,
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
    return _share_compute(*_flat(record), saturated=False)


def saturated_neurons(record: Record) -> Tensor:
    """Share of the neurons that fired whenever they could.

    Args:
        record: What a network did.

    Returns:
        A share in [0, 1], float64, NaN without neurons.
    """
    return _share_compute(*_flat(record), saturated=True)


def _check_by(by: str | None, allowed: Sequence[str]) -> None:
    if by is not None:
        choose(dict.fromkeys(allowed), by, "division of a metric")


def _flat(record: Record) -> tuple[Tensor, Tensor]:
    """How often each neuron of a record fired and could have fired, ``(neurons,)``."""
    fired = [f.flatten().cpu() for f in record.fired.values()]
    visits = [torch.full_like(f, v) for f, v in zip(fired, record.visits.values(), strict=True)]
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *fired]), torch.cat([none, *visits])
