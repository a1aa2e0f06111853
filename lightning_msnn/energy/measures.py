"""What a record says: spike rate, synaptic operations, energy, silent and saturated neurons.

A :class:`~lightning_msnn.energy.Record` holds nothing but sums, so that records of parts add up to that of the whole:
these functions are what is computed of it, and :mod:`lightning_msnn.metrics` adds records up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.energy.counting import Record
from lightning_msnn.energy.profiles import COLUMN, DEFAULT_PROFILE, Profile, energy_by_kind
from lightning_msnn.errors import choose

__all__ = ["check_by", "energy", "saturated_neurons", "silent_neurons", "spike_rate", "synaptic_operations"]


def check_by(by: str | None, allowed: Sequence[str]) -> str | None:
    """Return by what a measure is divided, or raise a ConfigurationError if it is not None or one of ``allowed``."""
    return by if by is None else choose({name: name for name in allowed}, by, "division of a metric")


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
    check_by(by, ("layer",))
    spikes, neurons = (record.counts[:, COLUMN[name]].double() for name in ("spikes", "neurons"))
    if by is None:
        return spikes.sum() / neurons.sum()
    each = zip(record.layers, neurons, spikes / neurons, strict=True)
    return {layer: rate for layer, there, rate in each if bool(there > 0)}


def synaptic_operations(record: Record) -> dict[str, Tensor]:
    """Synaptic operations of one sample.

    Args:
        record: What a network did.

    Returns:
        ``dense``, ``accumulates``, ``multiply_accumulates`` and ``effective_multiply_accumulates``, float64, as
        :mod:`lightning_msnn.energy.profiles` defines them.
    """
    names = ("dense", "accumulates", "multiply_accumulates", "effective_multiply_accumulates")
    return {name: record.counts[:, COLUMN[name]].sum().double() / record.samples for name in names}


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
    check_by(by, ("layer", "kind"))
    samples = record.samples
    kinds = energy_by_kind(record.counts, float(samples), record.parameters, profile, skip_zeros)
    if by == "kind":
        return {kind: value.sum() / samples for kind, value in kinds.items()}
    each = torch.stack(list(kinds.values())).sum(0) / samples
    return each.sum() if by is None else {n: e for n, e in zip(record.layers, each, strict=True) if bool(e > 0)}


def silent_neurons(record: Record) -> Tensor:
    """Share of the neurons that never fired, in [0, 1], float64, NaN without neurons.

    Args:
        record: What a network did.
    """
    return _share([fired == 0 for fired in record.fired.values()])


def saturated_neurons(record: Record) -> Tensor:
    """Share of the neurons that fired whenever they could, in [0, 1], float64, NaN without neurons.

    Args:
        record: What a network did.
    """
    return _share([fired == record.visits[layer] for layer, fired in record.fired.items()])


def _share(layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.bool), *(these.flatten() for these in layers)]).double().mean()
