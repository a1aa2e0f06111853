"""LightningModules: what is trained, with which loss, optimizer, schedule and metrics."""

from lightning_msnn.tasks.base import SCHEDULES, Task, named_groups
from lightning_msnn.tasks.classification import SpikingClassifier
from lightning_msnn.tasks.distillation import Teacher, distillation_loss
from lightning_msnn.tasks.forecasting import SpikingForecaster

__all__ = [
    "SCHEDULES",
    "SpikingClassifier",
    "SpikingForecaster",
    "Task",
    "Teacher",
    "distillation_loss",
    "named_groups",
]
