"""Where synapses train faster by matrix products than by convolutions: the measurements behind the rule.

    python -m benchmarks.synapses                                      # AMX, where the processor has it
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.synapses  # AVX-512 alone
    python -m benchmarks.synapses --out                                # and into results/synapses_<device>.csv

Each line is a convolution of the networks at 32x32 or 48x48: milliseconds of the convolution, and how many times as
fast the product is, for the output, the gradient of the input, that of the weight, and all three; then what
:func:`lightning_msnn.nn.synapse.product_is_faster` chooses. The two take turns, timed by the processor time of one
thread, which other work on the machine hardly moves.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from lightning_msnn.nn import synapse

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
HEAD = ["kernel", "in", "out", "groups", "map", "batch", "precision", "conv ms", "output", "grad x", "grad w", "all"]
PRODUCTS = {1: synapse._pointwise, 2: synapse._patches, 3: synapse._centred}
Shape = tuple[int, int, int, int, int]
"""Side of the kernel, channels in and out, groups, side of the input."""


def shapes() -> list[Shape]:
    """Convolutions of the networks at two sizes, but for the stem's, which has no product."""
    found: set[Shape] = set()

    def note(conv: nn.Conv2d, given: tuple[Tensor], _: Tensor) -> None:
        found.add((conv.kernel_size[0], conv.in_channels, conv.out_channels, conv.groups, given[0].shape[2]))

    for name in NETWORKS:
        model = timm.create_model(name).eval()
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and conv.in_channels > 3:
                conv.register_forward_hook(note)
        for size in (32, 48):
            model(torch.zeros(1, 3, size, size))
    return sorted(found)


def race(steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Let steps take turns; return the median milliseconds of each."""
    times: list[list[float]] = [[] for _ in steps]
    for i in range(rounds + 1):
        for k in range(len(steps))[:: 1 if i % 2 else -1]:
            start = time.thread_time()
            steps[k]()
            times[k].append(time.thread_time() - start)
    return [statistics.median(each[1:]) * 1e3 for each in times]


def measure(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """Return milliseconds of the convolution, and its time over that of the product by part and in all."""
    kernel, channels, out, groups, side = shape
    order, (stride, padding) = torch.channels_last, (2, 0) if kernel == 2 else (1, kernel // 2)
    x = torch.randn(batch, channels, side, side).to(dtype).contiguous(memory_format=order).requires_grad_()
    w = torch.randn(out, channels // groups, kernel, kernel).to(dtype).contiguous(memory_format=order).requires_grad_()

    def conv(x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.conv2d(x, w, None, stride, padding, 1, groups)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return PRODUCTS[kernel](x, w, None)

    forms = [partial(form, x, w) for form in (conv, product)]
    grad = torch.randn(forms[0]().shape).to(dtype).contiguous(memory_format=order)
    # An operator forms the gradients of all that have one, whatever is asked for.
    alone = ((x, (x, w.detach())), (w, (x.detach(), w)))
    gradients = [
        [partial(torch.autograd.grad, form(*given), wanted, grad, retain_graph=True) for form in (conv, product)]
        for wanted, given in alone
    ]
    parts = [race(steps, rounds) for steps in (forms, *gradients)]
    parts.append([sum(each) for each in zip(*parts, strict=True)])
    return [parts[-1][0], *(old / new for old, new in parts)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", action="store_true", help="write a CSV file too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = os.environ.get("ONEDNN_MAX_CPU_ISA", "cpu").lower()
    rows: list[list[object]] = [[*HEAD, "rule"]]
    print(device, *rows[0], sep=" | ")
    for precision, dtype in ((name, PRECISIONS[name]) for name in given.precision):
        for kernel, channels, out, groups, side in shapes():
            at = side // 2 if kernel == 2 else side
            for batch in given.batch:
                rule = synapse.product_is_faster(kernel, batch, at, at, dtype, groups > 1)
                times = measure((kernel, channels, out, groups, side), batch, dtype, given.rounds)
                place = [kernel, channels, out, groups, side, batch, precision]
                rows.append([*place, *(f"{t:.2f}" for t in times), ("conv", "product")[rule]])
                print(*rows[-1], sep=" | ", flush=True)
    if given.out:
        with (RESULTS / f"synapses_{device}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
