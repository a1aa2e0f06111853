"""Several processes for real, over gloo on the CPU."""

import csv
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_msnn.data.datasets import ShardSampler, even_batch_size
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier
from tests.conftest import ROOT
from tests.distributed.worker import main

HERE = Path(__file__).parent
PROCESSES = (1, 2)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 images to test and 35 to validate: no number of processes or batch size divides both."""
    root = tmp_path_factory.mktemp("images")
    for part, numbers in (("train", (34, 33, 33)), ("test", (22, 22, 21))):
        for label, number in enumerate(numbers):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for i in range(number):
                generator = np.random.default_rng((label, i, part == "test"))
                Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process has after evaluation and training, by their number."""
    results = {}
    for devices in PROCESSES:
        out = tmp_path_factory.mktemp(f"out{devices}")
        if devices == 1:
            main(str(images), str(out), 1)
        else:
            done = python("-m", "tests.distributed.worker", str(images), str(out), str(devices), cwd=ROOT)
            assert done.returncode == 0, done.stderr[-3000:]
        results[devices] = [torch.load(out / f"rank_{rank}.pt") for rank in range(devices)]
    return results


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_are_those_of_one_process(runs: Any, stage: str) -> None:
    """Counts to the last digit, on every process; a loss to that of float32, whose sums in a layer go by batch size."""
    expected = runs[1][0][stage]
    assert len(expected) == 3
    assert 0 < expected[f"{stage.removesuffix('idate')}/top1"] < 1
    for rank in runs[2]:
        assert rank[stage].keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("loss"):
                np.testing.assert_array_max_ulp(np.float32(rank[stage][name]), np.float32(value), 4)
            else:
                assert rank[stage][name] == value


def test_processes_agree_after_training(runs: Any) -> None:
    """What they measure is of all their images, so that an excess over the target has the same weight, and one."""
    first, other = runs[2]
    for key in ("keys", "fit", "target"):
        assert other[key] == first[key]
    assert first["target"]["multiplier"] > 0.0
    assert first["target"]["counted"]["rate"] > 0.0
    assert other["weights"].keys() == first["weights"].keys()
    assert all(torch.equal(other["weights"][name], value) for name, value in first["weights"].items())


def test_random_numbers_differ_by_process(runs: Any) -> None:
    for step in zip(*(rank["drawn"] for rank in runs[2]), strict=True):
        for numbers in zip(*step, strict=True):  # of torch, of Python, of NumPy
            assert len(set(numbers)) == 2


@pytest.mark.slow
def test_fit_and_test_by_torchrun(tmp_path: Path) -> None:
    """Both processes leave one run, which one process tests alike."""
    done = python(
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"),
        *("127.0.0.1:0", "-m", "lightning_msnn", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")),
        *("--config", "trainer/ddp", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "2", "--trainer.sync_batchnorm", "false", "--trainer.max_epochs", "1"),
        *("--trainer.limit_train_batches", "2", "--run.monitors", "false", "--trainer.enable_progress_bar", "false"),
        *("--trainer.log_every_n_steps", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "runs" / "quickstart").iterdir()] == ["version_0"]
    run = tmp_path / "runs" / "quickstart" / "version_0"
    assert len(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["random_state"]) == 2
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["train/lr"]) for row in rows if row.get("train/lr")]
    assert max(rates) == pytest.approx(0.004)
    (ours,) = [float(row["test/top1"]) for row in rows if row.get("test/top1")]
    one = python(
        *("-m", "lightning_msnn", "test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")),
        *("--trainer.devices", "1", "--trainer.accelerator", "cpu", "--run.monitors", "false"),
        *("--trainer.default_root_dir", "alone"),
        cwd=tmp_path,
    )
    assert one.returncode == 0, one.stderr[-3000:]
    with next((tmp_path / "alone").rglob("metrics.csv")).open() as file:
        assert [float(row["test/top1"]) for row in csv.DictReader(file)] == [ours]


@pytest.mark.slow
def test_wrong_data_stops_every_process(tmp_path: Path) -> None:
    """An error is one sentence and an end, not a wait."""
    done = python(
        *("-m", "lightning_msnn", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.lr", "1e38"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--run.test", "false"),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "the loss is not finite at step" in done.stderr


@pytest.mark.slow
def test_sharded_weights_decay_as_whole_ones(tmp_path: Path) -> None:
    """FSDP makes vectors of all parameters, also of those that decay."""
    done = python(str(HERE / "sharded.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    task = SpikingClassifier()
    parameters = dict(task.network.named_parameters())
    whole = [sum(parameters[name].numel() for name in group["params"]) for group in task._groups]
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    assert all(rank["dimensions"] == [1] for rank in ranks)
    assert [sum(sizes) for sizes in zip(*(rank["sizes"] for rank in ranks), strict=True)] == whole


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("size", [5, 31, 32])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_every_image_once_and_as_many_batches(processes: int, size: int, batch_size: int) -> None:
    dataset = list(range(size))
    samplers = [ShardSampler(dataset, processes, rank, False, 0) for rank in range(processes)]  # type: ignore[arg-type]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(chain(*shares)) == dataset
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    even = even_batch_size(batch_size, size, processes)
    assert len({-(-len(share) // even) for share in shares}) == 1


@pytest.mark.parametrize("processes", [1, 3])
def test_training_order(processes: int) -> None:
    dataset = list(range(32))

    def order(epoch: int, seed: int = 0) -> list[int]:
        samplers = [ShardSampler(dataset, processes, rank, True, seed) for rank in range(processes)]  # type: ignore[arg-type]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return list(chain(*samplers))

    assert set(order(0)) == set(dataset)
    assert order(0) == order(0)
    assert order(0) != order(1) != order(1, seed=1)


def test_fewer_images_than_processes() -> None:
    with pytest.raises(ConfigurationError, match="3 processes cannot share 2 images: use at most 2 devices"):
        ShardSampler([0, 1], 3, 0, False, 0)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["first", "second"])
def test_sigterm_stops_every_process_between_two_steps(tmp_path: Path, target: str) -> None:
    """Whichever of the two is told: both save, end and say so, and the training resumes."""
    options = [
        *("-m", "lightning_msnn", "fit", "--model.in_chans", "1", "--data.batch_size", "16"),
        *("--trainer.logger", "false"),
        *("--model.network_kwargs", "{depths: [1, 1, 1, 1], widths: [8, 8, 8, 8]}", "--run.test", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--trainer.enable_progress_bar", "false", "--trainer.accumulate_grad_batches", "3", "--ckpt_path", "last"),
        *("--run.name", "msnn", "--model.schedule", "constant"),
        *("--trainer.limit_train_batches", "31", "--trainer.limit_val_batches", "1"),
        *("--trainer.callbacks+", "tests.distributed.terminate.Terminate", "--trainer.callbacks.rank"),
    ]
    done = python(*options, {"first": "0", "second": "1"}[target], "--trainer.max_epochs", "500", cwd=tmp_path)
    assert done.returncode == 143, done.stderr[-3000:]
    last = tmp_path / "runs" / "msnn" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4, "batch 10 is the second of the three of a step"
    again = python(*options, "-1", "--trainer.max_epochs", "1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert torch.load(last, weights_only=True)["global_step"] == 11
    assert [path.name for path in (tmp_path / "runs" / "msnn").iterdir()] == ["version_0"]
