"""How fast inference is in 8-bit integers, and in other runtimes than torch.

    python -m benchmarks.inference integers                             # AMX, where the processor has it
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.inference integers  # AVX-512 with VNNI alone
    python -m benchmarks.inference runtimes                             # exports the entry first
    python -m benchmarks.inference report                               # the tables of docs/export.md

Contenders take turns in one process. ``integers`` compares the network in integers with itself, folded in bf16, and
with its trained ReLU baseline; ``runtimes`` compares torch, ``torch.compile`` and ONNX Runtime in float32, and times
how long a new process takes to its first logits, with nothing compiled before. Both write a file of ``results``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, fill, markdown, processor, race, read, rows_of, versions, write
from benchmarks.contenders import images
from lightning_msnn import zoo
from lightning_msnn.entries import find
from lightning_msnn.export import FORMATS, export
from lightning_msnn.kernels.layer import kernels_of

PAGE = ROOT / "docs" / "export.md"
FLAGS = {"amx": "amx_bf16", "avx512_core_bf16": "avx512_bf16"}
ISAS = {"amx": "with AMX", "avx512_core_bf16": "AVX-512 with VNNI alone"}
FOLDED, BASELINE, NARROW, WIDE = "folded, bf16", "ReLU baseline, folded, bf16", "integers, bf16", "integers, float32"
TORCH, COMPILED, ONNX = "torch, folded", "torch.compile", "ONNX Runtime"
Run = Callable[[Tensor], object]


def called(network: nn.Module, dtype: torch.dtype) -> Run:
    """Return what runs a network in a type."""
    network.to(dtype, memory_format=torch.channels_last)
    return lambda x: network(x.to(dtype))


def integers(name: str) -> dict[str, Run]:
    """Return the network, in integers too, with the types of its analogue parts, and its trained ReLU baseline."""
    narrow = torch.bfloat16
    return {
        FOLDED: called(zoo.load(name, fuse=True), narrow),
        BASELINE: called(zoo.load(f"{name}_relu", fuse=True), narrow),
        NARROW: called(zoo.load(name, integer=True), narrow),
        WIDE: called(zoo.load(name, integer=True), torch.float32),
    }


def runtimes(name: str, file: Path) -> dict[str, Run]:
    """Return the network in each runtime."""
    compiled = torch.compile(zoo.load(name, fuse=True), dynamic=False)
    return {
        "torch": zoo.load(name),
        TORCH: zoo.load(name, fuse=True),
        ONNX: FORMATS["onnx"].run(file),
        COMPILED: lambda x: compiled(x),
    }


_TORCH = """import torch
torch.set_grad_enabled(False)
torch.set_num_threads({threads})
from lightning_msnn import zoo
model = zoo.load({name!r}, fuse={fuse})
"""
STARTS = {
    "torch": _TORCH.replace("{fuse}", "False") + "model(torch.zeros({size}))",
    TORCH: _TORCH.replace("{fuse}", "True") + "model(torch.zeros({size}))",
    ONNX: """import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession({file!r}, options, providers=['CPUExecutionProvider'])
session.run(None, {{'image': numpy.zeros({size}, 'float32')}})""",
    COMPILED: _TORCH.replace("{fuse}", "True") + "torch.compile(model, dynamic=False)(torch.zeros({size}))",
}
"""Runtimes, and what a new process does until its first logits."""


def start(runtime: str, name: str, file: Path) -> float:
    """Return the seconds that a new process takes from nothing to its first logits."""
    size, times = (1, *zoo.info(name)["input_size"]), []
    for _ in range(1 if runtime == COMPILED else 3):
        with tempfile.TemporaryDirectory() as cache:
            code = STARTS[runtime].format(name=name, size=size, threads=torch.get_num_threads(), file=str(file))
            begun = time.perf_counter()
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(contenders: dict[str, Run], reference: dict[str, str], place: dict[str, Any], rounds: int) -> list[Any]:
    """Return a row for each contender and size of a batch."""
    rows = []
    with torch.inference_mode():
        for batch in (1, 256):
            x = images(batch)
            steps = {name: partial(run, x) for name, run in contenders.items()}
            rows += rows_of(race(steps, rounds), place, batch, reference)
    kernels = getattr(kernels_of(images(1, 16)), "__name__", "equations").rpartition(".")[2]
    about = {
        "device": f"{torch.get_num_threads()} cores of {processor()[0]}",
        "versions": f"{versions('torch', 'onnxruntime')}, kernels: {kernels}",
        "date": date.today().isoformat(),
    }
    return [row | about for row in rows]


def table_of_integers() -> str:
    """Return the table of each processor: times as fast as the folded network and as the trained ReLU baseline."""
    lines, sources = [], []
    for isa, title in ISAS.items():
        rows = read(f"integer_{isa}.csv")
        pairs = [[row for row in rows if row["contender"] == name] for name in (FOLDED, NARROW)]
        for folded, own in zip(*pairs, strict=True):
            ratios = [
                "{:.2f} ({:.2f} to {:.2f})".format(
                    *(float(own[f"speed_relative_to_{of}_{part}"]) for part in ("median", "q1", "q3"))
                )
                for of in ("folded", "twin")
            ]
            times = [f"{float(row['ms']):.1f} ms" for row in (folded, own)]
            lines.append([title, own["batch"], *times, *ratios])
        sources += [f"`{row['network']}`, {row['device']}; {row['versions']}; {row['date']}." for row in rows]
    head = ["processor", "batch", FOLDED, NARROW, "times as fast as folded", f"as {BASELINE}"]
    return "\n".join([markdown(head, lines), "", *dict.fromkeys(sources)])


def table_of_runtimes() -> str:
    """Return the table of runtimes."""
    rows = read("runtimes_cpu.csv")
    found = {(row["contender"], row["batch"]): row for row in rows}
    lines = []
    for runtime in STARTS:
        few, many = found[runtime, "1"], found[runtime, "256"]
        rates = [
            f"{float(r['images_per_s']):.0f} ({float(r['speed_relative_to_folded_median']):.2f})" for r in (few, many)
        ]
        lines.append([runtime, *rates, f"{float(few['MB']):.0f} MB", f"{float(few['start_s']):.1f} s"])
    head = [f"`{rows[0]['entry']}` in float32", "images/s, batch 1", "images/s, batch 256", "on disk", "start-up"]
    return f"{markdown(head, lines)}\n\n{rows[0]['device']}; {rows[0]['versions']}; {rows[0]['date']}."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["integers", "runtimes", "report"])
    parser.add_argument("--entry", default="msnn_resnet12.c100")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    name = find(given.entry).name
    if given.what == "integers":
        flags = processor()[1]
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", next((k for k, flag in FLAGS.items() if flag in flags), "other"))
        references = {"folded": FOLDED, "twin": BASELINE}
        place = {"network": name, "isa": isa.lower()}
        write(f"integer_{isa.lower()}.csv", measure(integers(name), references, place, given.rounds))
    elif given.what == "runtimes":
        with tempfile.TemporaryDirectory() as folder:
            file = export(name, to="onnx", out=Path(folder) / "x.onnx").path
            starts = {runtime: start(runtime, name, file) for runtime in STARTS}
            rows = measure(runtimes(name, file), {"folded": TORCH}, {"entry": name}, given.rounds)
            own, other = ((path.stat().st_size / 2**20) for path in (ROOT / "zoo" / name / "model.safetensors", file))
        sizes = [
            {"MB": other if row["contender"] == ONNX else own, "start_s": starts[row["contender"]]} for row in rows
        ]
        write("runtimes_cpu.csv", (row | more for row, more in zip(rows, sizes, strict=True)))
    fill(PAGE, "integers", table_of_integers())
    fill(PAGE, "runtimes", table_of_runtimes())


if __name__ == "__main__":
    main()
