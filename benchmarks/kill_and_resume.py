"""Kill trainings with SIGKILL at random moments, resume them each time, and compare with those that were left alone.

    python benchmarks/kill_and_resume.py [--kills 40] [--seed 0] [--only NAME ...]

Each pair of options is trained once as a whole and once with its share of the kills, a third of which each fall into a
training step, a checkpoint's writing and a validation. After each kill every checkpoint of the run must be readable. At
the end the weights, their moving average, the optimizer and the generators must be those of the uninterrupted training,
bit for bit. Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_msnn.cli import main as train
from lightning_msnn.runs import read_checkpoint

MOMENTS = ("step", "write", "validation")
BATCHES = 11  # of an epoch: neither 2 nor 3 divides it

ACCUMULATE = ("--trainer.accumulate_grad_batches", "2")
VALIDATE = ("--trainer.val_check_interval", "3")
EVERY = ("--run.every_n_steps", "1")
EVERY_THIRD = ("--run.every_n_steps", "3")
AVERAGE = ("--trainer.callbacks+", "lightning_msnn.callbacks.EMA", "--trainer.callbacks.decay", "0.9")
MIX = (
    *("--trainer.callbacks+", "lightning_msnn.callbacks.Mixing", "--trainer.callbacks.mixup", "0.5"),
    *("--trainer.callbacks.share", "1.0"),
)
GROW = ("--data.train_sizes", "{0: 8, 1: 12}", "--data.image_size", "12")
SMALL = "depths: [1, 1, 1, 1], widths: [8, 8, 8, 8]"
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
PAIRS: dict[str, tuple[str, ...]] = {
    "accumulation, val_check_interval": (*ACCUMULATE, *VALIDATE),
    "accumulation, every_n_steps": (*ACCUMULATE, *EVERY),
    "val_check_interval, every_n_steps": (*VALIDATE, *EVERY_THIRD),
    "val_check_interval, EMA": (*VALIDATE, *AVERAGE),
    "accumulation, EMA": (*ACCUMULATE, *AVERAGE, *EVERY_THIRD),
    "progressive sizes, every_n_steps": (*GROW, *EVERY_THIRD),
    "progressive sizes, mixup": (*GROW, *MIX, *VALIDATE),
    "mixup, EMA": (*MIX, *AVERAGE, *EVERY_THIRD),
    "two processes, every_n_steps": (*TWO, *EVERY_THIRD),
    "two processes, accumulation": (*TWO, *ACCUMULATE, *VALIDATE, *AVERAGE),
}


class Moments(Callback):
    """Write to a file how many batches this process has begun, and by a letter what it is doing."""

    def __init__(self, file: str) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT)
        self._begun = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """In a step."""
        self._begun += 1
        os.pwrite(self._file, b"%04ds" % self._begun, 0)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """In a validation."""
        if not trainer.sanity_checking:
            os.pwrite(self._file, b"%04dv" % self._begun, 0)


def command(folder: Path, options: tuple[str, ...]) -> list[str]:
    """Return a training of digits that can be resumed."""
    return [
        *("fit", "--trainer.default_root_dir", str(folder), "--run.name", "run"),
        *("--run.test", "false", "--ckpt_path", "last"),
        *("--model.in_chans", "1", "--model.network_kwargs", f"{{{SMALL}}}"),
        *("--data.batch_size", "16", "--data.policy", "randaugment", "--trainer.limit_train_batches", str(BATCHES)),
        *("--trainer.limit_val_batches", "3", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "3"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
        *("--trainer.enable_model_summary", "false"),
        *("--trainer.callbacks+", "benchmarks.kill_and_resume.Moments", "--trainer.callbacks.file", f"{folder}/moment"),
        *options,
    ]


def start(folder: Path, options: tuple[str, ...]) -> int:
    """Start a training, and return the number of its process and of its group.

    The processes are forks of this one, so that nothing is imported again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if process := os.fork():
        return process
    os.setsid()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        if "ddp" in options:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            rank_zero_only.rank = 0 if os.fork() else 1
            os.environ |= {"LOCAL_RANK": str(rank_zero_only.rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        replace = Path.replace

        def slow(self: Path, target: Path) -> Path:
            time.sleep(0.02)  # else a small file is hardly ever seen before it has its name
            return replace(self, target)

        Path.replace = slow  # type: ignore[method-assign,assignment]
        sys.argv = ["lightning-msnn"]
        os.chdir(folder)
        train(command(folder, options))
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill(process: int, folder: Path, moment: str, batches: int) -> bool:
    """Kill a training in a moment once so many batches have begun; return False if it ended before."""
    mark = folder / "moment"
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        said = mark.read_bytes() if mark.exists() else b""
        if len(said) == 5 and int(said[:4]) >= batches:
            writing = any(folder.rglob(".*.partial"))
            if writing if moment == "write" else said[4:] == moment[:1].encode():
                if moment != "write":
                    time.sleep(random.uniform(0.0, 0.02))
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return True
        time.sleep(0.0005)
    return False


def finish(folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Train to the end, and return the last checkpoint; a process killed before its first left an empty version."""
    if os.waitpid(start(folder, options), 0)[1] != 0:
        raise RuntimeError(f"the training failed: {(folder / 'log.txt').read_text()[-3000:]}")
    return read_checkpoint(max((folder / "run").glob("version_*/checkpoints/last.ckpt")))


def same(a: Any, b: Any) -> bool:
    """Compare nested values and tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare(folder: Path, kills: int, options: tuple[str, ...], moments: Any) -> bool:
    """Train with and without kills, which fall into the given moments in turn; return whether both end alike."""
    whole, killed, done = finish(folder / "whole", options), folder / "killed", 0
    while done < kills:
        for file in (killed / "moment", *killed.rglob(".*.partial")):
            file.unlink(missing_ok=True)
        process, moment, batches = start(killed, options), next(moments), random.randint(1, BATCHES + 2)
        if not kill(process, killed, moment, batches):
            print(f"    the training ended before it could be killed in a {moment}: once more from the beginning")
            for file in killed.rglob("last.ckpt"):
                file.unlink()
            continue
        done += 1
        steps = [read_checkpoint(file)["global_step"] for file in killed.rglob("*.ckpt")]  # raises if one is broken
        print(f"    killed in a {moment}: checkpoints of steps {sorted(steps)} can be read", flush=True)
    resumed = finish(killed, options)
    names = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "random_state", "global_step")
    different = [name for name in names if not same(whole.get(name), resumed.get(name))]
    print(f"    {', '.join(different)} DIFFERENT" if different else "    identical", flush=True)
    return not different


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="kills of all pairs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PAIRS, nargs="+", default=list(PAIRS), metavar="NAME")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    moments, verdicts, begun = cycle(MOMENTS), {}, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for index, name in enumerate(arguments.only):
            share = arguments.kills // len(arguments.only) + (index < arguments.kills % len(arguments.only))
            print(name, flush=True)
            verdicts[name] = compare(Path(temporary).resolve() / str(index), share, PAIRS[name], moments)
    alike = sum(verdicts.values())
    print(f"{arguments.kills} kills, {alike} of {len(verdicts)} pairs identical, {time.monotonic() - begun:.0f} s")
    sys.exit(0 if alike == len(verdicts) else 1)


if __name__ == "__main__":
    # The trainings name the callback by this module.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
