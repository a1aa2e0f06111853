"""LightningModules: which network is trained, with which loss, optimizer, schedule and metrics."""

from lightning_msnn.tasks.base import Task, TrainingStepCallback
from lightning_msnn.tasks.classification import SpikingClassifier
from lightning_msnn.tasks.optimization import SCHEDULES, named_groups

__all__ = ["SCHEDULES", "SpikingClassifier", "Task", "TrainingStepCallback", "named_groups"]
