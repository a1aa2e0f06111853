"""Metrics on what a network does and costs, as torchmetrics classes."""

from lightning_msnn.metrics.spiking import Energy, SpikeRate, SynapticOperations, Total

__all__ = ["Energy", "SpikeRate", "SynapticOperations", "Total"]
