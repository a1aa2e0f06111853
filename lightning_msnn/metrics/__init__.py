"""What a network does and what it costs: a counting engine for any module, and metrics on what it counts."""

from lightning_msnn.metrics.counting import OperationCounter, Record, count_operations, layer_names
from lightning_msnn.metrics.spiking import (
    Energy,
    SaturatedNeurons,
    SilentNeurons,
    SpikeRate,
    SynapticOperations,
    energy,
    saturated_neurons,
    silent_neurons,
    spike_rate,
    synaptic_operations,
)
from lightning_msnn.metrics.summary import NETWORK, comparison_rows, comparison_table, summarize

__all__ = [
    "NETWORK",
    "Energy",
    "OperationCounter",
    "Record",
    "SaturatedNeurons",
    "SilentNeurons",
    "SpikeRate",
    "SynapticOperations",
    "comparison_rows",
    "comparison_table",
    "count_operations",
    "energy",
    "layer_names",
    "saturated_neurons",
    "silent_neurons",
    "spike_rate",
    "summarize",
    "synaptic_operations",
]
