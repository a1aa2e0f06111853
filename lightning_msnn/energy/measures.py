"""What a network did, and what follows from it: spike rate, synaptic operations, energy, silent and saturated neurons.

A :class:`Record` holds sums only, so the records of parts add up to the record of the whole, as
:mod:`lightning_msnn.metrics` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_msnn.energy.profiles import COLUMN, DEFAULT_PROFILE, FIELDS, PROFILES, Profile, energy_by_kind
from lightning_msnn.errors import choose

__all__ = [
    "Record",
    "check_by",
    "energy",
    "mean_level",
    "saturated_neurons",
    "silent_neurons",
    "spike_rate",
    "synaptic_operations",
]

_OTHER = ("neurons", "additions", "multiplications", "membrane_updates", "omega_operations")
_PARTS = 20  # rows that a table or picture can have and still be read


@dataclass
class Record:
    """What a network did for some samples; ``print(record)`` writes a table.

    Args:
        layers: Names of all modules, the network's own is ``""``.
        counts: Sums over samples, int64 ``(len(layers), len(FIELDS))``.
        samples: Number of samples.
        parameters: Parameters of each layer without those of its children, int64 ``(len(layers),)``.
        uncounted: Calls of each operation that could not be counted, by ``layer: operation``.
        fired: For each layer of neurons, how often each neuron fired, int64, the shape of one sample. A layer that met
            maps of further shapes is there once more for each, with the shape in its name.
        visits: For each layer of neurons, how often each neuron could have fired: samples, times windows where a
            neuron fires in each of them, times time steps.
    """

    layers: tuple[str, ...]
    counts: Tensor
    samples: int
    parameters: Tensor
    uncounted: dict[str, int] = field(default_factory=dict)
    fired: dict[str, Tensor] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)

    def total(self, name: str) -> int:
        """Sum over all layers of a field, one of :data:`lightning_msnn.energy.profiles.FIELDS`."""
        return int(self.counts[:, choose(COLUMN, name, "field")].sum())

    def layer(self, layer: str) -> dict[str, int]:
        """Return all fields of a layer by name."""
        return dict(zip(FIELDS, self.counts[self.layers.index(layer)].tolist(), strict=True))

    def __str__(self) -> str:
        """Return a table of operations and energy by part, for one sample."""
        n, prices = max(1, self.samples), PROFILES[DEFAULT_PROFILE].prices
        joules = torch.stack([*energy_by_kind(self.counts, self.parameters).values()]).sum(0) / n
        rows = [("part", "operations", "spike rate", "energy (µJ)", "ReLU baseline")]
        busy = {name: i for i, name in enumerate(self.layers) if bool(self.counts[i].any())}
        for part, names in [*parts_of(busy).items(), ("all", list(busy))]:
            chosen = [busy[name] for name in names]
            c = {name: count / n for name, count in zip(FIELDS, self.counts[chosen].sum(0).tolist(), strict=True)}
            done = {"AC": c["accumulates"], "graded products": c["graded_products"], "MAC": c["multiply_accumulates"]}
            done["other"] = sum(c[x] for x in _OTHER)
            own = float(joules[chosen].sum())
            relu = c["dense"] * prices["multiply_accumulates"] + sum(c[x] * prices[x] for x in _OTHER[:3])
            rows.append((
                part or "(network)",
                ", ".join(f"{short(value)} {what}" for what, value in done.items() if value),
                percent(c["spikes"] / c["neurons"] if c["neurons"] else None),
                f"{1e6 * own:.3g}",
                f"{1e-12 * relu / own:.3g} times" if c["accumulates"] else "",
            ))  # fmt: skip
        notes = [
            f"For one sample, the mean of {self.samples}. Arithmetic alone, priced by {DEFAULT_PROFILE}.",
            "ReLU baseline: each synaptic operation a MAC, in all windows and time steps, zeros not skipped.",
            *(f"Could not be counted: {name} ({calls} calls)" for name, calls in self.uncounted.items()),
        ]
        return "\n".join([aligned(rows), *notes])


def parts_of(layers: Iterable[str]) -> dict[str, list[str]]:
    """Put layers together under their parents, at the finest level that leaves a readable number of parts."""
    names = list(layers)
    for depth in range(max((name.count(".") + 1 for name in names), default=1), 0, -1):
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(parts) <= _PARTS:
            break
    return parts


def short(value: float) -> str:
    """Return a number of operations with three digits: ``18.2 M``."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in percent, a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of equal width, with a line below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def check_by(by: str | None, allowed: Sequence[str]) -> str | None:
    """Return by what a measure is divided; raise a ConfigurationError if it is not None or one of ``allowed``."""
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
    return _by_neuron(record, by, "spikes")


def mean_level(record: Record, by: str | None = None) -> Any:
    """Mean level of spikes over all neurons, in [0, levels]: :func:`spike_rate`, each spike weighted by its level."""
    return _by_neuron(record, by, "spikes", "further_levels")


def _by_neuron(record: Record, by: str | None, *names: str) -> Any:
    """The sum of fields, divided by the number of neurons."""
    check_by(by, ("layer",))
    neurons = record.counts[:, COLUMN["neurons"]].double()
    spikes = record.counts[:, [COLUMN[name] for name in names]].sum(1).double()
    if by is None:
        return spikes.sum() / neurons.sum()
    each = zip(record.layers, neurons, spikes / neurons, strict=True)
    return {layer: rate for layer, there, rate in each if bool(there > 0)}


def synaptic_operations(record: Record) -> dict[str, Tensor]:
    """Synaptic operations of one sample of a record.

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
    kinds = energy_by_kind(record.counts, record.parameters, profile, skip_zeros)
    if by == "kind":
        return {kind: value.sum() / record.samples for kind, value in kinds.items()}
    each = torch.stack(list(kinds.values())).sum(0) / record.samples
    return each.sum() if by is None else {n: e for n, e in zip(record.layers, each, strict=True) if bool(e > 0)}


def silent_neurons(record: Record) -> Tensor:
    """Share of the neurons in a record that never fired, in [0, 1], float64, NaN without neurons."""
    return _share([fired == 0 for fired in record.fired.values()])


def saturated_neurons(record: Record) -> Tensor:
    """Share of the neurons in a record that fired whenever they could, in [0, 1], float64, NaN without neurons."""
    return _share([fired == record.visits[layer] for layer, fired in record.fired.items()])


def _share(layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.bool), *(these.flatten() for these in layers)]).double().mean()
