"""Callbacks for any Trainer."""

from lightning_msnn.callbacks.annealing import ANNEALING_SHAPES, SpikeAnnealing
from lightning_msnn.callbacks.best_checkpoint import BestCheckpoint
from lightning_msnn.callbacks.ema import EMA
from lightning_msnn.callbacks.integer import IntegerInference
from lightning_msnn.callbacks.monitors import EnergyMonitor, SpikeRateMonitor
from lightning_msnn.callbacks.parameter_summary import ParameterSummary
from lightning_msnn.callbacks.predictions import PredictionWriter
from lightning_msnn.callbacks.theta import THETA_SCHEDULES, ThetaScheduler
from lightning_msnn.callbacks.training_curves import TrainingCurves

__all__ = [
    "ANNEALING_SHAPES",
    "EMA",
    "THETA_SCHEDULES",
    "BestCheckpoint",
    "EnergyMonitor",
    "IntegerInference",
    "ParameterSummary",
    "PredictionWriter",
    "SpikeAnnealing",
    "SpikeRateMonitor",
    "ThetaScheduler",
    "TrainingCurves",
]
