"""Where synapses train faster by matrix products than by convolutions: the measurements behind the rule.

    python -m benchmarks.synapses                                      # AMX, where the processor has it
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.synapses  # AVX-512 alone
    python -m benchmarks.synapses --out                                # and into results/synapses_<device>.csv

Each line is a convolution of the networks at 32x32 or 48x48: milliseconds of the convolution, and how many times as
fast the product is, for the output, the gradient of the input, that of the weight, and all three; then what
:func:`lightning_msnn.nn.synapse.product_is_faster` chooses. The two take turns on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import race, write
from lightning_msnn.nn import synapse

NETWORKS = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
HEAD = ["kernel", "in", "out", "groups", "map", "batch", "precision", "conv ms", "output", "grad x", "grad w", "all"]
HEAD += ["rule"]
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

    grad = torch.randn(conv(x, w).shape).to(dtype).contiguous(memory_format=order)
    # An operator forms the gradients of all that have one, whatever is asked for.
    given = {None: (x, w), x: (x, w.detach()), w: (x.detach(), w)}
    ratios, whole = [], [0.0, 0.0]
    for wanted, pair in given.items():
        steps = [partial(form, *pair) for form in (conv, product)]
        if wanted is not None:
            steps = [partial(torch.autograd.grad, step(), wanted, grad, retain_graph=True) for step in steps]
        times = race({"conv": steps[0], "product": steps[1]}, rounds, 0.0)
        old, new = (1e3 * statistics.median(values.values()) for values in times.values())
        ratios.append(old / new)
        whole = [whole[0] + old, whole[1] + new]
    return [whole[0], *ratios, whole[0] / whole[1]]


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
    rows: list[dict[str, object]] = []
    print(device, *HEAD, sep=" | ")
    for precision, dtype in ((name, PRECISIONS[name]) for name in given.precision):
        for kernel, channels, out, groups, side in shapes():
            at = side // 2 if kernel == 2 else side
            for batch in given.batch:
                rule = synapse.product_is_faster(kernel, batch, at, at, dtype, groups > 1)
                times = measure((kernel, channels, out, groups, side), batch, dtype, given.rounds)
                place = [kernel, channels, out, groups, side, batch, precision]
                cells = [*place, *(f"{t:.2f}" for t in times), ("conv", "product")[rule]]
                rows.append(dict(zip(HEAD, cells, strict=True)))
                print(*cells, sep=" | ", flush=True)
    if given.out:
        write(f"synapses_{device}.csv", rows)


if __name__ == "__main__":
    main()
