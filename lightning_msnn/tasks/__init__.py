"""LightningModules: what is trained, with which loss, optimizer, schedule and metrics."""

from lightning_msnn.tasks.classification import (
    OPTIMIZERS,
    SCHEDULES,
    SpikingClassifier,
    decayed_names,
    parameter_groups,
    warmup_cosine,
)
from lightning_msnn.tasks.distillation import Teacher, distillation_loss

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SpikingClassifier",
    "Teacher",
    "decayed_names",
    "distillation_loss",
    "parameter_groups",
    "warmup_cosine",
]
