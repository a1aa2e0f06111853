"""A network's record as plain values, and several of them side by side as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_msnn.energy.measures import (
    Record,
    aligned,
    energy,
    mean_level,
    percent,
    saturated_neurons,
    short,
    silent_neurons,
    spike_rate,
)
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, FIELDS, KINDS, PROFILES, Profile, energy_by_kind, unpriced
from lightning_msnn.energy.profiles import profile as find_profile

__all__ = ["FACTORS", "NETWORK", "comparison_rows", "comparison_table", "factor_sentence", "factors", "summarize"]

NETWORK = "network"
"""Key of the network itself among the columns of a comparison; the others are its baselines."""

TITLES = {"ANN twin": "ReLU baseline (same weights)", "SNN twin, T = 4": "LIF neurons, T = 4 (same weights)"}
"""Titles of baselines by their key in results files; another key is its own title."""

FACTORS: dict[str, str] = {
    "arithmetic": "arithmetic alone",
    "arithmetic_zeros_skipped": "arithmetic alone, zeros skipped",
    "memory": "with memory traffic",
    "memory_zeros_skipped": "with memory traffic, zeros skipped",
}
"""Ways to state an energy and its factor; reports give all of them."""


def _number(value: Any) -> float | None:
    """A plain number, None where it is NaN."""
    return None if math.isnan(number := float(value)) else number


def summarize(record: Record, profile: str | Profile = DEFAULT_PROFILE, top1: float | None = None) -> dict[str, Any]:
    """Return all that a record says, by sample, as plain values for a JSON file.

    Args:
        record: What a network did.
        profile: Name of an energy profile, a YAML file of one, or a profile.
        top1: Its test accuracy in percent, if it was trained by itself.

    Returns:
        ``samples``, ``parameters``, ``top1``; ``counts`` (by field and sample); ``energy`` (joules by sample,
        ``total``, ``skipping_zeros`` and by kind); ``energies`` (joules by sample in each way of :data:`FACTORS`, None
        where memory traffic has no price); ``profiles`` (joules by sample and the operations without a figure, under
        every named profile); ``spike_rate``, ``mean_level``, ``silent``, ``saturated``; ``layers`` (those that do
        something, with counts, energy by kind, spike rate); ``uncounted`` operations.

    Raises:
        ConfigurationError: If there is no such profile.
    """
    hardware, n = find_profile(profile), max(1, record.samples)
    kinds = energy_by_kind(record.counts, record.parameters, hardware)
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

    def joules(skip: bool, **changes: bool) -> float | None:
        return _number(energy(record, replace(hardware, **changes), skip))  # type: ignore[arg-type]

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
        "energies": {
            way: joules("zeros" in way, memory="memory" in way) if hardware.traffic or "memory" not in way else None
            for way in FACTORS
        },
        "profile": {"source": hardware.source, "prices": dict(hardware.prices), "sources": dict(hardware.sources)},
        "without_figure": missing(hardware),
        "profiles": {p: {"joules": float(energy(record, p)), "without_figure": missing(p)} for p in PROFILES},
        "spike_rate": _number(spike_rate(record)),
        "mean_level": _number(mean_level(record)),
        "silent": _number(silent_neurons(record)),
        "saturated": _number(saturated_neurons(record)),
        "layers": layers,
        "uncounted": dict(record.uncounted),
    }


def factors(network: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    """Return how many times a network's energy its baseline takes, given their summaries.

    Returns:
        Factors by the names of :data:`FACTORS`; None where the profile has no price for it.
    """
    pairs = {name: (network["energies"][name], baseline["energies"][name]) for name in FACTORS}
    return {name: theirs / ours if ours and theirs is not None else None for name, (ours, theirs) in pairs.items()}


def factor_sentence(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how a network's energy compares with its ReLU baseline's: every factor with its companions, and the accuracy.

    Args:
        columns: Summaries by the key of their column, the network's own first, the baseline's ``ANN twin``.
    """
    baseline = columns["ANN twin"]
    found, top1 = factors(next(iter(columns.values())), baseline), baseline["top1"]
    said = ", ".join(f"{found[name]:.3g} ({text})" for name, text in FACTORS.items() if found[name] is not None)
    trained = "not known" if top1 is None else f"{top1:.2f} %"
    return f"The {TITLES['ANN twin']} takes this many times the energy: {said}; top-1 trained by itself: {trained}."


_SHARES = {"spike rate": "spike_rate", "silent neurons": "silent", "saturated neurons": "saturated"}
_ENERGIES = {**{f": {kind}": kind for kind in KINDS}, "": "total", ", zeros skipped": "skipping_zeros"}
_MISSING = {"not in the energy: no figure for": "without_figure", "could not be counted": "uncounted"}


def comparison_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Put summaries side by side.

    Args:
        columns: Summaries by the key of their column; the first is compared with the others.

    Returns:
        Rows of cells, titles first in each; all numbers are for one sample, energies in µJ.
    """
    every = list(columns.values())
    rows: list[tuple[str, ...]] = [("for one sample", *(TITLES.get(key, key) for key in columns))]
    rows.append(("parameters", *(short(c["parameters"]) for c in every)))
    rows += [(title, *(short(c["counts"][name]) for c in every)) for name, title in [*FIELDS.items()][:10]]
    rows += [(title, *(percent(c[name]) for c in every)) for title, name in _SHARES.items()]
    if any(c["counts"]["further_levels"] for c in every):
        rows.append((FIELDS["graded_products"], *(short(c["counts"]["graded_products"]) for c in every)))
        rows.append(("mean level", *("-" if c["mean_level"] is None else f"{c['mean_level']:.3f}" for c in every)))
    for title, name in _ENERGIES.items():
        if name not in KINDS or any(c["energy"][name] > 0 for c in every):
            rows.append((f"energy (µJ){title}", *(f"{1e6 * c['energy'][name]:.4g}" for c in every)))
    if len(every) > 1:
        for name, label in FACTORS.items():
            found = [factors(every[0], c)[name] for c in every]
            rows.append(
                (f"times the first column, {label}", *("no figure" if f is None else f"{f:.3g}" for f in found))
            )
        known = ("-" if c["top1"] is None else f"{c['top1']:.2f} %" for c in every)
        rows.append(("test top-1, each trained by itself", *known))
    for title, name in _MISSING.items():
        if any(c[name] for c in every):
            rows.append(
                (title, *(", ".join(f"{short(v)} {k}" for k, v in sorted(c[name].items())) or "-" for c in every))
            )
    return rows


def comparison_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Write :func:`comparison_rows` as text, with the profile's source below."""
    first = next(iter(columns.values()))
    return f"{aligned(comparison_rows(columns))}\n{first['samples']} samples; energies: {first['profile']['source']}\n"
