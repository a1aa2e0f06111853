"""Pictures of what a network is given, beside what it makes of it: recordings, series, frames of events, forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_msnn.energy.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_forecast", "draw_frames", "draw_recording", "draw_series", "saliency"]


@torch.enable_grad()
def saliency(network: nn.Module, inputs: Tensor) -> Tensor:
    """How much each place of an input counts for the class that a network chooses.

    The size of gradient times input, summed over channels (Simonyan et al., arXiv 1312.6034, and Shrikumar et
    al., arXiv 1605.01713); the gradient passes spikes by their surrogate.

    Args:
        network: Network in eval mode.
        inputs: What it is given, ``(B, C, H, W)`` or ``(B, T, C, H, W)``.

    Returns:
        ``(B, H, W)`` or ``(B, T, H, W)``, at most 1 in each input.
    """
    seen = inputs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(seen).amax(1).sum(), seen)
    places = (gradient * seen).detach().abs().sum(-3)
    largest = places.flatten(1).amax(1).clamp(min=1e-12)
    return places / largest.view(-1, *[1] * (places.dim() - 1))


def draw_recording(
    wave: Tensor, rate: int, mel: Tensor, salient: Tensor, span: tuple[float, float], title: str
) -> Figure:
    """Draw a recording: its wave, its log-mel map, and where that counts.

    Args:
        wave: Samples in [-1, 1], ``(N,)``.
        rate: Sampling rate in Hz.
        mel: Normalised log-mel map, ``(mels, frames)``.
        salient: Saliency of that shape.
        span: Seconds at which the map begins and ends.
        title: What is heard, and what the network says.
    """
    figure = new_figure(7.0, 6.0)
    rows = figure.subplots(3, 1, sharex=True)
    seconds = len(wave) / rate
    rows[0].plot(torch.linspace(0, seconds, len(wave)).numpy(), wave.numpy(), linewidth=0.5, color="#4477aa")
    rows[0].set_ylabel("wave")
    for axes, values, colours, label in (
        (rows[1], mel, "magma", "mel bands"),
        (rows[2], salient, "viridis", "mel bands,\nwhere they count"),
    ):
        axes.imshow(values.numpy(), origin="lower", aspect="auto", cmap=colours, extent=(*span, 0, len(values)))
        axes.set_ylabel(label)
    rows[2].set_xlim(0, seconds)
    rows[2].set_xlabel("seconds")
    figure.suptitle(title)
    return figure


def draw_series(values: Tensor, salient: Tensor, names: Sequence[str], title: str) -> Figure:
    """Draw a series, darker where it counts.

    Args:
        values: Normalised values, ``(C, L)``.
        salient: Saliency of each place, ``(L,)``.
        names: Names of the variables.
        title: What it is, and what the network says.
    """
    figure = new_figure(7.0, 3.2)
    axes = figure.subplots()
    for name, row in zip(names, values, strict=True):
        axes.plot(row.numpy(), linewidth=1.0, label=name)
    low, high = axes.get_ylim()
    axes.imshow(
        salient[None].numpy(), aspect="auto", cmap="Greys", alpha=0.4, vmin=0, vmax=1.5,
        extent=(-0.5, len(salient) - 0.5, low, high),
    )  # fmt: skip
    axes.set_xlabel("place, the darker the more it counts")
    axes.set_ylabel("normalised value")
    if len(names) <= 8:
        axes.legend(fontsize=7)
    axes.set_title(title)
    return figure


def draw_frames(frames: Tensor, salient: Tensor, title: str) -> Figure:
    """Draw the events of a recording by polarity, and where they count.

    Args:
        frames: Normalised frames, ``(T, C, H, W)``.
        salient: Saliency, ``(T, H, W)``.
        title: What it is, and what the network says.
    """
    steps = len(frames)
    figure = new_figure(2.2 * (steps + 1) + 0.5, 2.6)
    columns = figure.subplots(1, steps + 1, squeeze=False)[0]
    for step, axes in enumerate(columns[:-1]):
        axes.imshow((frames[step, -1] - frames[step, 0]).numpy(), cmap="coolwarm")
        axes.set_title(f"step {step + 1}", fontsize=8)
    columns[-1].imshow(salient.sum(0).numpy(), cmap="viridis")
    columns[-1].set_title("where it counts", fontsize=8)
    for axes in columns:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title)
    return figure


def draw_forecast(known: Tensor, future: Tensor, forecasts: Mapping[str, Tensor], title: str) -> Figure:
    """Draw a stretch of a series and what follows it, beside forecasts.

    Args:
        known: What is known, ``(L,)``.
        future: What follows, ``(horizon,)``.
        forecasts: Forecasts of that shape by the name of what makes them.
        title: What the series is.
    """
    figure = new_figure(7.0, 3.2)
    axes = figure.subplots()
    place = torch.arange(len(known), len(known) + len(future)).numpy()
    axes.plot(known.numpy(), color="black", linewidth=1.0, label="known")
    axes.plot(place, future.numpy(), color="black", linewidth=1.0, linestyle=":", label="what followed")
    for name, forecast in forecasts.items():
        axes.plot(place, forecast.numpy(), linewidth=1.2, label=name.replace("_", "-"))
    axes.axvline(len(known) - 0.5, color="#999999", linewidth=0.7)
    axes.legend(fontsize=7)
    axes.set_xlabel("place")
    axes.set_title(title)
    return figure
