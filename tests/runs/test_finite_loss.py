"""A loss that is not finite stops the training before it reaches the weights, and can be repeated."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import EMA
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.errors import TrainingError
from lightning_msnn.runs import AtomicCheckpointIO, FiniteLoss, LastCheckpoint
from lightning_msnn.runs.random_state import set_generators
from lightning_msnn.tasks import SpikingClassifier

CPU = torch.device("cpu")


class Break(pl.Callback):
    """Break something at a step."""

    def __init__(self, what: str, step: int = 3) -> None:
        self.what = what
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        self.weights = {name: value.clone() for name, value in module.named_parameters()}
        with torch.no_grad():
            if self.what == "batch":
                batch[0][0, 0, 0, 0] = torch.nan
            elif self.what == "weight":
                module.network.head.fc.weight[0, 0] = torch.inf
            elif self.what == "behind spikes":
                module.network.stages[1].blocks[0].mixer.synapse2.conv.weight[0, 0, 0, 0] = torch.inf
            elif self.what == "output":
                module.network.norm.register_forward_hook(lambda *args: args[2] / 0)
            elif self.what == "loss":
                module.loss = lambda logits, targets: logits.sum() * torch.inf


def fit(folder: Path, broken: Break, **options: Any) -> tuple[SpikingClassifier, str]:
    pl.seed_everything(0, verbose=False)
    task = SpikingClassifier(in_chans=1, mixup=0.5, network_kwargs={"drop_path_rate": 0.2})
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, max_epochs=1, limit_train_batches=6,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[broken, FiniteLoss()], **options,
    )  # fmt: skip
    with pytest.raises(TrainingError) as error:
        trainer.fit(task, datamodule=Digits(batch_size=16))
    return task, str(error.value)


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("batch", "from the batch itself on"),
        ("weight", "from layer 'network.head.fc', whose weight has been so since before this step"),
        ("output", "from layer 'network.norm' on"),
        ("loss", "from the loss function on"),
    ],
)
def test_names_batch_layer_and_step_and_stops_before_the_weights(tmp_path: Path, what: str, where: str) -> None:
    broken = Break(what)
    task, message = fit(tmp_path, broken)
    assert message.startswith("the loss is not finite at step 3 (epoch 0, batch 3), ")
    assert where in message
    assert "step_3_rank_0.ckpt" in message
    assert "\n" not in message
    after = dict(task.named_parameters())
    changed = [name for name, value in broken.weights.items() if not torch.equal(after[name], value)]
    assert changed == (["network.head.fc.weight"] if what == "weight" else [])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_is_saved_repeats_the_step(tmp_path: Path, precision: Any) -> None:
    fit(tmp_path, Break("weight"), precision=precision)
    saved = torch.load(tmp_path / "non_finite" / "step_3_rank_0.ckpt", weights_only=True)
    assert (saved["step"], saved["epoch"], saved["batch_idx"]) == (3, 0, 3)
    task = SpikingClassifier(in_chans=1, mixup=0.5, network_kwargs={"drop_path_rate": 0.2})
    task.load_state_dict(saved["state_dict"])
    images, targets = saved["batch"]
    set_generators(saved["generators"], CPU)
    mixed, mixed_targets = task.mix(images, targets)  # type: ignore[misc]
    assert not task.loss(task(mixed), mixed_targets).isfinite()
    set_generators(saved["generators"], CPU)
    assert torch.equal(task.mix(images, targets)[0], mixed), "mixing draws again what it drew"  # type: ignore[misc]


def test_what_spikes_hide_from_the_loss_is_found_one_step_later(tmp_path: Path) -> None:
    _, message = fit(tmp_path, Break("behind spikes"))
    assert "at step 4 (epoch 0, batch 4)" in message
    assert "whose weight has been so since before this step" in message


def test_accumulated_batches(tmp_path: Path) -> None:
    _, message = fit(tmp_path, Break("batch", step=1), accumulate_grad_batches=2)
    assert "at step 1 (epoch 0, batch 2)" in message


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "non_finite").write_text("")
    _, message = fit(tmp_path, Break("batch"))
    assert "could not be written" in message


def test_a_fast_dev_run_keeps_no_file(tmp_path: Path) -> None:
    _, message = fit(tmp_path, Break("loss", step=0), fast_dev_run=2)
    assert message.endswith("from the loss function on: this run keeps no files")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-msnn"])
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    args = ["fit", "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--model.lr", "1e38", "--trainer.max_epochs", "3", "--run.every_n_steps", "1"])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("lightning-msnn: error: the loss is not finite at step ")
    run = tmp_path / "runs" / "quickstart" / "version_0"
    assert list((run / "non_finite").glob("step_*_rank_0.ckpt"))
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 1, "the last checkpoint stays"


class BadGradient(pl.Callback):
    """Give one step a finite loss and a gradient that is not a number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == self.step:
            next(module.parameters()).grad.fill_(torch.nan)


@pytest.mark.filterwarnings("ignore:val/loss is nan")
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, every: int, average: bool) -> None:
    pl.seed_everything(0, verbose=False)
    best = pl.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=3, limit_train_batches=3,
        limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        callbacks=[*([EMA(0.5)] if average else []), BadGradient(5), FiniteLoss(), best, LastCheckpoint(every)],
    )  # fmt: skip
    # The sixth step is the last of the second epoch: the validation behind it sees finite losses, as zeros do.
    with pytest.raises(TrainingError, match=r"is not finite after step 6 \(epoch 1\): it is not saved"):
        trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits(batch_size=16))
    for path, step in ((tmp_path / "checkpoints" / "last.ckpt", 5 if every else 3), (tmp_path / "best.ckpt", 3)):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == step
        assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_finite_training_is_left_alone(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, max_epochs=1, limit_train_batches=3,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[FiniteLoss()],
    )  # fmt: skip
    trainer.fit(SpikingClassifier(in_chans=1), datamodule=Digits(batch_size=16))
    assert trainer.global_step == 3
    assert not list(tmp_path.iterdir())
