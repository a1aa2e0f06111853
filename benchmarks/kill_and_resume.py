"""Kill a training with SIGKILL at random moments, resume it each time, and compare with one that was left alone.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--folder FOLDER] [options of lightning-msnn fit ...]

A third of the kills each falls into a training step, a checkpoint's writing and a validation. After each kill every
checkpoint of the run must be readable. At the end the weights, their moving average, the optimizer and the generators
must be those of the uninterrupted training, bit for bit. Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_msnn.runs import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ("step", "write", "validation")


class Moments(Callback):
    """Write to a file, by its first letter, what the training is doing."""

    def __init__(self, file: str) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT)

    def on_train_batch_start(self, *_: Any) -> None:
        """In a step."""
        os.pwrite(self._file, b"s", 0)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """In a validation."""
        if not trainer.sanity_checking:
            os.pwrite(self._file, b"v", 0)


def command(folder: Path, options: list[str]) -> list[str]:
    """Return a training of digits that can be resumed."""
    return [
        *(sys.executable, "-m", "lightning_msnn", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")),
        *("--run.folder", str(folder), "--ckpt_path", "last", "--run.every_n_steps", "3", "--run.test", "false"),
        *("--data.policy", "randaugment", "--model.mixup", "0.5", "--model.cutmix", "0.5"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "6", "--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks+", "benchmarks.kill_and_resume.Moments", "--trainer.callbacks.file", f"{folder}/moment"),
        *options,
    ]


def start(folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start a training in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("ab")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command(folder, options), stdout=log, stderr=log, cwd=folder, env={**os.environ, "PYTHONPATH": path}
    )


def kill(process: subprocess.Popen[bytes], folder: Path, moment: str, wait: float) -> bool:
    """Kill a process in a moment, ``wait`` seconds after the training began; return False if it ended before."""
    mark = folder / "moment"
    mark.unlink(missing_ok=True)
    began = None
    while process.poll() is None:
        if began is None and mark.exists() and mark.read_bytes():
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= wait:
            writing = any(folder.rglob(".*.partial"))
            if writing if moment == "write" else mark.read_bytes() == moment[:1].encode():
                if moment != "write":
                    time.sleep(random.uniform(0.0, 0.02))
                process.kill()
                process.wait()
                return True
        time.sleep(0.0005)
    return False


def last(folder: Path) -> Path:
    """Return the last checkpoint of a training; a process that was killed before its first left an empty version."""
    return max((folder / "quickstart").glob("version_*/checkpoints/last.ckpt"))


def same(a: Any, b: Any) -> bool:
    """Compare nested values and tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare(folder: Path, kills: int, options: list[str]) -> bool:
    """Run both trainings and return whether they end alike.

    Args:
        folder: Folder for both.
        kills: Number of kills.
        options: Further options of ``lightning-msnn fit``.
    """
    if start(folder / "whole", options).wait() != 0:
        raise RuntimeError(f"the training failed: see {folder}/whole/log.txt")
    done = 0
    while done < kills:
        moment = MOMENTS[done % len(MOMENTS)]
        process = start(folder / "killed", options)
        if not kill(process, folder / "killed", moment, random.uniform(0.0, 1.0)):
            break
        done += 1
        files = list((folder / "killed").rglob("*.ckpt"))
        steps = [read_checkpoint(file)["global_step"] for file in files]  # raises if one is broken
        print(f"kill {done} in a {moment}: {len(files)} checkpoints can be read, of steps {sorted(steps)}", flush=True)
    else:
        process = start(folder / "killed", options)
    if process.wait() != 0:
        raise RuntimeError(f"the resumed training failed: see {folder}/killed/log.txt")
    if done < kills:
        print(f"the training ended after {done} kills of {kills}: give it more epochs (--trainer.max_epochs)")
        return False
    a, b = read_checkpoint(last(folder / "whole")), read_checkpoint(last(folder / "killed"))
    names = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "random_state", "global_step")
    verdict = {name: same(a[name], b[name]) for name in names}
    for name, alike in verdict.items():
        print(f"{name:20} {'identical' if alike else 'DIFFERENT'}")
    leftovers = list(last(folder / "killed").parent.glob(".*.partial"))
    print(f"{len(leftovers)} files half written")
    return all(verdict.values()) and not leftovers


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments, options = parser.parse_known_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if compare(arguments.folder or Path(temporary), arguments.kills, options) else 1)


if __name__ == "__main__":
    main()
