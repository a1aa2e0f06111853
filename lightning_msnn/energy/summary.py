"""A network's record as plain values, and several of them side by side as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_msnn.energy.counting import Record
from lightning_msnn.energy.measures import saturated_neurons, silent_neurons, spike_rate
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, Profile, energy_by_kind
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.energy.profiles import unpriced as find_unpriced

__all__ = ["NETWORK", "comparison_rows", "comparison_table", "summarize"]

NETWORK = "network"
"""Name of the column of the network itself; those beside it are its twins."""


def _number(value: Any) -> float | None:
    """A plain number, None where it is NaN."""
    number = float(value)
    return None if number != number else number


def summarize(record: Record, profile: str | Profile = DEFAULT_PROFILE) -> dict[str, Any]:
    """Return all that a record says, by sample, as plain values for a JSON file.

    Args:
        record: What a network did.
        profile: Name of an energy profile, a YAML file of one, or a profile.

    Returns:
        ``samples``, ``parameters``; ``counts`` (by field and sample); ``energy`` (joules by sample: ``total``,
        ``skipping_zeros`` and by kind); ``profiles`` (joules by sample and the operations without a figure, under every
        named profile); ``spike_rate``, ``silent``, ``saturated``; ``layers`` (those that do something: counts, energy
        by kind, spike rate); ``uncounted`` operations.

    Raises:
        ConfigurationError: If there is no such profile.
    """
    hardware, n = find_profile(profile), max(1, record.samples)
    kinds = energy_by_kind(record.counts, n, record.parameters, hardware)
    skipping = energy_by_kind(record.counts, n, record.parameters, hardware, skip_zeros=True)
    rates = spike_rate(record, by="layer")
    layers = {}
    for i, layer in enumerate(record.layers):
        if bool(record.counts[i].any()):
            layers[layer or "(network)"] = {
                "parameters": int(record.parameters[i]),
                "counts": {name: int(v) / n for name, v in zip(FIELDS, record.counts[i], strict=True) if v},
                "energy": {kind: float(v[i]) / n for kind, v in kinds.items() if float(v[i]) > 0},
                "spike_rate": _number(rates[layer]) if layer in rates else None,
            }
    profiles = {}
    for name, other in PROFILES.items():
        by_kind = energy_by_kind(record.counts, n, record.parameters, other)
        profiles[name] = {
            "joules": sum(float(v.sum()) for v in by_kind.values()) / n,
            "without_figure": {k: v / n for k, v in find_unpriced(record.counts, other).items()},
        }
    return {
        "samples": record.samples,
        "parameters": int(record.parameters.sum()),
        "counts": {name: record.total(name) / n for name in FIELDS},
        "energy": {
            "total": sum(float(v.sum()) for v in kinds.values()) / n,
            "skipping_zeros": sum(float(v.sum()) for v in skipping.values()) / n,
            **{kind: float(v.sum()) / n for kind, v in kinds.items()},
        },
        "profile": {"source": hardware.source, "prices": dict(hardware.prices), "sources": dict(hardware.sources)},
        "without_figure": {k: v / n for k, v in find_unpriced(record.counts, hardware).items()},
        "profiles": profiles,
        "spike_rate": _number(spike_rate(record)),
        "silent": _number(silent_neurons(record)),
        "saturated": _number(saturated_neurons(record)),
        "layers": layers,
        "uncounted": dict(record.uncounted),
    }


def _count(value: float) -> str:
    """A number of operations with three digits: ``18.2 M``."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _micro(value: float) -> str:
    return f"{value * 1e6:.4g} uJ"


def comparison_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Put summaries side by side.

    Args:
        columns: Summaries by the title of their column; the first is compared with the others.

    Returns:
        Rows of cells, the first of them titles; all numbers are for one sample.
    """
    every = list(columns.values())
    first = every[0]["energy"]["total"]
    rows: list[tuple[str, ...]] = [("for one sample", *columns)]
    rows.append(("parameters", *(_count(c["parameters"]) for c in every)))
    for label, name in (
        ("synaptic operations, dense", "dense"),
        ("accumulates", "accumulates"),
        ("multiply-accumulates", "multiply_accumulates"),
        ("  of values that are not zero", "effective_multiply_accumulates"),
        ("membrane updates", "membrane_updates"),
        ("evaluations of Omega", "omega"),
        ("neurons, at each step", "neurons"),
        ("spikes", "spikes"),
    ):
        rows.append((label, *(_count(c["counts"][name]) for c in every)))
    for label, name in (("spike rate", "spike_rate"), ("silent neurons", "silent"), ("saturated neurons", "saturated")):
        rows.append((label, *(_percent(c[name]) for c in every)))
    rows += [
        (f"energy: {kind}", *(_micro(c["energy"][kind]) for c in every))
        for kind in KINDS
        if any(c["energy"][kind] > 0 for c in every)
    ]
    rows.append(("energy", *(_micro(c["energy"]["total"]) for c in every)))
    rows.append(("energy, zeros skipped", *(_micro(c["energy"]["skipping_zeros"]) for c in every)))
    if len(every) > 1 and first > 0:
        rows.append(("energy, times the first column", *(f"{c['energy']['total'] / first:.3g}" for c in every)))
    if any(c["without_figure"] for c in every):
        missing = [
            ", ".join(f"{_count(v)} {k.replace('_', ' ')}" for k, v in c["without_figure"].items()) for c in every
        ]
        rows.append(("not in the energy: no figure for", *(m or "-" for m in missing)))
    if any(c["uncounted"] for c in every):
        rows.append(("could not be counted", *(", ".join(sorted(c["uncounted"])) or "-" for c in every)))
    return rows


def comparison_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Write summaries side by side as text.

    Args:
        columns: Summaries by the title of their column; the first is compared with the others.

    Returns:
        Lines of equal width, with the profile's source below.
    """
    rows = comparison_rows(columns)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    first = next(iter(columns.values()))
    return "\n".join([*lines, f"{first['samples']} samples; energies: {first['profile']['source']}", ""])
