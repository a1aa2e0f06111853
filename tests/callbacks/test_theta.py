"""The schedule of theta."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_msnn.callbacks import THETA_SCHEDULES, ThetaScheduler
from lightning_msnn.data import Digits
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Projection
from lightning_msnn.tasks import SpikingClassifier

NETWORK = {"depths": (1, 1), "widths": (8, 8)}

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
        values = {m.theta.item() for n, m in pl_module.named_modules() if isinstance(m, Projection)}
        self.thetas[trainer.global_step] = sorted(values)


def fit(tmp_path, scheduler, epochs, ckpt_path=None, **network):
    pl.seed_everything(0, verbose=False)
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, {**NETWORK, **network})
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=3,
        limit_val_batches=1,
        callbacks=[scheduler, watch, ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)],
        logger=CSVLogger(tmp_path, version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(task, datamodule=Digits(batch_size=16, num_workers=0), ckpt_path=ckpt_path)
    return watch.thetas, trainer, task


def test_every_schedule_is_tested():
    assert set(SCHEDULES) == set(THETA_SCHEDULES)


def test_schedules_by_hand():
    at = {name: ThetaScheduler(name, **arguments).theta_at for name, arguments in SCHEDULES.items()}
    assert [at["linear"](i, 5) for i in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [at["cosine"](i, 3) for i in range(3)] == pytest.approx([0.9, 0.55, 0.2])
    assert at["cosine"](1, 4) == pytest.approx(0.2 + 0.7 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert [at["step"](i, 9) for i in range(5)] == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])
    assert [at["piecewise"](i, 9) for i in range(7)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.5, 0.4, 0.4])
    assert at["linear"](7, 5) == pytest.approx(0.9), "past the end it stays"


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_has_the_same_thetas(tmp_path, schedule, interval):
    def scheduler():
        return ThetaScheduler(schedule, **SCHEDULES[schedule], interval=interval)

    class CutOff(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    whole, _, _ = fit(tmp_path / "whole", scheduler(), 4)
    cut = scheduler()
    cut.on_train_epoch_end = CutOff().on_train_epoch_end
    first, _, _ = fit(tmp_path / "cut", cut, 4)
    assert len(first) == 6
    second, trainer, _ = fit(tmp_path / "cut", scheduler(), 4, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert len(second) == 6
    assert trainer.global_step == 12
    assert first | second == whole
    expected = [
        scheduler().theta_at(i // 3 if interval == "epoch" else i, 4 if interval == "epoch" else 12) for i in range(12)
    ]
    assert [theta for thetas in whole.values() for theta in thetas] == pytest.approx(expected)


def test_logs_theta_of_each_stage(tmp_path):
    fit(tmp_path, ThetaScheduler("linear", theta=0.1, end=0.5, interval="step"), 1)
    text = next(tmp_path.glob("**/metrics.csv")).read_text()
    assert "theta/stage0" in text.splitlines()[0]
    assert "theta/stage1" in text.splitlines()[0]


def test_pattern_moves_what_it_names(tmp_path):
    _, _, task = fit(tmp_path, ThetaScheduler("piecewise", points={0: 0.7}, pattern="*stages.1.*"), 1)
    thetas = [m.theta.item() for m in task.modules() if isinstance(m, Projection)]
    assert thetas == pytest.approx([0.25, 0.7])


def test_the_checkpoint_holds_the_theta(tmp_path):
    fit(tmp_path, ThetaScheduler("linear", theta=0.1, end=0.5), 3)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["network_arguments"]["theta"] == pytest.approx(0.5), "and says so, also on the card"
    state = content["state_dict"]
    assert all(v.item() == pytest.approx(0.5) for k, v in state.items() if k.endswith("projection.theta"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "exponential", "theta": 0.1}, "theta schedule 'exponential'.*cosine, linear, piecewise"),
        ({"schedule": "linear", "theta": 0.1}, "end is missing"),
        ({"schedule": "step", "theta": 0.1, "gamma": 0.5, "every": 1, "end": 0.3}, "end is of no use, but is 0.3"),
        ({"schedule": "linear", "theta": 1.5, "end": 0.1}, r"theta .* \[0, 1\], not 1.5"),
        ({"schedule": "linear", "theta": float("nan"), "end": 0.1}, "not nan"),
        ({"schedule": "cosine", "theta": 0.1, "end": -0.1}, "end .* not -0.1"),
        ({"schedule": "step", "theta": 0.1, "gamma": 2.0, "every": 1}, "gamma .* not 2.0"),
        ({"schedule": "step", "theta": 0.1, "gamma": 0.5, "every": 0}, "every .* not 0"),
        ({"schedule": "piecewise", "points": {}}, "points is missing"),
        ({"schedule": "piecewise", "points": {0: 1.1}}, "points .* not 1.1"),
        ({"schedule": "piecewise", "points": {-1: 0.1}}, "points .* not -1"),
        ({"schedule": "linear", "theta": 0.1, "end": 0.2, "interval": "batch"}, "interval .*'batch'.*epoch, step"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        ThetaScheduler(**kwargs)


def linear(**kwargs):
    return ThetaScheduler("linear", theta=0.3, end=0.5, **kwargs)


def test_refuses_learnt_thetas_and_patterns_without_a_match(tmp_path):
    with pytest.raises(ConfigurationError, match="learns its theta"):
        fit(tmp_path, linear(), 1, learn_theta=True)
    with pytest.raises(ConfigurationError, match="has no theta, which a schedule cannot move"):
        fit(tmp_path, linear(), 1, projection="mean")
    with pytest.raises(ConfigurationError, match=r"matches pattern 'stages\.9\.\*'.*'network.stages.0"):
        fit(tmp_path, linear(pattern="stages.9.*"), 1)


def test_does_nothing_where_nothing_is_projected_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=1, callbacks=[linear()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    task = SpikingClassifier("test_resnet", 10, 1)
    trainer.fit(task, datamodule=Digits(batch_size=16, num_workers=0, image_size=16))
    assert caplog.text.count("ThetaScheduler does nothing") == 1
