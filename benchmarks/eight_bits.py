"""What weights in 8 bits cost: top-1 of zoo entries on their whole test set, with synapses in float32 and in int8.

    python -m benchmarks.eight_bits msnn_resnet12.c100 --data data/cifar100

The file is that of ``lightning-msnn export --to weights --dtype int8``, read back. Each entry adds a line to
``results/eight_bits.csv``, in place of one that it has there.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lightning_msnn import zoo
from lightning_msnn.export import export, load_weights

RESULTS = Path(__file__).resolve().parent / "results" / "eight_bits.csv"


@torch.inference_mode()
def classes(network: torch.nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classes that a network finds in test images, and the right ones."""
    found, targets = [], []
    for batch in data.test_dataloader():
        images, right = data.on_after_batch_transfer(batch, 0)
        found.append(network(images).argmax(1))
        targets.append(right)
    return torch.cat(found), torch.cat(targets)


def measure(name: str, root: str | None) -> dict[str, Any]:
    """Compare an entry in float32 and in 8 bits."""
    data = zoo.test_data(zoo.info(name), root, 250)
    with tempfile.TemporaryDirectory() as folder:
        report = export(name, to="weights", dtype="int8", out=Path(folder) / "x.safetensors", data=root)
        eighth = load_weights(report.path)
    ours, targets = classes(zoo.load(name), data)
    theirs, _ = classes(eighth, data)
    before, after = (100 * (found == targets).double().mean().item() for found in (ours, theirs))
    won, lost = ((a == targets) & (b != targets) for a, b in ((theirs, ours), (ours, theirs)))
    return {
        "entry": name,
        "images": len(targets),
        "top1_float32": f"{before:.2f}",
        "top1_int8": f"{after:.2f}",
        "loss_points": f"{before - after:.2f}",
        "standard_error": f"{100 * (won.sum() + lost.sum()).item() ** 0.5 / len(targets):.2f}",
        "other_class": int((ours != theirs).sum()),
        "MB": f"{report.size / 2**20:.1f}",
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="+")
    parser.add_argument("--data", help="folder of the data set (digits need none)")
    given = parser.parse_args()
    for name in given.entry:
        row = measure(zoo.resolve(name), given.data)
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
        rows = []
        if RESULTS.exists():
            with RESULTS.open(newline="") as file:
                rows = [line for line in csv.DictReader(file) if line["entry"] != row["entry"]]
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted([*rows, row], key=lambda line: str(line["entry"])))


if __name__ == "__main__":
    main()
