"""Count what a network does and what it costs, for any module; prices, pictures and an HTML report."""

from lightning_msnn.energy.counting import OperationCounter, count_operations
from lightning_msnn.energy.measures import (
    Record,
    energy,
    mean_level,
    saturated_neurons,
    silent_neurons,
    spike_rate,
    synaptic_operations,
)
from lightning_msnn.energy.profiles import PROFILES, Profile, profile
from lightning_msnn.energy.rates import predict_rates
from lightning_msnn.energy.sampling import SAMPLES, evenly, spread
from lightning_msnn.energy.summary import (
    FACTORS,
    NETWORK,
    comparison_rows,
    comparison_table,
    factor_sentence,
    factors,
    summarize,
)

__all__ = [
    "FACTORS",
    "NETWORK",
    "PROFILES",
    "SAMPLES",
    "OperationCounter",
    "Profile",
    "Record",
    "comparison_rows",
    "comparison_table",
    "count_operations",
    "energy",
    "evenly",
    "factor_sentence",
    "factors",
    "mean_level",
    "predict_rates",
    "profile",
    "saturated_neurons",
    "silent_neurons",
    "spike_rate",
    "spread",
    "summarize",
    "synaptic_operations",
]
