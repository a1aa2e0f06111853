"""Callbacks, tasks and Trainers that serve more than one training, and tests between them."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_msnn.callbacks import EMA
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import AtomicCheckpointIO, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet

SMALL = {"depths": [1, 1], "widths": [8, 8]}
IMAGES = TensorDataset(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10)


def task(**arguments):
    torch.manual_seed(0)
    return SpikingClassifier(**{"in_chans": 1, "network_kwargs": SMALL, "schedule": "constant", **arguments})


def loader():
    return DataLoader(IMAGES, 4)


def trainer(folder, *callbacks, **options):
    return quiet(folder, *callbacks, **{"max_epochs": 1, **options})


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_an_average_begins_anew_with_each_training(tmp_path):
    average, results = EMA(0.5), []
    for _ in range(2):
        module = task()
        trainer(tmp_path, average).fit(module, loader())
        results.append(weights(module))
    assert not torch.equal(results[0], weights(task())), "it learns"
    assert torch.equal(results[0], results[1])


def test_a_task_is_trained_again_for_another_length(tmp_path):
    module = task(schedule="cosine")
    trainer(tmp_path).fit(module, loader())
    again = trainer(tmp_path, max_epochs=2)
    again.fit(module, loader())
    assert again.global_step == 8


class Endless(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


@pytest.mark.parametrize(("schedule", "options"), [("cosine", {"max_epochs": 1}), ("one_cycle", {"max_epochs": -1})])
def test_a_schedule_needs_an_end(tmp_path, schedule, options):
    with pytest.raises(ConfigurationError, match=f"the {schedule} schedule must know where training ends"):
        trainer(tmp_path, **options).fit(task(schedule=schedule), DataLoader(Endless(), 4))
    own = trainer(tmp_path, max_steps=3, max_epochs=-1)
    own.fit(task(schedule=schedule), DataLoader(Endless(), 4))
    assert own.global_step == 3


def test_numbers_of_numpy_become_plain(tmp_path):
    module = task(lr=np.float64(0.002), class_weights=list(np.linspace(0.5, 1.0, 10)))
    own = trainer(tmp_path, plugins=[AtomicCheckpointIO()])
    own.fit(module, loader())
    own.save_checkpoint(tmp_path / "x.ckpt")
    kept = read_checkpoint(tmp_path / "x.ckpt")["hyper_parameters"]
    assert kept["lr"] == 0.002
    assert [type(weight) for weight in (kept["lr"], *kept["class_weights"])] == [float] * 11
