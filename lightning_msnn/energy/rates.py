"""Spike rates by a law, from the weights of a network alone: see ``docs/rates.md`` for its derivation.

Batch norm makes the current of a channel nearly Gaussian with mean ``beta`` and deviation ``|gamma|``. What the scans
of :mod:`lightning_msnn.functional.membrane` make of it is followed by running those very functions on linear forms of
currents (:class:`Form`) in the place of tensors; windows are known by what their own ``split`` and ``merge`` do to
numbered pixels, and projections by quadrature of their own function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional.projection import sine
from lightning_msnn.functional.spike import heaviside
from lightning_msnn.functional.windows import cut_by
from lightning_msnn.nn.blocks import BernoulliEncoder
from lightning_msnn.nn.folding import ThresholdEncoder
from lightning_msnn.nn.layer import watched
from lightning_msnn.nn.neuron import Membrane, Rectifier, Spike

__all__ = ["CORRELATION", "Form", "RateLaw", "evaluating", "gaussian_tail", "input_size_of", "predict_rates", "project"]

CORRELATION = 0.2
"""Correlation of a channel's current at two places of an image: measured, 0.05 to 0.35 but for attention and cells."""

_NODES = 12
_FEWEST = 8  # channels, for the signs of their means to say anything


def gaussian_tail(x: Tensor) -> Tensor:
    """``Q(x)``, the probability that a standard normal variable is ``x`` or more."""
    return 0.5 * torch.erfc(x * math.sqrt(0.5))


@lru_cache
def _nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Hermite for the mean of a function of a standard normal variable."""
    x, w = np.polynomial.hermite_e.hermegauss(_NODES)
    return torch.tensor(x), torch.tensor(w / w.sum())


@lru_cache
def _grid() -> tuple[Tensor, Tensor]:
    """Evenly spaced nodes for means of functions that turn too fast for the polynomials of Gauss and Hermite."""
    x = torch.linspace(-5.0, 5.0, 40, dtype=torch.float64)
    weights = torch.exp(-0.5 * x * x)
    return x, weights / weights.sum()


# Windows


@dataclass(frozen=True)
class Geometry:
    """What a kind of windows does to a map, its places told apart only where the law is another.

    Places in a window whose chains over the windows are alike are one *offset*, and places that fire one *site*.

    Args:
        valid: Whether window ``k`` sees the map at an offset, not padding, ``(D, n)``.
        chain: Whether windows ``j`` and ``k`` see the same pixel at an offset, ``(D, n, n)``.
        offset: Offset of each window at a site, ``(S, n)``.
        weight: Share of each window in what fires at a site, ``(S, n)``.
        share: Share of the sites, ``(S,)``.
        of_place: Site of each place that fires, ``(H W,)``, or of all windows' one after another.
        same: Whether window ``j`` at the place where window ``k`` covers a site sees the same pixel as ``j'`` at that
            of ``k'``, ``(S, n, n, n, n)`` by ``k, j, k', j'``.
        seen: Whether it sees the pixel of the site itself, ``(S, n, n)`` by ``k, j``.
    """

    valid: Tensor
    chain: Tensor
    offset: Tensor
    weight: Tensor
    share: Tensor
    of_place: Tensor
    same: Tensor
    seen: Tensor


@lru_cache(maxsize=256)
def _geometry(kind: Any, height: int, width: int, windows_out: bool) -> Geometry:
    """Find out what a kind of windows does to a map.

    Raises:
        ConfigurationError: If its windows are not made of the map's pixels.
    """
    n = kind.count(height, width)
    pixels = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    windows = kind.split(pixels) if n > 1 else [pixels]
    pixel = torch.stack([window.flatten() for window in windows])  # 0 where padded
    if not bool(((pixel == pixel.round()) & (pixel >= 0) & (pixel <= height * width)).all()):
        raise ConfigurationError(
            f"{type(kind).__name__} cuts windows that are not made of the map's pixels, which the law of spike rates "
            "does not know: measure the rates"
        )
    pixel = pixel.long()
    chain = (pixel[:, None] == pixel[None]).permute(2, 0, 1)
    valid = (pixel > 0).T
    kinds, offsets = torch.unique(torch.cat([valid, chain.flatten(1)], 1), dim=0, return_inverse=True)
    places = pixel.shape[1]
    if windows_out:  # each place of each window fires for itself
        where = torch.arange(places).repeat(n)[:, None].expand(-1, n)
        weight = torch.eye(n, dtype=torch.float64).repeat_interleave(places, 0)
        site = pixel.flatten()
    else:
        ones = torch.ones_like(windows[0])
        alone = [[ones if i == k else torch.zeros_like(ones) for i in range(n)] for k in range(n)]
        merged = [kind.merge(each, height, width) if n > 1 else each[0] for each in alone]
        weight = torch.stack([each.flatten() for each in merged], 1)
        inverse = torch.zeros(n, height * width + 1, dtype=torch.int64)
        inverse.scatter_(1, pixel, torch.arange(places).expand(n, -1))
        where = inverse[:, 1:].T
        site = torch.arange(1, height * width + 1)
    seen = pixel.T[where]  # (S, k, j): the pixel of window j where window k covers the site
    there = (weight > 0)[:, :, None] & (seen > 0)
    flat = torch.where(there, seen, 0).flatten(1)
    same = (flat[:, :, None] == flat[:, None, :]) & (flat > 0)[:, :, None]
    own = there & (seen == site[:, None, None])
    signature = [weight, offsets[where].double(), own.flatten(1).double(), same.flatten(1).double()]
    unique, of_place, counts = torch.unique(torch.cat(signature, 1), dim=0, return_inverse=True, return_counts=True)
    parts = unique.split([n, n, n * n, n**4], 1)
    return Geometry(
        valid=kinds[:, :n],
        chain=kinds[:, n:].unflatten(1, (n, n)),
        offset=parts[1].long(),
        weight=parts[0],
        share=counts.double() / counts.sum(),
        of_place=of_place,
        same=parts[3].unflatten(1, (n, n, n, n)) > 0,
        seen=parts[2].unflatten(1, (n, n)) > 0,
    )


# Linear forms of currents


@dataclass(frozen=True)
class Sources:
    """The Gaussian variables that forms are made of.

    Args:
        variance: Variance of the variables of a group by channel, ``(C,)``, by the group's name.
        valid: Whether a variable is there at an offset, ``(D, n)``, by group.
        chain: Correlation of the variables of a group at an offset, ``(D, n, n)``, by group.
    """

    variance: dict[str, Tensor]
    valid: dict[str, Tensor]
    chain: dict[str, Tensor]

    def variable(self, group: str, k: int, mean: Tensor, deviation: Tensor | float = 1.0) -> Form:
        """Return the variable of window ``k``, times a number, as a form; it is 0 where it is padding."""
        there = self.valid[group][:, k].to(mean.dtype).expand(len(mean), -1)
        weights = there.new_zeros(self.valid[group].shape[1], *there.shape)
        weights[k] = there * (deviation[:, None] if isinstance(deviation, Tensor) else deviation)
        return Form(self, mean[:, None] * there, {group: weights}, torch.zeros_like(there))


@dataclass(frozen=True)
class Form:
    """A membrane as a linear form of the currents of windows, and independent noise; all ``(C, D)`` by offset.

    Args:
        sources: The variables.
        mean: Its mean.
        weights: Weights of the variables, ``(n, C, D)`` by group.
        noise: Variance of what no linear form of the variables is.
    """

    sources: Sources
    mean: Tensor
    weights: Mapping[str, Tensor]
    noise: Tensor

    def __add__(self, other: Form) -> Form:
        """Sum of two membranes."""
        weights = dict(self.weights)
        for group, weight in other.weights.items():
            weights[group] = weights[group] + weight if group in weights else weight
        return Form(self.sources, self.mean + other.mean, weights, self.noise + other.noise)

    def __rmul__(self, tau: Tensor) -> Form:
        """Decay, a scalar or ``(C, 1)``."""
        weights = {group: tau * weight for group, weight in self.weights.items()}
        return Form(self.sources, tau * self.mean, weights, tau * tau * self.noise)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let a tensor be multiplied by a form."""
        return args[1].__rmul__(args[0]) if isinstance(args[0], Tensor) else NotImplemented

    def covariance(self, other: Form) -> Tensor:
        """Covariance with another form of the same variables, ``(C, D)``, without noise."""
        total = torch.zeros_like(self.mean)
        for group in self.weights.keys() & other.weights.keys():
            chain = self.sources.chain[group].permute(1, 2, 0)[:, :, None]  # (n, n, 1, D)
            pairs = (chain * other.weights[group]).sum(1)
            total = total + (self.weights[group] * pairs).sum(0) * self.sources.variance[group][:, None]
        return total

    def variance(self) -> Tensor:
        """Variance, ``(C, D)``."""
        return self.covariance(self) + self.noise


def project(projection: Callable[..., Tensor], a: Form, b: Form) -> Form:
    """What a projection makes of two membranes: the best linear form, and the rest as noise.

    With ``z`` and ``x`` independent standard normal variables, ``b`` is its mean and deviation times ``z``, and ``a``
    what follows from ``b``, and a deviation times ``x``. The mean over ``x`` is in closed form where there is one.

    Args:
        projection: The projection, a module or a function of two tensors.
        a: Its first argument.
        b: Its second argument.
    """
    closed = _CLOSED.get(getattr(projection, "omega", None))
    z, weights = (values.to(a.mean) for values in (_nodes() if closed is None else _grid()))
    var_b = b.variance().clamp(min=1e-12)
    dev_b, lean = var_b.sqrt(), a.covariance(b) / var_b
    rest = (a.variance() - lean * lean * var_b).clamp(min=1e-12).sqrt()
    b_at = b.mean[..., None] + dev_b[..., None] * z
    a_at = a.mean[..., None] + (lean * dev_b)[..., None] * z
    if closed is None:
        first, slope, second = _integrated(projection, a_at, rest[..., None], b_at)
    else:
        first, slope, second = closed(projection, a_at, rest[..., None], b_at)
    mean = (first * weights).sum(-1)
    of_z, of_x = (first * z * weights).sum(-1), (slope * weights).sum(-1)
    noise = (second * weights).sum(-1) - mean.square() - of_z.square() - of_x.square()
    of_a = of_x / rest
    linear = of_a * a + (of_z / dev_b - lean * of_a) * b
    return Form(a.sources, mean, linear.weights, noise.clamp(min=0.0) + linear.noise)


Moments = tuple[Tensor, Tensor, Tensor]
"""Means of a projection, of it times ``x``, and of its square, over ``x``."""


def _integrated(projection: Callable[..., Tensor], a: Tensor, deviation: Tensor, b: Tensor) -> Moments:
    """Moments by Gauss and Hermite."""
    x, weights = (values.to(a) for values in _nodes())
    seen = a[..., None] + deviation[..., None] * x
    value = projection(seen, b[..., None].expand_as(seen))
    return (value * weights).sum(-1), (value * x * weights).sum(-1), (value.square() * weights).sum(-1)


def _of_sine(projection: Any, a: Tensor, deviation: Tensor, b: Tensor) -> Moments:
    """Moments of the sine by the characteristic function of a normal variable."""
    angle = math.pi * projection.radian().to(a)
    w = angle * torch.cos(angle * b)
    fading = torch.exp(-0.5 * (w * deviation).square())
    first = 2.0 * torch.sin(w * a) * fading
    slope = 2.0 * w * deviation * torch.cos(w * a) * fading
    return first, slope, 2.0 - 2.0 * torch.cos(2.0 * w * a) * fading**4


_CLOSED: dict[Any, Callable[..., Moments]] = {sine: _of_sine}
"""Moments in closed form, by the function; every other projection is integrated."""


# The layers of a network


@dataclass
class _Layer:
    """A layer of neurons, as it ran."""

    name: str
    spike: Spike
    norm: nn.modules.batchnorm._BatchNorm
    membrane: Membrane | None
    kind: str
    windows_in: bool
    windows_out: bool
    size: tuple[int, int]
    before: Any = None  # layer or norm whose membranes these are coupled with
    channels: int = 0  # how many of its last


class _Trace:
    """Hears of the layers of a network while it runs."""

    def __init__(self, network: nn.Module) -> None:
        self.names = {module: name for name, module in network.named_modules()}
        self.layers: list[_Layer] = []
        self.origin: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no other tensor takes their place

    def _remember(self, tensor: Any, origin: Any) -> None:
        self.kept.append(tensor)
        self.origin[id(tensor)] = origin

    def _origin(self, other: Any) -> Any:
        return self.origin.get(id(other))

    def __call__(self, what: str, given: dict[str, Any], out: Any) -> None:
        """Hear of a call."""
        if what == "normalise":
            if isinstance(given["norm"], nn.modules.batchnorm._BatchNorm) and given["residual"] is None:
                self._remember(out, given["norm"])
        elif what == "join_windows":
            self._remember(out, self._origin(given["windows"]))
        else:
            self._fire(given, out)

    def _fire(self, given: dict[str, Any], out: Any) -> None:
        spike, norm, membrane, cut = given["spike"], given["norm"], given["membrane"], given["cut"]
        name = self.names.get(spike, type(spike).__name__)
        if isinstance(spike, Rectifier) or not isinstance(spike, Spike):
            raise ConfigurationError(
                f"{name} is a {type(spike).__name__}, which has no spike rate: give the spiking network"
            )
        if spike.model.fire is not heaviside:
            raise ConfigurationError(f"{name} does not fire at a threshold alone, which the law of spike rates is of")
        if spike.time_steps > 1:
            raise ConfigurationError(f"the law of spike rates is of one time step, not of {spike.time_steps}")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.weight is None or norm.bias is None:
            raise ConfigurationError(
                f"{name} has no batch norm of its own, whose scale and shift the law of spike rates is of: give a "
                "network with norm=True that is not folded"
            )
        current = given["current"]
        layer = _Layer(
            name, spike, norm, membrane, "single" if membrane is None else cut.kind, cut.windows_in, cut.windows_out,
            given["size"] or (current.shape[2], current.shape[3]),
        )  # fmt: skip
        if membrane is not None and membrane.form != "first":
            layer.before = self._origin(given["other"])
            layer.channels = norm.num_features
            known = layer.before is not None
            if not known and not (isinstance(given["other"], Tensor) and not bool(given["other"].any())):
                several = cut_by(cut.kind, layer.size[0]).count(*layer.size) > 1
                if several:
                    raise ConfigurationError(
                        f"{name} is coupled with membranes of which the law of spike rates knows nothing"
                    )
        self.layers.append(layer)
        self._remember(out[1], layer)
        if out[2] is not None:
            self._remember(out[2], layer)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_size_of(network: nn.Module, input_size: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a network: those given, or those of its weights.

    Raises:
        ConfigurationError: If neither is known.
    """
    known = getattr(network, "pretrained_cfg", None) or {}
    size = input_size if input_size is not None else known.get("input_size")
    if size is None or len(size) != 3 or min(size) < 1:
        raise ConfigurationError(f"input_size must be channels, height and width of an image, not {size}")
    return int(size[0]), int(size[1]), int(size[2])


@dataclass
class _Fired:
    """What the law says of a layer."""

    rate: Tensor
    forms: list[Form]
    mean: Tensor  # (C, places), of the membrane that fires
    variance: Tensor


class RateLaw:
    """The law for the layers of a network, found once; evaluating it runs no synapse.

    Args:
        network: A network whose layers of neurons have batch norm, of one time step, not folded.
        input_size: Channels, height and width of its images; by default those of its weights.
        correlation: Correlation of a channel's current at two places of an image.

    Raises:
        ConfigurationError: If the law does not know a layer of the network; the message names it.
    """

    def __init__(
        self, network: nn.Module, input_size: Sequence[int] | None = None, correlation: float = CORRELATION
    ) -> None:
        self.input_size = input_size_of(network, input_size)
        self.correlation = correlation
        for name, module in network.named_modules():
            if isinstance(module, BernoulliEncoder | ThresholdEncoder):
                raise ConfigurationError(
                    f"{name} is a {type(module).__name__} without batch norm, whose scale and shift the law of spike "
                    "rates is of: give a network with coding='threshold' that is not folded"
                )
        parameter = next(network.parameters())
        trace = _Trace(network)
        with torch.no_grad(), evaluating(network), watched(trace):
            network(parameter.new_zeros(1, *self.input_size))
        self._layers = trace.layers
        found = {layer.spike for layer in trace.layers}
        for name, module in network.named_modules():
            if isinstance(module, Spike) and module not in found:
                raise ConfigurationError(
                    f"{name} is a {type(module).__name__} without a batch norm of its own, whose scale and shift the "
                    "law of spike rates is of: measure its rate"
                )
        if not self._layers:
            raise ConfigurationError(f"{type(network).__name__} has no layer of neurons, so it has no spike rates")

    @property
    def layers(self) -> list[str]:
        """Names of the layers of neurons in the order in which they fire."""
        return [layer.name for layer in self._layers]

    @property
    def norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """Their batch norms."""
        return [layer.norm for layer in self._layers]

    def __call__(self) -> dict[str, Tensor]:
        """Return the rate of each channel, ``(C,)`` in float64, by the name of the layer of neurons.

        It has a gradient to scale and shift of norms, to decays, radian factors and thresholds that have one.
        """
        fired: dict[int, _Fired] = {}
        rates: dict[str, Tensor] = {}
        for layer in self._layers:
            found = self._fire(layer, fired)
            fired[id(layer)] = found
            rates[layer.name] = found.rate
        return rates

    def _fire(self, layer: _Layer, fired: dict[int, _Fired]) -> _Fired:
        beta, gamma = layer.norm.bias.double(), layer.norm.weight.double()
        level = layer.spike.threshold if layer.spike.level is None else layer.spike.level.double()
        device = beta.device
        kind: Any = cut_by(layer.kind, layer.size[0])
        geometry = _geometry(kind, *layer.size, layer.windows_out)
        geometry = Geometry(**{name: value.to(device) for name, value in vars(geometry).items()})
        n = geometry.valid.shape[1]
        chain = self._correlated(geometry.chain)
        apart = self._correlated(torch.eye(n, device=device, dtype=torch.bool).expand_as(geometry.chain))
        own = "own"
        sources = Sources({own: gamma.square()}, {own: geometry.valid}, {own: chain})
        if layer.windows_in:  # a current of each window's own, also where it sees padding
            sources.valid[own] = torch.ones_like(geometry.valid)
            sources.chain[own] = apart
        currents = [sources.variable(own, k, beta) for k in range(n)]
        forms = currents
        if layer.membrane is not None and n > 1:
            forms = self._carry(layer, layer.membrane, currents, sources, geometry, chain, fired)
        mean, variance, lean = self._sites(layer, forms, geometry, sources)
        rest = (variance - lean.square() * gamma.square()[:, None]).clamp(min=0.0)
        level = torch.as_tensor(level, device=device, dtype=beta.dtype).expand_as(beta)[:, None] - mean
        rate = _tail(layer.norm, level, lean, rest, variance)
        rate = (rate * geometry.share).sum(1)
        return _Fired(rate, forms, mean[:, geometry.of_place], variance[:, geometry.of_place])

    def _correlated(self, same: Tensor) -> Tensor:
        """Correlation of variables that are the same or not."""
        return torch.where(same, 1.0, self.correlation).double()

    def _carry(
        self,
        layer: _Layer,
        membrane: Membrane,
        currents: list[Form],
        sources: Sources,
        geometry: Geometry,
        chain: Tensor,
        fired: dict[int, _Fired],
    ) -> list[Form]:
        """Run the scan of a layer on forms."""
        other: list[Form] = []
        if membrane.form != "first":
            before = layer.before
            channels = layer.channels
            group = "other"
            sources.valid[group], sources.chain[group] = geometry.valid, chain
            if isinstance(before, _Layer) and membrane.form == "coupled":
                # Its variables are taken over under another name.
                first = fired[id(before)].forms
                variance = first[0].sources.variance["own"][-channels:]
                sources.variance[group] = variance
                sources.valid[group] = first[0].sources.valid["own"]
                sources.chain[group] = first[0].sources.chain["own"]
                other = [
                    Form(
                        sources,
                        u.mean[-channels:],
                        {group: u.weights["own"][:, -channels:]},
                        u.noise[-channels:],
                    )
                    for u in first
                ]
            else:
                # The map that a recurrent layer receives: the mean of each window's places, and what they deviate by.
                shape = (1, len(currents[0].mean), *layer.size)
                mean = variance = currents[0].mean.new_zeros(shape)
                if isinstance(before, _Layer):
                    mean, variance = (
                        self._on_map(x, before) for x in (fired[id(before)].mean, fired[id(before)].variance)
                    )
                elif before is not None:
                    mean, variance = before.bias.double(), before.weight.double().square()
                    mean, variance = (x.view(1, -1, 1, 1).expand(shape) for x in (mean, variance))
                sources.variance[group] = torch.ones_like(currents[0].mean[:, 0])
                kind = cut_by(layer.kind, layer.size[0])
                for k, (m, v) in enumerate(zip(kind.split(mean), kind.split(variance), strict=True)):
                    middle = m.mean((0, 2, 3))
                    around = v.mean((0, 2, 3)) + m.var((0, 2, 3), correction=0)
                    other.append(sources.variable(group, k, middle, around.clamp(min=1e-24).sqrt()))
        tau = membrane.decay().double()
        omega = None if membrane.projection is None else partial(project, membrane.projection)
        return membrane.carry(currents, other, tau.flatten()[:, None] if tau.dim() else tau, omega)

    def _on_map(self, x: Tensor, layer: _Layer) -> Tensor:
        """Put moments of what fires ``(C, places)`` on the map ``(1, C, H, W)``, the mean where windows overlap."""
        if not layer.windows_out:
            return x.view(1, len(x), *layer.size)
        kind = cut_by(layer.kind, layer.size[0])
        n = kind.count(*layer.size)
        side = kind.split(x.new_zeros(1, 1, *layer.size))[0].shape[2:] if n > 1 else layer.size
        windows = [window.view(1, len(x), *side) for window in x.chunk(n, 1)]
        return kind.merge(windows, *layer.size) if n > 1 else windows[0]

    def _sites(
        self, layer: _Layer, forms: list[Form], geometry: Geometry, sources: Sources
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of what fires at each site, and its slope on the site's own current, all ``(C, S)``."""
        n = len(forms)
        if n == 1:
            one = torch.ones_like(forms[0].mean)
            return forms[0].mean, forms[0].variance(), one
        nothing = torch.zeros_like(forms[0].mean).expand(n, -1, -1)
        weight = geometry.weight.T  # (n, S)
        mean = sum(weight[k] * forms[k].mean[:, geometry.offset[:, k]] for k in range(n))
        variance = sum(weight[k] ** 2 * forms[k].noise[:, geometry.offset[:, k]] for k in range(n))
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        lean = torch.zeros_like(mean)
        for group in sources.variance:
            at = torch.stack([form.weights.get(group, nothing) for form in forms])
            # (k, j, C, S): share of the variable of window j in what fires, by way of window k.
            each = torch.stack([weight[k] * at[k][..., geometry.offset[:, k]] for k in range(n)])
            flat = each.flatten(0, 1)
            same, seen = geometry.same.flatten(1, 2).flatten(2, 3), geometry.seen.flatten(1)
            if group == "own" and layer.windows_in:
                at_home = torch.eye(n, dtype=torch.bool, device=same.device).flatten()
                # The currents of two windows are two even where they see one pixel.
                same = torch.eye(n * n, dtype=torch.bool, device=same.device).expand(len(same), -1, -1)
                seen = at_home.expand(len(same), -1) & (geometry.weight > 0).repeat_interleave(n, 1)
            by_site = flat.permute(2, 1, 0)  # (S, C, k j)
            covariance = (by_site @ self._correlated(same) * by_site).sum(2).T
            variance = variance + sources.variance[group][:, None] * covariance
            if group == "own":
                toward = self._correlated(seen).T[:, None]
                lean = (flat * toward).sum(0)
        return mean, variance, lean


def _tail(norm: nn.modules.batchnorm._BatchNorm, level: Tensor, lean: Tensor, rest: Tensor, variance: Tensor) -> Tensor:
    """Probability that ``lean (I - beta)``, and independent noise, reach a level.

    Args:
        norm: What the current ``I`` comes from.
        level: The level, ``(C, S)``.
        lean: ``(C, S)``.
        rest: Variance of the noise, ``(C, S)``.
        variance: Variance of the whole.
    """
    if not _counts(norm):
        return gaussian_tail(level / variance.clamp(min=1e-24).sqrt())
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.double()[:, None, None]
    var = norm.running_var.double()[:, None, None].clamp(min=1e-12)
    gamma = norm.weight.double()[:, None, None]
    nodes, weights = (x.to(level) for x in _nodes())
    left = level[..., None] - rest.clamp(min=1e-24).sqrt()[..., None] * nodes
    slope = lean[..., None] * gamma / (var + norm.eps).sqrt()
    slope = torch.where(slope.abs() < 1e-12, 1e-12, slope)
    # Reached where the count is at least this, or for a negative slope at most.
    count = mean + left / slope
    shape = mean.square() / var
    # Not from 0 on, where the density of many is infinite.
    above = torch.special.gammaincc(shape.expand_as(count), (count * mean / var).clamp(min=1e-6))
    return (torch.where(slope > 0, above, 1.0 - above) * weights).sum(-1)


def _counts(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a current is a count, such as that of coincident spikes: its mean is positive in every channel."""
    mean = norm.running_mean
    return mean is not None and norm.num_features >= _FEWEST and bool((mean > 0).all())


def predict_rates(
    network: nn.Module, input_size: Sequence[int] | None = None, correlation: float = CORRELATION
) -> dict[str, Tensor]:
    """Predict the spike rate of each channel from the weights of a network alone, by the law of ``docs/rates.md``.

    Args:
        network: A network whose layers of neurons have batch norm, of one time step, not folded.
        input_size: Channels, height and width of its images; by default those of its weights.
        correlation: Correlation of a channel's current at two places of an image.

    Returns:
        Rates in [0, 1], float64, ``(C,)``, by the name of the layer of neurons.

    Raises:
        ConfigurationError: If the law does not know a layer of the network; the message names it.

    Examples:
        >>> import timm
        >>> from lightning_msnn.energy import predict_rates
        >>> rates = predict_rates(timm.create_model("msnn_resnet12_tiny", num_classes=10), (3, 32, 32))
        >>> round(rates["stages.0.blocks.0.encoder1.spike"][0].item(), 4)  # Q(0.5)
        0.3085
    """
    return RateLaw(network, input_size, correlation)()
