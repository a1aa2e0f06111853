"""One side of a race: makes contenders from the package in the folder it runs in, and times a turn of one when told to.

``python -m benchmarks.worker`` reads lines ``[command, arguments]`` of JSON, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightning_msnn
from benchmarks.common import timed
from benchmarks.contenders import DEVICE, images, inference, make, prepared, training_step

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
_STEPS: dict[str, Callable[[], object]] = {}


def where() -> str:
    """Return the folder of the package that contenders are made from."""
    return str(Path(lightning_msnn.__file__).resolve().parents[1])


def enter(
    contender: str, network: str, training: bool, precision: str, batch: int, size: int, **arguments: Any
) -> None:
    """Make a contender and warm it up; further arguments are the network's."""
    model, x, dtype = make(contender, network, **arguments), images(batch, size), PRECISIONS[precision]
    _STEPS[contender] = training_step(model, x, dtype) if training else inference(prepared(contender, model), x, dtype)
    turn(contender)


def leave() -> None:
    """Forget all contenders."""
    _STEPS.clear()


def turn(contender: str) -> float:
    """Return the seconds of a step: of one, or the mean of as many as fill a tenth of a second.

    One that is not timed goes before: a training does not find its caches as others have left them.
    """
    _STEPS[contender]()
    return timed(_STEPS[contender])


def rate(precision: str) -> float:
    """Return the multiply-accumulates a second of large products or convolutions, whichever has more."""
    dtype, order = PRECISIONS[precision], torch.channels_last
    a, b = (torch.randn(2048, 2048, device=DEVICE).to(dtype) for _ in range(2))
    x = torch.randn(64, 128, 32, 32, device=DEVICE).to(dtype).contiguous(memory_format=order)
    w = torch.randn(128, 128, 3, 3, device=DEVICE).to(dtype).contiguous(memory_format=order)
    work: list[tuple[Callable[[], object], int]] = [
        (lambda: torch.mm(a, b), 2048**3),
        (lambda: torch.nn.functional.conv2d(x, w, padding=1), 64 * 32 * 32 * 128 * 128 * 9),
    ]
    with torch.inference_mode():
        return max(macs / statistics.median(timed(step) for _ in range(9)) for step, macs in work)


def _memory(field: str) -> float:
    """A figure of this process in MiB; getrusage would begin at the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(contender: str, network: str, precision: str, batch: int, checkpointing: bool) -> float:
    """Return the peak memory of training in MiB, over that of this process, which has done nothing else, before it."""
    x, scratch = images(batch), torch.randn(512, 512, device=DEVICE)
    scratch @ scratch  # threads and libraries are there
    before = _memory("VmRSS")
    model = make(contender, network)
    if checkpointing:
        model.set_grad_checkpointing(True)
    step = training_step(model, x, PRECISIONS[precision])
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else _memory("VmHWM") - before


def main() -> None:
    """Do what standard input says."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where whatever else is printed goes
    commands = {command.__name__: command for command in (where, enter, leave, turn, rate, peak)}
    for line in sys.stdin:
        command, arguments = json.loads(line)
        print(json.dumps(commands[command](**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
