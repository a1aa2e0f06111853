"""What annealed spikes and a teacher add to a training step, in one run.

    python -m benchmarks.recipe_cost [--rounds 100]

In each round every contender takes one step of ``msnn_resnet12``, bf16, batch 128, 32x32, and the annealed one a pass
for the statistics of exact spikes, of which a thirty-second is counted, as
:class:`lightning_msnn.callbacks.SpikeAnnealing` takes one in 32 steps. The teacher is the network's trained ReLU twin,
``msnn_resnet12.c100_relu``. Prints the median over the rounds of what each adds to the plain step, and the quartiles,
and appends them to ``benchmarks/results/recipe_cost.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch.nn import functional as F

from benchmarks.contenders import CLASSES, DEVICE, SHIPPED, images, make
from benchmarks.speed import RESULTS, processor
from benchmarks.trainings import append
from lightning_msnn import __version__
from lightning_msnn.callbacks import SpikeAnnealing
from lightning_msnn.nn import set_annealing
from lightning_msnn.tasks import distillation_loss
from lightning_msnn.tasks.distillation import Teacher

EPOCH = 45_000  # images


def contender(share: float | None, taught: bool, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a function that takes a step, and one that takes a pass for statistics."""
    model, x = make(SHIPPED, "msnn_resnet12").train(), images(batch)
    teacher = Teacher("msnn_resnet12.c100_relu", CLASSES, x.shape[1]) if taught else None
    if teacher is not None:
        teacher.prepare(DEVICE, torch.bfloat16)
    targets = torch.arange(batch, device=DEVICE) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        set_annealing(model, share)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), targets)
        if teacher is not None:
            loss = torch.lerp(loss, distillation_loss(logits, teacher(x), 2.0), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def statistics_of_exact_spikes() -> None:
        set_annealing(model, None)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model(x)

    return step, statistics_of_exact_spikes


def seconds(call: Callable[[], None]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    plain, _ = contender(None, False, given.batch)
    annealed, pass_ = contender(0.5, False, given.batch)
    taught, _ = contender(None, True, given.batch)
    calls = {"plain": plain, "annealed": annealed, "pass": pass_, "taught": taught}
    share = 1 / SpikeAnnealing.every(1, EPOCH // given.batch)
    added: dict[str, list[float]] = {"annealed": [], "taught": []}
    for i in range(given.rounds + 3):
        took = {name: seconds(calls[name]) for name in list(calls)[:: 1 if i % 2 else -1]}
        added["annealed"].append((took["annealed"] + share * took["pass"]) / took["plain"] - 1)
        added["taught"].append(took["taught"] / took["plain"] - 1)
    for name, values in added.items():
        low, middle, high = statistics.quantiles([100 * x for x in values[3:]], n=4)
        print(f"{name}: {middle:+.1f} % of a step (quartiles {low:+.1f} and {high:+.1f})")
        cpu = f"{torch.get_num_threads()} cores of {processor()[0]}"
        row = {
            "what": name, "added_percent": f"{middle:.1f}", "q1": f"{low:.1f}", "q3": f"{high:.1f}",
            "rounds": given.rounds, "batch": given.batch,
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
            "versions": f"torch {torch.__version__}, lightning_msnn {__version__}", "date": date.today().isoformat(),
        }  # fmt: skip
        append(RESULTS / "recipe_cost.csv", row)


if __name__ == "__main__":
    main()
