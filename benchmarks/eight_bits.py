"""What weights in 8 bits cost: top-1 of two entries of one training, in float32 and in int8, on their whole test set.

    LIGHTNING_MSNN_ZOO=my_zoo python -m benchmarks.eight_bits my.wide my.narrow --data data/cifar100

``lightning_msnn.zoo export --dtype float32`` and ``--dtype int8`` make them of one checkpoint.

Writes a row of ``results/eight_bits.csv``.
"""

from __future__ import annotations

import argparse
from datetime import date

import torch

from benchmarks.common import read, write
from lightning_msnn import zoo


@torch.inference_mode()
def classes(name: str, root: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classes that an entry finds, and those of the test samples."""
    data, network = zoo.test_data(zoo.info(name), root, 250), zoo.load(name)
    batches = [data.on_after_batch_transfer(batch, 0)[:2] for batch in data.test_dataloader()]
    return torch.cat([network(images).argmax(1) for images, _ in batches]), torch.cat([y for _, y in batches])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float32", help="name of the entry in float32")
    parser.add_argument("int8", help="name of the entry in int8")
    parser.add_argument("--data", help="folder of the data set (digits need none)")
    given = parser.parse_args()
    wide, targets = classes(given.float32, given.data)
    narrow, _ = classes(given.int8, given.data)
    count, right, right_8 = len(targets), wide == targets, narrow == targets
    won, lost = int((right_8 & ~right).sum()), int((right & ~right_8).sum())
    row = {
        "entry": given.int8, "images": count, "right_float32": int(right.sum()), "right_int8": int(right_8.sum()),
        "other_class": int((wide != narrow).sum()), "won": won, "lost": lost,
        "top1_float32": f"{100 * float(right.double().mean()):.2f}",
        "top1_int8": f"{100 * float(right_8.double().mean()):.2f}", "loss_points": f"{100 * (lost - won) / count:.2f}",
        "standard_error": f"{100 * (lost + won) ** 0.5 / count:.2f}", "date": date.today(),
    }  # fmt: skip
    print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
    write("eight_bits.csv", [*(old for old in read("eight_bits.csv") if old["entry"] != given.int8), row])


if __name__ == "__main__":
    main()
