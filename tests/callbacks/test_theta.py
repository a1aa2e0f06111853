"""The schedule of theta."""

import math

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import THETA_SCHEDULES, ThetaScheduler
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Projection
from tests.callbacks.training import NETWORK, StopEarly, fit

SCHEDULES = {
    "linear": {"theta": 0.1, "end": 0.9},
    "cosine": {"theta": 0.9, "end": 0.2},
    "step": {"theta": 0.8, "gamma": 0.5, "every": 2},
    "piecewise": {"points": {1: 0.2, 3: 0.6, 5: 0.4}},
}


class Watch(pl.Callback):
    """Write down theta of every step."""

    def __init__(self):
        self.thetas = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (self.thetas[trainer.global_step],) = {m.theta.item() for m in pl_module.modules() if isinstance(m, Projection)}


def test_schedules_by_hand():
    assert SCHEDULES.keys() == THETA_SCHEDULES.keys()
    at = {name: ThetaScheduler(name, **arguments).theta_at for name, arguments in SCHEDULES.items()}
    assert [at["linear"](i, 5) for i in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [at["cosine"](i, 3) for i in range(3)] == pytest.approx([0.9, 0.55, 0.2])
    assert at["cosine"](1, 4) == pytest.approx(0.2 + 0.7 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert [at["step"](i, 9) for i in range(5)] == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])
    assert [at["piecewise"](i, 9) for i in range(7)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.5, 0.4, 0.4])
    assert at["linear"](7, 5) == pytest.approx(0.9), "past the end it stays"


@pytest.mark.parametrize(("schedule", "interval"), [("cosine", "epoch"), ("linear", "step")])
def test_a_resumed_run_has_the_same_thetas_and_its_checkpoint_says_them(tmp_path, schedule, interval):
    def run(*callbacks, **options):
        scheduler = ThetaScheduler(schedule, **SCHEDULES[schedule], interval=interval)
        fit(tmp_path, scheduler, watch := Watch(), *callbacks, epochs=2, **options)
        return watch.thetas

    expected = {"cosine": [0.9] * 4 + [0.2] * 4, "linear": [0.1 + 0.8 * i / 7 for i in range(8)]}[schedule]
    assert list(run().values()) == pytest.approx(expected)
    parts = run(StopEarly()), run(ckpt_path=tmp_path / "x.ckpt")
    assert [list(part) for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [theta for part in parts for theta in part.values()] == pytest.approx(expected)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["network_arguments"]["theta"] == pytest.approx(expected[-1]), "and says so, also on the card"
    thetas = [value.item() for name, value in content["state_dict"].items() if name.endswith("projection.theta")]
    assert thetas == pytest.approx([expected[-1]] * 2)


def test_a_pattern_moves_what_it_names(tmp_path):
    task, trainer = fit(tmp_path, ThetaScheduler("piecewise", points={0: 0.7}, pattern="*stages.1.*"))
    thetas = [m.theta.item() for m in task.modules() if isinstance(m, Projection)]
    assert thetas == pytest.approx([0.25, 0.7])
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("theta/")}
    assert logged == {"theta/stage1": pytest.approx(0.7)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "exponential", "theta": 0.1}, "theta schedule 'exponential'.*cosine, linear, piecewise"),
        ({"schedule": "linear", "theta": 0.1}, "end is missing"),
        ({"schedule": "step", "theta": 0.1, "gamma": 0.5, "every": 1, "end": 0.3}, "end is of no use, but is 0.3"),
        ({"schedule": "linear", "theta": float("nan"), "end": 0.1}, r"theta .* \[0, 1\], not nan"),
        ({"schedule": "piecewise", "points": {0: 1.1}}, "theta at 0 .* not 1.1"),
        ({"schedule": "linear", "theta": 0.1, "end": 0.2, "interval": "batch"}, "interval .*'batch'.*epoch, step"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        ThetaScheduler(**kwargs)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({"learn_theta": True}, {}, "learns its theta"),
        ({"projection": "mean"}, {}, "has no theta, which a schedule cannot move"),
        ({}, {"pattern": "stages.9.*"}, r"matches pattern 'stages\.9\.\*'.*'network.stages.0"),
    ],
)
def test_networks_that_are_refused(network, options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, ThetaScheduler("linear", theta=0.3, end=0.5, **options), network_kwargs=NETWORK | network)


def test_does_nothing_where_nothing_is_projected_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    scheduler = ThetaScheduler("linear", theta=0.3, end=0.5)
    fit(tmp_path, scheduler, network="test_resnet", network_kwargs={}, trainer={"max_steps": 1})
    assert caplog.text.count("ThetaScheduler does nothing") == 1
