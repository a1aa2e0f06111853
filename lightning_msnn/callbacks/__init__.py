"""Callbacks for any Trainer."""

from lightning_msnn.callbacks.ema import EMA
from lightning_msnn.callbacks.predictions import PredictionWriter
from lightning_msnn.callbacks.training_curves import TrainingCurves

__all__ = ["EMA", "PredictionWriter", "TrainingCurves"]
