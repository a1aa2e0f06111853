"""What runs where: a zoo entry in torch, compiled, in ONNX Runtime and by AOTInductor, in float32, in one run.

    python -m benchmarks.runtimes msnn_resnet12.c100 --files FOLDER            # writes what is exported, and measures
    python -m benchmarks.runtimes msnn_resnet12.c100 --files FOLDER --prepare  # writes it alone, minutes of compilers
    python -m benchmarks.runtimes report                                       # the table of docs/export.md

Runtimes take turns, in alternating order; an image rate is the median over the rounds, and a speed is the median of
the ratio within a round to the folded network in torch. Start-up is the time that a new process takes from nothing to
its first logits, with nothing compiled before; what ``torch.compile`` has compiled then is kept in the folder for the
race. Writes ``results/runtimes_cpu.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import fill
from benchmarks.speed import PAUSE, processor, shown
from benchmarks.worker import _timed
from lightning_msnn import __version__, zoo
from lightning_msnn.entries import WEIGHTS_FILE, find
from lightning_msnn.export import FORMATS, export

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "runtimes_cpu.csv", HERE.parent / "docs" / "export.md"
BATCHES = (1, 256)
FOLDED = "torch, folded"
CACHE = "TORCHINDUCTOR_CACHE_DIR"
Run = Callable[[torch.Tensor], object]
WRITTEN = {"ONNX Runtime": "onnx", "AOTInductor": "aoti"}

_TORCH = "import torch; torch.set_grad_enabled(False); torch.set_num_threads({threads}); x = torch.zeros({size})\n"
_ZOO = _TORCH + "from lightning_msnn import zoo\nmodel = zoo.load({name!r}, fuse={fuse})\n"
STARTS = {
    "torch": _ZOO.replace("{fuse}", "False") + "model(x)",
    FOLDED: _ZOO.replace("{fuse}", "True") + "model(x)",
    "ONNX Runtime": "import numpy, onnxruntime\noptions = onnxruntime.SessionOptions()\n"
    "options.intra_op_num_threads = {threads}\n"
    "session = onnxruntime.InferenceSession({file!r}, options, providers=['CPUExecutionProvider'])\n"
    "session.run(None, {{'image': numpy.zeros({size}, 'float32')}})",
    "AOTInductor": _TORCH + "torch._inductor.aoti_load_package({file!r})(x)",
    "torch.compile": _ZOO.replace("{fuse}", "True") + "torch.compile(model, dynamic=False)(x)",
}
"""Runtimes, and what a new process does until its first logits."""


def prepare(name: str, folder: Path) -> dict[str, Path]:
    """Export an entry in each format that a runtime here takes, where the folder has it not; return the files."""
    files = {}
    for runtime, to in WRITTEN.items():
        files[runtime] = folder / f"{name}.{to}{FORMATS[to].suffix}"
        if not files[runtime].exists():
            begun = time.perf_counter()
            report = export(name, to=to, out=files[runtime])
            print(f"{to}: {report.differ} of {report.images} differ, {time.perf_counter() - begun:.0f} s", flush=True)
    for batch in BATCHES:
        known = folder / f"{name}.compile_{batch}"
        if not known.exists():
            known.write_text(f"{start('torch.compile', name, folder, batch):.2f}")
            print(f"torch.compile, batch {batch}: {known.read_text()} s", flush=True)
    return files


def start(runtime: str, name: str, folder: Path, batch: int = 1, file: Path | None = None) -> float:
    """Return the seconds that a new process takes from nothing to its first logits."""
    size, threads = tuple(zoo.info(name)["input_size"]), torch.get_num_threads()
    code = STARTS[runtime].format(name=name, size=(batch, *size), threads=threads, file=str(file))
    environment = os.environ | {CACHE: str(folder / "cache")}
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=HERE.parent)
    return time.perf_counter() - begun


def contenders(name: str, files: dict[str, Path]) -> dict[str, Run]:
    """Return what each runtime makes of images."""
    folded = zoo.load(name, fuse=True)
    made: dict[str, Run] = {"torch": zoo.load(name), FOLDED: folded}
    made["torch.compile"] = torch.compile(zoo.load(name, fuse=True), dynamic=False)
    return made | {runtime: FORMATS[to].run(files[runtime]) for runtime, to in WRITTEN.items()}


def starts(name: str, folder: Path, files: dict[str, Path]) -> dict[str, float]:
    """Return the seconds of each runtime from nothing to the first logits; the median of three, or one compilation."""
    times = {"torch.compile": float((folder / f"{name}.compile_1").read_text())}
    for runtime in STARTS.keys() - times.keys():
        times[runtime] = statistics.median(start(runtime, name, folder, file=files.get(runtime)) for _ in range(3))
        print(f"{runtime} starts in {times[runtime]:.1f} s", flush=True)
    return times


@torch.no_grad()
def race(made: dict[str, Run], images: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Let runtimes take turns on a batch of images; seconds of a call, by round."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for run in made.values():
        for _ in range(3):
            run(images)
    for i in range(rounds):
        for name in list(made)[:: 1 if i % 2 else -1]:
            time.sleep(PAUSE)
            made[name](images)
            times[name].append(_timed(lambda run=made[name]: run(images), 0.1))
    return times


def measure(name: str, folder: Path, rounds: int) -> None:
    """Measure every runtime, and write a row for each and each size of a batch."""
    files, rows = prepare(name, folder), []
    about = {
        "device": f"{torch.get_num_threads()} cores of {processor()[0]}",
        "versions": f"torch {version('torch')}, onnxruntime {version('onnxruntime')}, lightning_msnn {__version__}",
        "date": date.today().isoformat(),
    }
    begun = starts(name, folder, files)
    os.environ[CACHE] = str(folder / "cache")
    made = contenders(name, files)
    for batch in BATCHES:
        torch.manual_seed(0)
        times = race(made, torch.randn(batch, *zoo.info(name)["input_size"]), rounds if batch == 1 else rounds // 2)
        for runtime, values in times.items():
            ratios = [a / b for a, b in zip(times[FOLDED], values, strict=True)]
            q1, middle, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
            size = files.get(runtime, find(name) / WEIGHTS_FILE).stat().st_size
            row = {"entry": name, "runtime": runtime, "batch": batch, "rounds": len(values)}
            row |= {"images_per_s": batch / statistics.median(values), "MB": size / 2**20, "start_s": begun[runtime]}
            row |= {"speed_relative_to_folded_q1": q1, "speed_relative_to_folded_median": middle}
            row |= {"speed_relative_to_folded_q3": q3, **about}
            shown([row])
            rows.append(row)
        write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})


def table() -> str:
    """The table of what is measured."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["runtime"], int(row["batch"])): row for row in rows}
    one, many = BATCHES
    lines = [
        f"| `{rows[0]['entry']}` in float32 | images/s, batch {one} | images/s, batch {many} | on disk | start-up |",
        "|---|---|---|---|---|",
    ]
    for runtime in STARTS:
        few, lot = found[runtime, one], found[runtime, many]
        lines.append(
            f"| {runtime} | {float(few['images_per_s']):.0f} ({float(few['speed_relative_to_folded_median']):.2f}) "
            f"| {float(lot['images_per_s']):.0f} ({float(lot['speed_relative_to_folded_median']):.2f}) "
            f"| {float(few['MB']):.0f} MB | {float(few['start_s']):.1f} s |"
        )
    lines += ["", f"{rows[0]['device']}; {rows[0]['versions']}; {rows[0]['date']}."]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", help="name of a zoo entry, or 'report'")
    parser.add_argument("--files", type=Path, help="folder of exported files")
    parser.add_argument("--prepare", action="store_true", help="write the files alone")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if given.entry != "report":
        if given.files is None:
            parser.error("--files is required")
        name = zoo.resolve(given.entry)
        given.files.mkdir(parents=True, exist_ok=True)
        if given.prepare:
            prepare(name, given.files)
            return
        measure(name, given.files, given.rounds)
    fill(PAGE, "runtimes", table())


if __name__ == "__main__":
    main()
