"""Energy and synaptic operations of a network as a function of its spike rates, measured or expected of its weights.

What a spike costs comes from the counting engine: it counts an image with all neurons silent, with all of them firing,
and with some, which tells the layers of neurons that synapses listen to apart. Rates may be measured, or those of the
law of :mod:`lightning_msnn.energy.rates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_msnn.energy.counting import OperationCounter, Record
from lightning_msnn.energy.profiles import COLUMN, DEFAULT_PROFILE, Profile, energy_by_kind
from lightning_msnn.energy.profiles import profile as find_profile
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.blocks import BernoulliEncoder

__all__ = ["CostOfRates"]

_CHANGED = 1e-9  # of the largest difference
_WRONG = 0.01  # of the amount with all neurons firing


class _Answer:
    """How amounts of the modules of a network depend on the rates of its layers of neurons.

    Each is ``silent + rise (linear r + (1 - linear) r^2)``, where ``r`` is the rate of the layer that it listens to: a
    product of two spikes grows with the square.

    Args:
        silent: Amounts of the modules with all neurons silent, float64, ``(modules,)``.
        half: With half of them firing, at random.
        full: With all of them firing.
        source: Number of the layer that each module listens to, int64, ``(modules,)``.
    """

    def __init__(self, silent: Tensor, half: Tensor, full: Tensor, source: Tensor) -> None:
        self.silent = float(silent.sum())
        rise = full - silent
        listens = rise.abs() > _CHANGED * rise.abs().max()
        self.rise, self.source = rise[listens], source[listens]
        self.linear = (4.0 * (half - silent)[listens] / self.rise - 1.0).clamp(0.0, 1.0)

    def __call__(self, rates: Tensor) -> Tensor:
        """Return the amount of an image for the mean rate of each layer of neurons, ``(layers,)``."""
        if rates.device != self.rise.device:
            self.rise, self.linear, self.source = (x.to(rates.device) for x in (self.rise, self.linear, self.source))
        r = rates[self.source]
        linear, rise = self.linear.to(r), self.rise.to(r)
        return self.silent + (rise * (linear * r + (1.0 - linear) * r * r)).sum()


class CostOfRates:
    """Energy and operations of a sample for given rates of its layers of neurons.

    Any network whose neurons the counting engine knows: of several time steps, without batch norm, converted too.
    Rates are means over places, so that a layer whose neurons at the border of a map fire otherwise than those
    inside costs a little more or less.

    Args:
        network: The network; it runs in evaluation mode a few times.
        sample: What it is called with, one sample.
        profile: Energy profile, or its name.
        layers: Names of its layers of neurons; by default those that the engine finds.

    Raises:
        ConfigurationError: If there is no such profile, or the network has no layers of neurons.
    """

    def __init__(
        self,
        network: nn.Module,
        sample: Tensor,
        profile: str | Profile = DEFAULT_PROFILE,
        layers: Sequence[str] | None = None,
    ) -> None:
        hardware = find_profile(profile)
        generator = torch.Generator().manual_seed(0)

        def count(fires: Callable[[int, Tensor], Tensor] | None) -> Record:
            devices = [sample.device] if sample.device.type == "cuda" else []
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=devices),
                _evaluating(network),
                OperationCounter(network, operations=fires is not None) as counter,
            ):
                torch.manual_seed(0)
                handles = [] if fires is None else [
                    network.get_submodule(name).register_forward_hook(_forced(i, fires), prepend=True)
                    for i, name in enumerate(self.layers)
                ]  # fmt: skip
                try:
                    network(sample)
                finally:
                    for handle in handles:
                        handle.remove()
            return counter.record()

        if layers is None:
            fired = count(None).fired
            modules = network.named_modules()
            layers = [name for name, m in modules if name in fired or isinstance(m, BernoulliEncoder)]
        self.layers = list(layers)
        """Names of the layers of neurons."""
        if not self.layers:
            raise ConfigurationError(f"{type(network).__name__} has no layer of neurons, so it has no spike rates")

        def coin(i: int, spikes: Tensor) -> Tensor:
            order = torch.rand(spikes.numel(), generator=generator).argsort()  # exactly every second one
            return (order % 2).view(spikes.shape).to(spikes)

        silent = count(lambda i, x: torch.zeros_like(x))
        full = count(lambda i, x: torch.ones_like(x))
        half = count(coin)
        # In one count for each digit of its number in base 2, counted from 1, a layer fires where the digit is 1.
        digits = len(self.layers).bit_length()

        def digit(d: int) -> Callable[[int, Tensor], Tensor]:
            return lambda i, x: torch.full_like(x, float((i + 1) >> d & 1))

        told = [count(digit(d)) for d in range(digits)]
        everyone = torch.arange(len(self.layers))

        @cache
        def alone() -> list[tuple[Record, Record]]:
            """With half of the neurons of each layer firing and no other, and with all of them."""

            def of(layer: int, fires: Callable[[int, Tensor], Tensor]) -> Record:
                return count(lambda i, x: fires(i, x) if i == layer else torch.zeros_like(x))

            return [(of(layer, coin), of(layer, lambda i, x: torch.ones_like(x))) for layer in everyone.tolist()]

        def answer(amounts: Callable[[Record], Tensor]) -> _Answer:
            low, high = amounts(silent), amounts(full)
            middle = (low + high) / 2
            number = sum(((amounts(record) > middle) != (high < low)).long() << d for d, record in enumerate(told))
            assert isinstance(number, Tensor)
            found = _Answer(low, amounts(half), high, (number - 1).clamp(0, len(self.layers) - 1))
            known = [
                (found(((everyone + 1) >> d & 1).double()), amounts(record).sum()) for d, record in enumerate(told)
            ]
            if all(abs(float(a - b)) <= _WRONG * float(high.sum()) for a, b in known):
                return found
            # A module that listens to several layers: what each layer adds by itself.
            halves, alls = (torch.stack([amounts(pair[i]).sum() for pair in alone()]) for i in (0, 1))
            found = _Answer(low.sum().expand_as(alls), halves, alls, everyone)
            found.silent = float(low.sum())
            return found

        def joules(record: Record) -> Tensor:
            kinds = energy_by_kind(record.counts, 1.0, record.parameters, hardware)
            return torch.stack(list(kinds.values())).sum(0)

        self._joules = answer(joules)
        self._accumulates = answer(lambda record: record.counts[:, COLUMN["accumulates"]].double())
        self.most = float(self._accumulates(torch.ones(len(self.layers), dtype=torch.float64)))
        """Accumulates of a sample if all neurons fired."""
        self.least = float(self._joules(torch.zeros(len(self.layers), dtype=torch.float64)))
        """Joules of a sample if no neuron fired."""

    def _means(self, rates: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([rates[name].mean() for name in self.layers])

    def joules(self, rates: Mapping[str, Tensor]) -> Tensor:
        """Joules of a sample, a scalar.

        Args:
            rates: Rates of each layer of neurons, as the law predicts or someone has measured them.
        """
        return self._joules(self._means(rates))

    def accumulates(self, rates: Mapping[str, Tensor]) -> Tensor:
        """Accumulates of a sample for given rates, a scalar."""
        return self._accumulates(self._means(rates))

    def rate(self, rates: Mapping[str, Tensor]) -> Tensor:
        """Rate weighted by operations: accumulates as a share of those that there would be if all neurons fired."""
        return self.accumulates(rates) / self.most


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forced(i: int, fires: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A forward hook that puts other spikes in the place of a layer's."""

    def force(module: nn.Module, given: Any, output: Any) -> Any:
        with _disable_current_modes():  # else the counter takes what is made of nothing but numbers for weights
            if isinstance(output, Tensor):
                return fires(i, output)
            return (fires(i, output[0]), *output[1:])  # spikes, and then the state

    return force
