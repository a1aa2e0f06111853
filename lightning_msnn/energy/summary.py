"""A network's record as plain values, and several of them side by side as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_msnn.energy.counting import Record
from lightning_msnn.energy.measures import energy, saturated_neurons, silent_neurons, spike_rate
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, Profile, energy_by_kind, unpriced
from lightning_msnn.energy.profiles import profile as find_profile

__all__ = ["FACTORS", "NETWORK", "comparison_rows", "comparison_table", "factor_sentence", "factors", "summarize"]

NETWORK = "network"
"""Name of the column of the network itself; those beside it are its twins."""


FACTORS: dict[str, str] = {
    "arithmetic": "arithmetic alone",
    "arithmetic_zeros_skipped": "arithmetic alone, zeros skipped",
    "memory": "with memory traffic",
    "memory_zeros_skipped": "with memory traffic, zeros skipped",
}
"""The ways in which an energy, and how many times another it is, are given; never one without the others."""


def _number(value: Any) -> float | None:
    """A plain number, None where it is NaN."""
    number = float(value)
    return None if number != number else number


def _energies(record: Record, hardware: Profile) -> dict[str, float | None]:
    """Joules of one sample in each way of :data:`FACTORS`; None where memory traffic has no price."""
    return {
        f"{what}{'_zeros_skipped' if skip else ''}": _number(energy(record, replace(hardware, memory=memory), skip))
        if hardware.traffic or not memory
        else None
        for what, memory in (("arithmetic", False), ("memory", True))
        for skip in (False, True)
    }


def summarize(record: Record, profile: str | Profile = DEFAULT_PROFILE, top1: float | None = None) -> dict[str, Any]:
    """Return all that a record says, by sample, as plain values for a JSON file.

    Args:
        record: What a network did.
        profile: Name of an energy profile, a YAML file of one, or a profile.
        top1: Its test accuracy in percent, if it was trained by itself.

    Returns:
        ``samples``, ``parameters``, ``top1``; ``counts`` (by field and sample); ``energy`` (joules by sample:
        ``total``, ``skipping_zeros`` and by kind); ``energies`` (joules by sample in each way of :data:`FACTORS`);
        ``profiles`` (joules by sample and the operations without a figure, under every named profile);
        ``spike_rate``, ``silent``, ``saturated``; ``layers`` (those that do something: counts, energy by kind, spike
        rate); ``uncounted`` operations.

    Raises:
        ConfigurationError: If there is no such profile.
    """
    hardware, n = find_profile(profile), max(1, record.samples)
    kinds = energy_by_kind(record.counts, n, record.parameters, hardware)
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

    def missing(on: str | Profile) -> dict[str, float]:
        return {name: number / n for name, number in unpriced(record.counts, on).items()}

    return {
        "samples": record.samples,
        "parameters": int(record.parameters.sum()),
        "top1": top1,
        "counts": {name: record.total(name) / n for name in FIELDS},
        "energy": {
            "total": float(energy(record, hardware)),
            "skipping_zeros": float(energy(record, hardware, skip_zeros=True)),
            **{kind: float(v.sum()) / n for kind, v in kinds.items()},
        },
        "energies": _energies(record, hardware),
        "profile": {"source": hardware.source, "prices": dict(hardware.prices), "sources": dict(hardware.sources)},
        "without_figure": missing(hardware),
        "profiles": {
            name: {"joules": float(energy(record, name)), "without_figure": missing(name)} for name in PROFILES
        },
        "spike_rate": _number(spike_rate(record)),
        "silent": _number(silent_neurons(record)),
        "saturated": _number(saturated_neurons(record)),
        "layers": layers,
        "uncounted": dict(record.uncounted),
    }


def factors(network: Mapping[str, Any], twin: Mapping[str, Any]) -> dict[str, float | None]:
    """Return how many times a network's energy its twin's is.

    Args:
        network: Summary of the network.
        twin: Summary of the twin.

    Returns:
        Factors by the names of :data:`FACTORS`; None where the profile has no price for it.
    """
    pairs = {name: (network["energies"][name], twin["energies"][name]) for name in FACTORS}
    return {name: theirs / ours if ours and theirs is not None else None for name, (ours, theirs) in pairs.items()}


def factor_sentence(columns: Mapping[str, Mapping[str, Any]], twin: str = "ANN twin") -> str:
    """Say how a network's energy compares with that of a twin: every factor with its companions, and the accuracies.

    Args:
        columns: Summaries by the title of their column, the network's own first.
        twin: Title of the twin's column.
    """
    ours, theirs = next(iter(columns.values())), columns[twin]
    found = factors(ours, theirs)
    said = [f"{found[name]:.3g} ({text})" for name, text in FACTORS.items() if found[name] is not None]
    top1 = theirs["top1"]
    trained = "was not trained by itself" if top1 is None else f"has {top1:.2f} % top-1, trained by itself"
    return f"Its {twin} takes this many times the energy: {', '.join(said)}; it {trained}."


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
    if len(every) > 1:
        found = [factors(every[0], c) for c in every]
        rows.append(("energy, times the first column", *[""] * len(every)))
        for name, label in FACTORS.items():
            rows.append((f"  {label}", *("no figure" if f[name] is None else f"{f[name]:.3g}" for f in found)))
        said = ["not trained" if c["top1"] is None else f"{c['top1']:.2f} %" for c in every]
        said[0] = "-" if every[0]["top1"] is None else said[0]
        rows.append(("test top-1, each trained by itself", *said))
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
