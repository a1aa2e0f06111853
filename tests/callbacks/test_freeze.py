"""Parts of a network that do not learn."""

import pytest
import torch

from lightning_msnn.callbacks import Freeze
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import LastCheckpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import fit


@pytest.mark.parametrize(
    ("modules", "learns"),
    [
        ("all_but_head", {"head.fc"}),
        ("stem", {"stages.0", "stages.1", "norm", "head.fc"}),
        (["stem", "stages.[0]"], {"stages.1", "norm", "head.fc"}),
    ],
)
def test_what_is_frozen_stays(tmp_path, modules, learns):
    """Weights and statistics, also after a validation and when resumed within an epoch; all else moves."""
    start, _ = fit(tmp_path, lr=0.0, trainer={"max_steps": 1, "limit_val_batches": 0})
    given = {"lr": 0.05, "epochs": 2, "pretrained": str(tmp_path / "x.ckpt")}
    within = {"max_steps": 2, "enable_checkpointing": True}
    fit(tmp_path / "b", Freeze(modules), LastCheckpoint(2), trainer=within, **given)
    task, _ = fit(tmp_path / "c", Freeze(modules), ckpt_path=tmp_path / "b" / "checkpoints" / "last.ckpt", **given)
    before = start.network.state_dict()
    moved = {name for name, value in task.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if not name.startswith(tuple(learns))} == set()
    assert all(any(name.startswith(part) for name in moved) for part in learns)


def test_parameters_that_are_in_no_module_are_frozen_too():
    task = SpikingClassifier("test_vit", num_classes=10, network_kwargs={"img_size": 16, "patch_size": 8})
    Freeze().setup(None, task, "fit")
    assert {name for name, p in task.network.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_network_without_a_head_has_no_name_for_the_rest():
    task = SpikingClassifier(network=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), in_chans=1)
    with pytest.raises(ConfigurationError, match="'all_but_head' is no module of Sequential: allowed are 0, 1 and"):
        Freeze().setup(None, task, "fit")


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ConfigurationError, match="'stages.7' is no module of MSNNResNet.*did you mean 'stages.[01]'"):
        fit(tmp_path, Freeze(["stem", "stages.7"]))
