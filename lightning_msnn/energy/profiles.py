"""Operation counts and what they cost: counts to joules, by named profiles of hardware.

A network's counts are an int64 tensor ``(layers, len(FIELDS))``, sums over samples. A profile prices the fields in
picojoules. What its source has no figure for costs nothing and is listed by :func:`unpriced`.

A **synaptic operation** is an input that meets a weight. It is an accumulate if the sample's whole input of the layer
is in {0, 1}, counted for each 1, else a multiply-accumulate; a product of two activations is accumulates if one of them
is all in {0, 1}. Batch norm is folded, a bias is where an accumulator starts, and what depends on parameters alone is a
constant: none of these counts. A **graded spike** of level k, of neurons with ``levels``, is k binary spikes; under a
profile that prices ``graded_products`` it is one product instead with each weight that it meets.

**Memory traffic** is bytes: a value is a word, a spike one bit. A layer reads its inputs and writes its outputs once; a
membrane is read and written at each update. Weights have one of two models. *Reuse*: read once for a sample
and time step (``weight_bytes``), while sums stay in registers. *By event*: each synaptic operation fetches its weight
(``fetch_bytes``) and reads and writes its accumulator (``accumulator_bytes``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, brief, check_integer, choose

__all__ = [
    "DEFAULT_PROFILE",
    "FIELDS",
    "KINDS",
    "PRICED",
    "PROFILES",
    "TRANSCENDENTAL",
    "Profile",
    "energy_by_kind",
    "profile",
    "unpriced",
]

FIELDS: dict[str, str] = {
    "dense": "synaptic operations, zeros included",
    "accumulates": "accumulates: spikes that meet a weight",
    "multiply_accumulates": "multiply-accumulates: analogue values that meet a weight",
    "effective_multiply_accumulates": "multiply-accumulates whose value is not zero",
    "additions": "other additions and comparisons",
    "multiplications": "other multiplications",
    "neurons": "comparisons of a membrane with a threshold",
    "spikes": "spikes",
    "membrane_updates": "membrane updates",
    "omega": "evaluations of Omega",
    "omega_operations": "elementary operations of Omega",
    "weights_read": "weights read, each once for a sample and time step",
    "values_read": "analogue values read",
    "values_written": "analogue values written",
    "spikes_read": "places of spikes read, one bit each",
    "spikes_written": "places of spikes written, one bit each",
    "input_spikes": "spikes that enter synapses",
    "convolved_spikes": "spikes that enter convolutions",
    "potentials": "membranes that synapses of spikes add to",
    "input_reads": "reads of analogue inputs: one for each value in a linear layer, else one for each operation",
    "addresses": "addresses of analogue synapses: inputs, outputs, and of convolutions a kernel by output channel",
    "calls": "samples that pass a layer of synapses, once for each time step and window",
    "further_levels": "levels of graded spikes beyond the first",
    "graded_products": "graded spikes that meet a weight: products on hardware that sends them as one",
}
"""What is counted, by the name that profiles use, in the order of the columns of a tensor of counts."""

COLUMN = {name: i for i, name in enumerate(FIELDS)}
"""Column of each field."""

TRANSCENDENTAL = 8
"""Elementary operations of a transcendental function: a polynomial of degree 8 by Horner's rule."""

KINDS: dict[str, tuple[str, ...]] = {
    "accumulates": ("accumulates", "graded_products"),
    "multiply-accumulates": ("multiply_accumulates",),
    "membranes": ("neurons", "membrane_updates"),
    "Omega": ("omega_operations",),
    "other arithmetic": ("additions", "multiplications"),
    "memory": ("weight_bytes", "fetch_bytes", "accumulator_bytes", "value_bytes", "spike_bytes"),
}
"""Kinds of energy, and the prices that each takes; all but the last are arithmetic."""

PRICED = tuple(name for names in KINDS.values() for name in names)
"""Prices that a profile can give."""


@dataclass(frozen=True)
class Profile:
    """What operations cost on a kind of hardware.

    Args:
        source: Publication of the figures.
        prices: Picojoules by the names of :data:`PRICED`; what the source does not give is left out. Bytes are those
            read or written. 0 is for what another price includes.
        sources: Where in the source each price is, or how it follows from its figures.
        bits: Width of a value; a spike has one bit.
        memory: Whether an energy includes memory traffic; where it is priced, factors are given with it and without.
        model: The analytical model, if the energy is not a sum of prices: counts, parameters by layer and whether
            zeros are skipped to picojoules by kind.

    Raises:
        ConfigurationError: If a price is of something that is not counted, or a number is not allowed.
    """

    source: str
    prices: Mapping[str, float]
    sources: Mapping[str, str] = field(default_factory=dict)
    bits: int = 32
    memory: bool = False
    model: Callable[[Tensor, Tensor, bool], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        check_integer("bits of an energy profile", self.bits, 1)
        for key, price in self.prices.items():
            choose(dict.fromkeys(PRICED), key, "price of an energy profile")
            if isinstance(price, bool) or not isinstance(price, int | float) or not 0.0 <= price < float("inf"):
                raise ConfigurationError(f"the price of {key} must be at least 0 pJ, not {price!r}")

    @property
    def traffic(self) -> bool:
        """Whether memory traffic has a price."""
        return self.model is not None or any(name in self.prices for name in KINDS["memory"])


_HOROWITZ = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, 45 nm at 0.9 V"
_SRAM_1MB = 100.0 / 8, "1 MB cache, 64 bits: 100 pJ, divided by 8 bytes"
_SRAM_32KB = 20.0 / 8, "32 kB cache, 64 bits: 20 pJ, divided by 8 bytes"
_DRAM = 1300.0 / 8, "DRAM, 64 bits: 1.3 to 2.6 nJ; the lower figure, divided by 8 bytes"
_ADDITIONS = ("accumulates", "additions", "neurons")
_MULTIPLICATIONS = ("multiply_accumulates", "multiplications", "membrane_updates", "omega_operations")


def _digital(
    source: str, number: str, multiply: float, add: float, access: Mapping[str, tuple[float, str]], **options: Any
) -> Profile:
    """Make the profile of a digital circuit from the figures of one type of number, in pJ, and those of its memories.

    An accumulate, an addition and a comparison cost an addition, and all else a multiplication and an addition.
    """
    both = round(multiply + add, 6), f"{number} multiply {multiply} pJ + {number} add {add} pJ"
    prices = {
        **dict.fromkeys(_ADDITIONS, (add, f"{number} add {add} pJ")),
        **dict.fromkeys(_MULTIPLICATIONS, both),
        **access,
    }
    return Profile(source, {k: v for k, (v, _) in prices.items()}, {k: v for k, (_, v) in prices.items()}, **options)


_REUSE = dict.fromkeys(("weight_bytes", "value_bytes", "spike_bytes"), _SRAM_1MB)
_BY_EVENT = {
    **dict.fromkeys(("fetch_bytes", "accumulator_bytes"), _SRAM_32KB),
    **dict.fromkeys(("value_bytes", "spike_bytes"), _SRAM_1MB),
}


def _access(size: Tensor) -> Tensor:
    """Energy in pJ of a 32-bit access to an SRAM of ``size`` bytes: linear through Horowitz' points, then constant."""
    found = np.interp(size.cpu().numpy(), (0.0, 8192.0, 32768.0, 1048576.0), (0.0, 10.0, 20.0, 100.0))
    return torch.from_numpy(found).to(size.device)


def _lemaire(counts: Tensor, parameters: Tensor, skip_zeros: bool) -> dict[str, Tensor]:
    """Model of Lemaire et al. 2022: memory accesses, synaptic operations and the computation of addresses.

    Every word has 32 bits. A memory is as large as what a layer holds in one call, and an access costs by its size.
    Spikes wait in a queue of 1,000 words. Each AC reads a weight and a potential, which it writes back, and costs an
    addition for its address; each spike that enters a convolution costs two MACs. Analogue synapses read a weight for
    each MAC and an input for each MAC of a convolution, or once in a linear layer.

    Unlike the paper, borders and strides are exact, no bias is read, a reset adds nothing, and zeros that are skipped
    are not read. A product of two activations reads one value for each MAC, with the addresses of a linear layer.
    """
    c = {name: counts[:, i].double() for name, i in COLUMN.items()}
    add, mac, word = 0.1, 3.2, 4.0
    each = 1.0 / c["calls"].clamp(min=1.0)
    acs, every = c["accumulates"], c["multiply_accumulates"]
    macs = c["effective_multiply_accumulates"] if skip_zeros else every
    reads = c["input_reads"] * (macs / every.clamp(min=1.0))
    weights = _access(word * parameters.double())
    potentials = _access(word * c["potentials"] * each)
    queue = _access(torch.full_like(acs, 1000.0 * word))
    inputs, outputs = (_access(word * c[name] * each) for name in ("values_read", "values_written"))
    memory = acs * (weights + 2.0 * potentials) + c["input_spikes"] * queue
    memory = memory + (c["spikes"] + c["further_levels"]) * queue + 2.0 * c["potentials"] * (acs > 0) * potentials
    memory = memory + macs * weights + reads * inputs + c["values_written"] * outputs * (macs > 0)
    address = c["convolved_spikes"] * 2.0 * mac + (acs + c["addresses"]) * add
    return {
        "accumulates": acs * add,
        "multiply-accumulates": macs * mac,
        "membranes": c["membrane_updates"] * mac + c["neurons"] * add,
        "Omega": c["omega_operations"] * mac,
        "other arithmetic": c["additions"] * add + c["multiplications"] * mac,
        "memory": memory + address,
    }


DEFAULT_PROFILE = "cmos_45nm"

PROFILES: dict[str, Profile] = {
    "cmos_45nm": _digital(_HOROWITZ, "fp32", 3.7, 0.9, _REUSE),
    "cmos_45nm_fp16": _digital(_HOROWITZ, "fp16", 1.1, 0.4, _REUSE, bits=16),
    "cmos_45nm_int8": _digital(_HOROWITZ, "8-bit", 0.2, 0.03, _REUSE, bits=8),
    "cmos_45nm_sram": _digital(_HOROWITZ, "fp32", 3.7, 0.9, _REUSE, memory=True),
    "cmos_45nm_dram": _digital(_HOROWITZ, "fp32", 3.7, 0.9, {**_REUSE, "weight_bytes": _DRAM}, memory=True),
    "cmos_45nm_event": _digital(_HOROWITZ, "fp32", 3.7, 0.9, _BY_EVENT, memory=True),
    "loihi": Profile(
        "M. Davies et al., Loihi: A Neuromorphic Manycore Processor with On-Chip Learning, IEEE Micro 2018, 14 nm",
        {"accumulates": 23.6, "neurons": 81.0, "membrane_updates": 0.0},
        {
            "accumulates": "energy per synaptic spike operation, minimum: 23.6 pJ (Table 2: simulated before silicon, "
            "consistent with early silicon)",
            "neurons": "energy per neuron update, active: 81 pJ (Table 2), for every update; inactive it is 52 pJ",
            "membrane_updates": "part of a neuron update",
        },
        bits=8,
    ),
    "truenorth": Profile(
        "P. Merolla et al., A million spiking-neuron integrated circuit with a scalable communication network and "
        "interface, Science 2014, 28 nm",
        {"accumulates": 26.0, "neurons": 0.0, "membrane_updates": 0.0},
        {
            "accumulates": "26 pJ per synaptic event (p. 7): total power, 72 mW, at a mean rate of 20 Hz and 128 "
            "active synapses; passive power, neurons and routing included",
            "neurons": "part of the 26 pJ",
            "membrane_updates": "part of the 26 pJ",
        },
        bits=1,
    ),
    "spinnaker2": Profile(
        "S. Hoeppner et al., The SpiNNaker 2 Processing Element Architecture for Hybrid Digital Neuromorphic "
        "Computing, arXiv 2103.08392, 22 nm, as listed by G. Tang et al., SENECA, Frontiers in Neuroscience "
        "17:1187252, 2023",
        {"accumulates": 10.0},
        {"accumulates": "10 pJ per synaptic operation: Tang et al. 2023, Table 3, who cite Hoeppner et al. 2021"},
        bits=16,
    ),
    "lemaire": _digital(
        "E. Lemaire et al., An Analytical Estimation of Spiking Neural Networks Energy Efficiency, ICONIP 2022, "
        "arXiv 2210.13107, with 32-bit integers and SRAM of Horowitz 2014: accesses of 10, 20 and 100 pJ at 8 kB, "
        "32 kB and 1 MB, linear in between; of 64 bits in Horowitz 2014, taken for 32 bits by this model",
        "32-bit",
        3.1,
        0.1,
        {},
        memory=True,
        model=_lemaire,
    ),
}
"""Profiles by the name that configurations use. ``PROFILES["mine"] = Profile(...)`` adds one, as a YAML file does."""


def profile(name: str | Profile) -> Profile:
    """Look a profile up.

    Args:
        name: One of :data:`PROFILES`, a profile, or the path of a YAML file that maps the name of one profile to its
            ``source``, ``prices`` (in pJ, by the names of :data:`PRICED`) and, if wanted, ``sources`` and ``bits``.
            Memory traffic is in its energy if it has a price.

    Raises:
        ConfigurationError: If there is no such profile.
    """
    if isinstance(name, Profile):
        return name
    if not isinstance(name, str) or not name.endswith((".yaml", ".yml")):
        return choose(PROFILES, name, "energy profile")
    import yaml

    try:
        (definition,) = yaml.safe_load(Path(name).read_text(encoding="utf-8")).values()
        found = Profile(**definition)
        return replace(found, memory=found.traffic)
    except (ConfigurationError, OSError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{name!r} defines no energy profile by its source and prices: {brief(error)}"
        ) from error


def energy_by_kind(
    counts: Tensor, parameters: Tensor, on: str | Profile = DEFAULT_PROFILE, skip_zeros: bool = False
) -> dict[str, Tensor]:
    """Price a network's counts.

    Args:
        counts: Sums over samples, ``(layers, len(FIELDS))``.
        parameters: Number of parameters of each layer, ``(layers,)``.
        on: The profile, or its name.
        skip_zeros: Whether multiply-accumulates whose value is zero cost nothing, as on hardware that skips them.

    Returns:
        Joules over all samples by the names of :data:`KINDS`, each float64 ``(layers,)``.

    Raises:
        ConfigurationError: If there is no such profile.
    """
    hardware = profile(on)
    if hardware.model is not None:
        picojoules = hardware.model(counts, parameters, skip_zeros)
    else:
        c, word = {name: counts[:, i].double() for name, i in COLUMN.items()}, hardware.bits / 8
        if skip_zeros:
            c["multiply_accumulates"] = c["effective_multiply_accumulates"]
        graded = c["graded_products"] * ("graded_products" in hardware.prices)
        c["accumulates"] = c["accumulates"].where(graded == 0, 0.0)
        c["weight_bytes"] = c["weights_read"] * word
        c["fetch_bytes"] = (c["accumulates"] + graded + c["multiply_accumulates"]) * word
        c["accumulator_bytes"] = 2.0 * c["fetch_bytes"]
        c["value_bytes"] = (c["values_read"] + c["values_written"]) * word
        c["spike_bytes"] = (c["spikes_read"] + c["spikes_written"]) / 8
        nothing = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        picojoules = {
            kind: sum((c[n] * hardware.prices[n] for n in names if n in hardware.prices), nothing)
            for kind, names in KINDS.items()
        }
    return {kind: value * (1e-12 if hardware.memory or kind != "memory" else 0.0) for kind, value in picojoules.items()}


def unpriced(counts: Tensor, on: str | Profile = DEFAULT_PROFILE) -> dict[str, int]:
    """Return the numbers of operations, by field, for which a profile's source has no figure; memory is not among them.

    Graded products are not either: they are priced as accumulates.

    Args:
        counts: Sums over samples, ``(layers, len(FIELDS))``.
        on: The profile, or its name.
    """
    prices, total = profile(on).prices, dict(zip(FIELDS, counts.sum(0).tolist(), strict=True))
    missing = (name for name in PRICED if name not in prices and name != "graded_products")
    return {name: total[name] for name in missing if total.get(name)}
