"""Callbacks for any Trainer; some change training steps, and need a task of this package."""

from lightning_msnn.callbacks.annealing import SpikeAnnealing
from lightning_msnn.callbacks.best_checkpoint import BestCheckpoint
from lightning_msnn.callbacks.convert import Convert
from lightning_msnn.callbacks.ema import EMA
from lightning_msnn.callbacks.energy_target import EnergyTarget
from lightning_msnn.callbacks.freeze import Freeze
from lightning_msnn.callbacks.integer import IntegerInference
from lightning_msnn.callbacks.mixing import Mixing
from lightning_msnn.callbacks.monitors import EnergyMonitor, SpikeRateMonitor
from lightning_msnn.callbacks.predictions import PredictionWriter
from lightning_msnn.callbacks.teacher import Teacher
from lightning_msnn.callbacks.theta import THETA_SCHEDULES, ThetaScheduler
from lightning_msnn.callbacks.training_curves import TrainingCurves
from lightning_msnn.callbacks.whitening import Whitening

__all__ = [
    "EMA",
    "THETA_SCHEDULES",
    "BestCheckpoint",
    "Convert",
    "EnergyMonitor",
    "EnergyTarget",
    "Freeze",
    "IntegerInference",
    "Mixing",
    "PredictionWriter",
    "SpikeAnnealing",
    "SpikeRateMonitor",
    "Teacher",
    "ThetaScheduler",
    "TrainingCurves",
    "Whitening",
]
