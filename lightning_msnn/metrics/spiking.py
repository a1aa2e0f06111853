"""Sums of records, and measures of them, as torchmetrics classes.

Their states are sums of integers alone, so that they are exact under any batch split and any number of processes. Each
computes the function of the same name in :mod:`lightning_msnn.energy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_msnn import energy
from lightning_msnn.energy.measures import Record, check_by
from lightning_msnn.energy.profiles import DEFAULT_PROFILE, Profile
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.errors import ConfigurationError

__all__ = ["Energy", "SpikeRate", "SynapticOperations", "Total"]


class Total(Metric):
    """The sum of records of one network, over batches and processes.

    Every function of a record takes it: ``silent_neurons(total.compute())``.

    Args:
        example: A network, or a record of it for images of the size to come, which tells single neurons apart.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    counts: Tensor
    samples: Tensor
    fired: Tensor
    visits: Tensor

    def __init__(self, example: nn.Module | Record, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(example, nn.Module):
            example = energy.OperationCounter(example).record()
        self.example = example
        self.shapes = {layer: tuple(fired.shape) for layer, fired in example.fired.items()}
        for name, size in (
            ("counts", example.counts.shape),
            ("samples", ()),
            ("visits", (len(self.shapes),)),
            ("fired", (sum(fired.numel() for fired in example.fired.values()),)),
        ):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, record: Record) -> None:
        """Add a record of the network.

        Raises:
            ConfigurationError: If the record is of another network, or its layers of neurons have other shapes than
                those of the example.
        """
        shapes = {layer: tuple(fired.shape) for layer, fired in record.fired.items()}
        if self.shapes and shapes != self.shapes:
            raise ConfigurationError(
                f"the record's layers of neurons {shapes} are not those of the example {self.shapes}: "
                "neurons are told apart by their place, so count images of one size"
            )
        if record.layers != self.example.layers:
            raise ConfigurationError(
                f"the record has {len(record.layers)} layers and is of another network than this metric's, "
                f"which has {len(self.example.layers)}: give the metric the network that is counted"
            )
        self.counts = self.counts + record.counts.to(self.counts)
        self.samples = self.samples + record.samples
        if self.shapes:
            self.fired = self.fired + torch.cat([f.flatten() for f in record.fired.values()]).to(self.fired)
            self.visits = self.visits + torch.tensor(list(record.visits.values())).to(self.visits)

    def total(self) -> Record:
        """Return the sum on the CPU; calls that could not be counted are those of the example."""
        parts = torch.split(self.fired.cpu(), [f.numel() for f in self.example.fired.values()])
        fired = zip(self.shapes.items(), parts, strict=True)
        return replace(
            self.example,
            counts=self.counts.cpu(),
            samples=int(self.samples),
            fired={layer: part.view(shape) for (layer, shape), part in fired},
            visits=dict(zip(self.shapes, self.visits.tolist(), strict=True)),
        )

    measure: Callable[..., Any] = staticmethod(lambda record: record)
    """Computes the metric from the sum and ``options``."""
    options: Mapping[str, Any] = {}

    def compute(self) -> Any:
        """Return the measure of the sum."""
        return self.measure(self.total(), **self.options)


class SpikeRate(Total):
    """Share of the neurons that fired, in [0, 1]; see :func:`lightning_msnn.energy.spike_rate`.

    Args:
        example: The network, or a record of it.
        by: None for all layers as one, ``"layer"`` for a dictionary of each.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If ``by`` is something else.
    """

    measure = staticmethod(energy.spike_rate)

    def __init__(self, example: nn.Module | Record, by: str | None = None, **kwargs: Any) -> None:
        super().__init__(example, **kwargs)
        self.options = {"by": check_by(by, ("layer",))}


class SynapticOperations(Total):
    """Synaptic operations of one sample; see :func:`lightning_msnn.energy.synaptic_operations`.

    Args:
        example: The network, or a record of it.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    measure = staticmethod(energy.synaptic_operations)


class Energy(Total):
    """Energy of one sample in joules; see :func:`lightning_msnn.energy.energy`.

    Args:
        example: The network, or a record of it.
        profile: Name of an energy profile, a YAML file of one, or a profile.
        skip_zeros: Whether multiply-accumulates whose value is zero cost nothing.
        by: None for the whole, ``"layer"`` or ``"kind"`` for a dictionary of its parts.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    measure = staticmethod(energy.energy)

    def __init__(
        self,
        example: nn.Module | Record,
        profile: str | Profile = DEFAULT_PROFILE,
        skip_zeros: bool = False,
        by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(example, **kwargs)
        self.options = {
            "profile": find_profile(profile),
            "skip_zeros": skip_zeros,
            "by": check_by(by, ("layer", "kind")),
        }
