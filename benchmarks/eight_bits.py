"""What weights in 8 bits cost: top-1 of zoo entries on their whole test set, with synapses in float32 and in int8.

    python -m benchmarks.eight_bits msnn_vit12_tiny.digits
    python -m benchmarks.eight_bits msnn_resnet12_tiny.fsdd --data data/spoken_digits --seconds 60  # then what is left

The file is that of ``lightning-msnn export --to weights --dtype int8``, read back. Each entry has a line in
``results/eight_bits.csv``; one that is not complete is gone on with, one that is complete is made anew. An entry whose
file has 8 bits already is refused: what can be compared is ``zoo export --dtype float32`` of its checkpoint, in a
folder that ``LIGHTNING_MSNN_ZOO`` names.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainings import read
from lightning_msnn import zoo
from lightning_msnn.export import export, load_weights

RESULTS = Path(__file__).resolve().parent / "results" / "eight_bits.csv"
COUNTS = ("images", "right_float32", "right_int8", "other_class", "won", "lost")


def batches(data: Any, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of test images with their classes, from an image on."""
    seen = 0
    for images, targets in data.test_dataloader():
        if seen >= first:
            yield data.on_after_batch_transfer((images, targets), 0)
        seen += len(targets)


@torch.inference_mode()
def measure(name: str, root: str | None, counts: dict[str, int], seconds: float) -> dict[str, Any]:
    """Compare an entry in float32 and in 8 bits on the images that are not counted yet, for so many seconds."""
    begun = time.perf_counter()
    data = zoo.test_data(zoo.info(name), root, 250)
    with tempfile.TemporaryDirectory() as folder:
        report = export(name, to="weights", dtype="int8", out=Path(folder) / "x.safetensors")
        networks = [zoo.load(name), load_weights(report.path)]
    for images, targets in batches(data, counts["images"]):
        ours, theirs = (network(images).argmax(1) for network in networks)
        right, right_8 = ours == targets, theirs == targets
        found = (targets == targets, right, right_8, ours != theirs, right_8 & ~right, right & ~right_8)
        for key, value in zip(COUNTS, found, strict=True):
            counts[key] += int(value.sum())
        if time.perf_counter() - begun > seconds:
            break
    total = counts["images"]
    return {
        "entry": name,
        "of": zoo.info(name)["top1_images"],
        **counts,
        "top1_float32": f"{100 * counts['right_float32'] / total:.2f}",
        "top1_int8": f"{100 * counts['right_int8'] / total:.2f}",
        "loss_points": f"{100 * (counts['lost'] - counts['won']) / total:.2f}",
        "standard_error": f"{100 * (counts['lost'] + counts['won']) ** 0.5 / total:.2f}",
        "MB": f"{report.size / 2**20:.1f}",
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="+")
    parser.add_argument("--data", help="folder of the data set (digits need none)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop, for each entry")
    given = parser.parse_args()
    names = [zoo.resolve(name) for name in given.entry]
    if there := [name for name in names if zoo.info(name)["weights"] == "int8"]:
        parser.error(f"{there[0]} has 8 bits already: give an entry of its checkpoint in float32")
    for name in names:
        rows: dict[str, Any] = {row["entry"]: row for row in read(RESULTS)}
        before = rows.get(name, {})
        unfinished = before and before["images"] != before["of"]
        counts = {key: int(before[key]) if unfinished else 0 for key in COUNTS}
        rows[name] = measure(name, given.data, counts, given.seconds)
        print(*(f"{key} {value}" for key, value in rows[name].items()), sep=", ", flush=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[name], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
