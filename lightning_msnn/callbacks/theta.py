"""A schedule for theta, the radian factor of the projection."""

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose
from lightning_msnn.functional.projection import WITHOUT_THETA
from lightning_msnn.nn.projection import LearntProjection, Projection
from lightning_msnn.runs.trainer import planned

__all__ = ["THETA_SCHEDULES", "ThetaScheduler", "cosine", "linear", "piecewise", "step"]


def linear(position: int, total: int, theta: float, end: float) -> float:
    """Return theta on a straight line from ``theta`` in the first epoch or step to ``end`` in the last."""
    return theta + (end - theta) * min(1.0, position / max(1, total - 1))


def cosine(position: int, total: int, theta: float, end: float) -> float:
    """Return theta on half a cosine from ``theta`` in the first epoch or step to ``end`` in the last."""
    return end + (theta - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, position / max(1, total - 1))))


def step(position: int, total: int, theta: float, gamma: float, every: int) -> float:
    """Return ``theta`` multiplied by ``gamma`` once for each ``every`` epochs or steps done."""
    return float(theta * gamma ** (position // every))


def piecewise(position: int, total: int, points: Mapping[int, float]) -> float:
    """Return theta on straight lines through points; before the first and after the last it stays as there."""
    known = sorted(points)
    return float(np.interp(position, known, [points[p] for p in known]))


THETA_SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear, "cosine": cosine, "step": step, "piecewise": piecewise,
}  # fmt: skip
"""Schedules by name: functions of the epochs or steps done, of all of them, and of their own arguments."""


class ThetaScheduler(pl.Callback):
    """Move theta of the projections while a network trains.

    theta is a pure function of the epochs or steps done, so that a run that is resumed has the same. It is logged
    for each stage as ``theta/stage<i>``. :class:`lightning_msnn.callbacks.EMA` averages theta as it does all else. A
    network without projections (windows ``single``, a ReLU baseline, any other network) is left as it is.

    Args:
        schedule: ``"linear"``, ``"cosine"``, ``"step"`` or ``"piecewise"``.
        theta: Radian factor at the start, in units of pi, in [0, 1]; not for ``"piecewise"``.
        end: Radian factor at the end, for ``"linear"`` and ``"cosine"``.
        gamma: Factor of a change, for ``"step"``.
        every: Epochs or steps between two changes, for ``"step"``.
        points: Radian factors by epoch or step, for ``"piecewise"``.
        interval: ``"epoch"`` or ``"step"`` (of the optimizer).
        pattern: Shell-style pattern of the names of the projections to move, such as ``"*stages.2.*"``; by default all.

    Raises:
        ConfigurationError: If an argument is missing, not allowed or of no use to the schedule; when training starts,
            if the pattern matches no projection, or one that learns its theta or has none, or if the end of training
            is not known to a schedule that needs it.
    """

    def __init__(
        self,
        schedule: str,
        theta: float | None = None,
        end: float | None = None,
        gamma: float | None = None,
        every: int | None = None,
        points: dict[int, float] | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        pattern: str = "*",
    ) -> None:
        self.function = choose(THETA_SCHEDULES, schedule, "theta schedule")
        _, _, *needed = signature(self.function).parameters
        given = {"theta": theta, "end": end, "gamma": gamma, "every": every, "points": points}
        for name, value in given.items():
            if (value not in (None, {})) != (name in needed):
                raise ConfigurationError(
                    f"the {schedule} theta schedule takes {', '.join(needed)}: "
                    f"{name} {f'is of no use, but is {value}' if value else 'is missing'}"
                )
        choose({"epoch": 0, "step": 0}, interval, "interval of the theta schedule")
        at = {f"theta at {position}": value for position, value in (points or {}).items()}
        for name, value in {"theta": theta, "end": end, "gamma": gamma, **at}.items():
            check_number(f"{name} of the theta schedule", 0.0 if value is None else value)
        check_integer("every of the theta schedule", 1 if every is None else every, 1)
        self.schedule, self.pattern = schedule, pattern
        self.interval: Literal["epoch", "step"] = interval
        self.arguments: dict[str, Any] = {name: given[name] for name in needed}
        self._moved: dict[str, Any] = {}

    def theta_at(self, position: int, total: int = 1) -> float:
        """Return theta after ``position`` of ``total`` epochs or steps."""
        return self.function(position, total, **self.arguments)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the projections to move."""
        if stage != "fit":
            return
        kinds = (Projection, LearntProjection)
        projections = {name: module for name, module in pl_module.named_modules() if isinstance(module, kinds)}
        if not projections:
            rank_zero_info("ThetaScheduler does nothing: the network projects no membranes")
        self._moved = {name: module for name, module in projections.items() if fnmatchcase(name, self.pattern)}
        if projections and not self._moved:
            raise ConfigurationError(
                f"no projection of the network has a name that matches pattern {self.pattern!r}: "
                f"the first of them is {next(iter(projections))!r}"
            )
        for name, module in self._moved.items():
            if isinstance(module, LearntProjection) or module.name in WITHOUT_THETA:
                why = "learns its theta" if isinstance(module, LearntProjection) else "has no theta"
                raise ConfigurationError(f"{name} {why}, which a schedule cannot move: leave out ThetaScheduler")

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set theta of this step."""
        by_epoch = self.interval == "epoch"  # whose start a training that resumes within it does not meet
        position = trainer.current_epoch if by_epoch else trainer.global_step
        endless = self.schedule not in ("linear", "cosine")
        total = 1 if endless else planned(trainer, f"the {self.schedule} theta schedule", self.interval)
        theta = self.theta_at(position, total)
        for projection in self._moved.values():
            projection.theta.fill_(theta)
        made = getattr(getattr(pl_module, "network", None), "arguments", None)
        if self.pattern == "*" and self._moved and isinstance(made, dict):
            made["theta"] = theta  # so that a checkpoint and its card say what is in the weights
        stages = {re.sub(r".*\bstages\.(\d+)\..*", r"stage\1", name) for name in self._moved}
        for stage in sorted(stages):  # of an epoch the largest, as a mean would be rounded
            pl_module.log(
                f"theta/{stage}", theta, on_step=not by_epoch, on_epoch=by_epoch, reduce_fx="max", batch_size=1,
                sync_dist=by_epoch,
            )  # fmt: skip
