"""What annealed spikes and a teacher add to a training step, in one run.

    python -m benchmarks.recipe_cost [--rounds 15]

Contenders take turns of 16 steps of ``msnn_resnet12``, bf16, batch 128, 32x32, so that each turn of the annealed one
has its one pass for the statistics of exact spikes, as :class:`lightning_msnn.callbacks.SpikeAnnealing` takes them. The
teacher is the network's trained ReLU twin, ``msnn_resnet12.c100_relu``. Prints the median over the rounds of what each
adds to the plain step, and the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.contenders import CLASSES, DEVICE, SHIPPED, images, make
from lightning_msnn.nn import set_annealing
from lightning_msnn.tasks import distillation_loss
from lightning_msnn.tasks.distillation import Teacher

STEPS = 16  # from one pass for statistics to the next, as the callback has them


def contender(annealed: bool, taught: bool, batch: int) -> Callable[[], None]:
    """Return a function that takes one turn."""
    model, x = make(SHIPPED, "msnn_resnet12").train(), images(batch)
    teacher = Teacher("msnn_resnet12.c100_relu", CLASSES, x.shape[1]) if taught else None
    if teacher is not None:
        teacher.prepare(DEVICE, torch.bfloat16)
    targets = torch.arange(batch, device=DEVICE) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), targets)
        if teacher is not None:
            loss = torch.lerp(loss, distillation_loss(logits, teacher(x), 2.0), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def turn() -> None:
        if annealed:
            set_annealing(model, None)
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                model(x)
        for _ in range(STEPS):
            set_annealing(model, 0.5 if annealed else None)
            step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return turn


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    flags = {"plain": (False, False), "annealed": (True, False), "taught": (False, True)}
    turns = {name: contender(*flag, given.batch) for name, flag in flags.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(given.rounds + 1):
        for name in list(turns)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            turns[name]()
            times[name].append(time.perf_counter() - start)
    plain = times.pop("plain")[1:]
    for name, values in times.items():
        added = [100 * (a / b - 1) for a, b in zip(values[1:], plain, strict=True)]
        low, middle, high = statistics.quantiles(added, n=4)
        print(f"{name}: {middle:+.1f} % of a step (quartiles {low:+.1f} and {high:+.1f})")


if __name__ == "__main__":
    main()
