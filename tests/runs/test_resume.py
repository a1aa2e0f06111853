"""A training that is interrupted, wherever, ends with the weights of the one that is not."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from PIL import Image

from lightning_msnn.callbacks import EMA, Convert, EnergyTarget, Mixing, SpikeAnnealing, Teacher
from lightning_msnn.data import Digits, ImageFolder
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import AtomicCheckpointIO, LastCheckpoint, RandomState, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import fit, quiet
from tests.conftest import rest_is_slow

EPOCHS, BATCHES = 2, 6
NETWORK = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "drop_path_rate": 0.2}


class Kill(BaseException):
    """What ends a process, in place of SIGKILL."""


class KillAt(pl.Callback):
    """End the training after a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Kill


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of noise in two classes."""
    for part, number in (("train", 30), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.random.default_rng((i, part == "test", name == "cat")).integers(
                    0, 255, (20, 16, 3), np.uint8
                )
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


def digits(_: Path) -> Digits:
    return Digits(batch_size=16, policy="randaugment", crop_padding=2, border="reflect", flip="alternate")


def decoded_in_workers(images: Path) -> ImageFolder:
    return ImageFolder(
        root=str(images),
        image_size=8,
        batch_size=8,
        in_memory=False,
        num_workers=2,
        flip="alternate",
        policy="randaugment",
    )


def run(
    folder: Path,
    data: Any,
    seed: int = 3,
    kill: int | None = None,
    resume: bool = False,
    task: dict[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    share: float = 1.0,
    every: int = 2,
    plugins: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Train, and return the trainer and the end of the weights being trained."""
    pl.seed_everything(seed, verbose=False)
    given = {"network_kwargs": dict(NETWORK), **(task or {})}
    module = SpikingClassifier(num_classes=data.num_classes, in_chans=data.in_chans, **given)
    raw: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            raw[:] = [{k: v.clone() for k, v in module.state_dict().items()}]

    every_one = [*callbacks, EMA(0.9), Mixing(0.5, 0.5, share), RandomState(), Keep(), LastCheckpoint(every)]
    every_one += [] if kill is None else [KillAt(kill)]
    limits = {"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 2}
    options = {**limits, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO(), *plugins], **options}
    trainer = quiet(folder, *every_one, **options)
    last = folder / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if resume and last.exists() else None, weights_only=True)
    except Kill:
        assert kill is not None
    return trainer, raw[0] if raw else None, module


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{"val_check_interval": 3}, {"accumulate_grad_batches": 2, "max_steps": 5}])
def test_resume_is_exact(tmp_path: Path, images: Path, options: dict[str, Any]) -> None:
    """Of the weights and their average, whatever the step, the seed of the second process, and its past."""
    data = decoded_in_workers if "val_check_interval" in options else digits
    _, raw, whole = run(tmp_path / "a", data(images), **options)
    steps = EPOCHS * BATCHES // options.get("accumulate_grad_batches", 1)
    for kill in (1, steps // 2 + 1):
        resumes = (tmp_path / "b" / "checkpoints" / "last.ckpt").exists()
        run(tmp_path / "b", data(images), seed=50 if resumes else 3, kill=kill, resume=True, **options)
    trainer, again, task = run(tmp_path / "b", data(images), seed=99, resume=True, **options)
    assert trainer.global_step == min(steps, options.get("max_steps", steps))
    assert same(raw, again)
    assert same(whole.state_dict(), task.state_dict())


@pytest.mark.parametrize("kind", rest_is_slow(["muon", "a target", "converted"], ["a target"]))
def test_with_everything_at_once(tmp_path: Path, kind: str) -> None:
    """Annealing, a teacher, averaging, sizes by epoch, and mixing of a share of the batches."""

    def data() -> Digits:
        return Digits(batch_size=16, train_sizes={0: 8, 1: 12}, image_size=12, crop_padding=2)

    converted = kind == "converted"
    network = {"network": "test_resnet", "network_kwargs": {}} if converted else {}
    relu = {"network_kwargs": {**NETWORK, "spiking": False, "windows": "single"}}
    run(tmp_path / "teacher", data(), task=network or relu, max_epochs=1)
    teacher = str(tmp_path / "teacher" / "checkpoints" / "last.ckpt")
    task = {**network, "pretrained": teacher, "optimizer": "muon" if kind == "muon" else "adamw"}

    def all_of_it(folder: str, **more: Any) -> Any:
        callbacks = [*([Convert()] if converted else []), SpikeAnnealing(), Teacher(teacher)]
        callbacks += [EnergyTarget(rate=0.05)] if kind == "a target" else []
        return *run(tmp_path / folder, data(), task=task, callbacks=callbacks, share=0.5, **more), callbacks[-1]

    _, raw, whole, last = all_of_it("a")
    for seed, kill in ((3, 3), (50, 9)):
        all_of_it("b", kill=kill, resume=True, seed=seed)
    trainer, again, resumed, other = all_of_it("b", resume=True, seed=99)
    assert trainer.global_step == EPOCHS * BATCHES
    assert same(raw, again)
    assert same(whole.state_dict(), resumed.state_dict())
    assert last.state_dict() == other.state_dict()
    assert kind != "a target" or last.state_dict()["multiplier"] > 0.0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_what_came_before(images: Path, workers: int) -> None:
    def loader() -> Any:
        data = ImageFolder(root=str(images), image_size=8, batch_size=8, in_memory=False, num_workers=workers, flip=0.0)
        data.setup("fit")
        return data.train_dataloader()

    first = loader()
    state = torch.get_rng_state()
    first.sampler.set_epoch(4)
    everything = list(first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert len(everything) == 6
    second = loader()
    torch.rand(7)
    second.load_state_dict({"epoch": 4, "batches": 2})
    assert len(list(second)) == 6, "another epoch begins at its beginning"
    second.load_state_dict({"epoch": 4, "batches": 2})
    second.sampler.set_epoch(4)
    rest = iter(second)
    for images_, targets in everything[2:]:
        pixels, labels = next(rest)
        assert torch.equal(pixels, images_)
        assert torch.equal(labels, targets)
    assert second.state_dict() == {"epoch": 4, "batches": 6}
    assert next(rest, None) is None
    other = list(second)
    assert second.state_dict()["epoch"] == 5
    assert not torch.equal(other[0][0], everything[0][0])


def test_slurm_signal_saves_and_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM is a shell script here that writes down what it was asked."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "77", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "LOCALID": "0", "PROCID": "0",
             "NODEID": "0", "NODELIST": "localhost", "JOB_NAME": "train"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    class Stop(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path, digits(tmp_path), callbacks=[Stop()], every=0, plugins=[SLURMEnvironment(auto_requeue=True)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.parametrize("given", ["StochasticWeightAveraging", "overfit_batches"])
def test_what_cannot_be_resumed_exactly_is_refused(given: str, tmp_path: Path) -> None:
    checkpointing = {"enable_checkpointing": True, "max_steps": 1}
    fit(tmp_path, trainer=checkpointing)
    averaging = [StochasticWeightAveraging(0.01)] if given == "StochasticWeightAveraging" else []
    more = checkpointing | ({} if averaging else {"overfit_batches": 4})
    with pytest.raises(ConfigurationError, match=f"a training with {given} cannot be resumed exactly"):
        fit(tmp_path, LastCheckpoint(), *averaging, ckpt_path=tmp_path / "x.ckpt", epochs=2, trainer=more)
