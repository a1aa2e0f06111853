"""How fast the networks are, and how much memory they take, beside others in the same run.

    python -m benchmarks.speed all                  # every table and the picture
    python -m benchmarks.speed train --isa avx512   # one of them, here with oneDNN kept to AVX-512
    python -m benchmarks.speed report               # README.md and the picture of what is in results/

Contenders take turns, a step each and in alternating order, so that what else the machine does falls on all alike, each
in a process of its own; those of an earlier commit run that commit's package. A ratio is the median over the rounds of
the ratio within a round, beside its quartiles. Each command writes ``results/<command>_<device>.csv``;
networks, precisions and instruction sets that it did not measure keep their rows there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.contenders import DEVICE, LOOP, SHIPPED, TWIN, images, make
from benchmarks.pages import fill
from lightning_msnn import __version__
from lightning_msnn.energy import count_operations
from lightning_msnn.kernels.layer import kernels_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NETWORKS = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
PRECISIONS = ("bf16", "float32")
ISAS = {"avx512": "AVX512_CORE_BF16", "avx2": "AVX2"}
FLAGS = {"amx": "amx_bf16", "avx512": "avx512_bf16", "avx2": "avx2"}
COMMIT = "715a5a2"
BEFORE, OWN, FLOOR = "before", "ReLU twin, torch's own", "floor"
LIF, LIFS = "SpikingJelly LIF, T = 1", "SpikingJelly LIF, T = 4"
CHECKPOINTED = f"{SHIPPED}, checkpointing"
EARLIER = {BEFORE: SHIPPED, OWN: TWIN}
CONTENDERS = (SHIPPED, BEFORE, TWIN, OWN, LIF, LIFS, LOOP)
VARIANTS = ("grid windows", "one window", "isolated windows")
FEW = (LIF, LIFS, LOOP, *VARIANTS)
PAUSE = 0.02
"""Seconds before each turn, in which the threads of the process that had the last one stop to wait actively."""

Times = dict[str, dict[int, float]]
"""Seconds by contender and round."""


class Worker:
    """A process that makes contenders from the package in a folder, and steps when asked to.

    Args:
        tree: The folder.
        isa: One of :data:`ISAS`; else the most that the processor has.
    """

    def __init__(self, tree: Path, isa: str | None) -> None:
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"}
        environment |= {"PYTHONPATH": path, **({"ONEDNN_MAX_CPU_ISA": ISAS[isa]} if isa else {})}
        command = [sys.executable, "-m", "benchmarks.worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)
        if (found := self("where")) != str(tree.resolve()):
            raise RuntimeError(f"a worker found the package in {found}, not in {tree}")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Ask for a command of :mod:`benchmarks.worker`, and return its answer."""
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker ended with status {self.process.wait()} at {command!r} {arguments}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()  # at the end of its input it ends


@contextmanager
def trees() -> Iterator[dict[str, Path]]:
    """Yield the folder of each contender's package; the earlier commit's are left out if the checkout lacks it."""
    folders = dict.fromkeys((*CONTENDERS, *VARIANTS), HERE.parent)
    with tempfile.TemporaryDirectory() as folder:
        tree, packed = Path(folder) / "tree", Path(folder) / "before.tar"
        command = ["git", "-C", str(HERE.parent), "archive", "--output", str(packed), COMMIT, "lightning_msnn"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print(f"'{BEFORE}' and '{OWN}' are left out: commit {COMMIT} is not in this checkout", flush=True)
            yield {name: tree for name, tree in folders.items() if name not in EARLIER}
            return
        with tarfile.open(packed) as file:
            file.extractall(tree, filter="data")
        (tree / "benchmarks").mkdir()
        for name in ("contenders.py", "worker.py"):
            (tree / "benchmarks" / name).write_text((HERE / name).read_text())
        yield folders | dict.fromkeys(EARLIER, tree)


@contextmanager
def workers(given: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """Yield a process for each contender: in one that others share, memory is laid out otherwise, which takes time."""
    with trees() as folders, ExitStack() as stack:
        yield {name: stack.enter_context(Worker(tree, given.isa)) for name, tree in folders.items()}


def race(sides: dict[str, Worker], names: list[str], rounds: int, **task: Any) -> Times:
    """Let contenders take turns, those that no bound is about in the first three rounds alone.

    Args:
        sides: Their processes.
        names: Those that take part.
        rounds: Number of rounds.
        **task: Arguments of :func:`benchmarks.worker.enter`.
    """
    for name in names:
        sides[name]("enter", contender=EARLIER.get(name, name), **task)
    times: Times = {name: {} for name in names}
    for i in range(rounds):
        for name in names[:: 1 if i % 2 else -1]:
            if i < 3 or name not in FEW:
                time.sleep(PAUSE)
                times[name][i] = sides[name]("turn", contender=EARLIER.get(name, name))
    for name in names:
        sides[name]("leave")
    return times


def rows_of(times: Times, place: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """One row for each contender: its time, and its speed relative to three others with quartiles."""
    rows = []
    for name, values in times.items():
        middle = statistics.median(values.values())
        row = {**place, "contender": name, "rounds": len(values), "ms": middle * 1e3, "images_per_s": batch / middle}
        for column, reference in (("shipped", SHIPPED), ("before", BEFORE), ("twin", TWIN)):
            ratios = [times[reference][i] / t for i, t in values.items() if i in times.get(reference, {})]
            several = len(ratios) > 1
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if several else 3 * (ratios or [""])
            parts = zip(("q1", "median", "q3"), quartiles, strict=True)
            row |= {f"speed_relative_to_{column}_{part}": value for part, value in parts}
        rows.append(row)
    return rows


def contest(given: argparse.Namespace, network: str, training: bool) -> list[dict[str, Any]]:
    """Time all contenders at 32x32."""
    rows = []
    macs = count_operations(make(SHIPPED, network).eval(), images(2)).total("dense") / 2
    with workers(given) as sides:
        names = [name for name in (*CONTENDERS, *VARIANTS) if name in sides]
        for precision in given.precision:
            rate = sides[SHIPPED]("rate", precision=precision)
            for batch in given.batch or ([128] if training else [256, 1]):
                place = {"network": network, "precision": precision, "batch": batch}
                times = race(sides, names, given.rounds, training=training, size=32, **place)
                times[FLOOR] = dict.fromkeys(range(given.rounds), batch * macs * (3 if training else 1) / rate)
                rows += rows_of(times, place, batch)
                shown(rows[-len(times) :])
    return rows


def memory(given: argparse.Namespace, network: str) -> list[dict[str, Any]]:
    """Peak memory of training, each contender in a process of its own."""
    rows = []
    with trees() as folders:
        for batch in given.batch or [128, 512]:
            names = [name for name in (CONTENDERS if batch <= 128 else CONTENDERS[:4]) if name in folders]
            place = {"network": network, "precision": "bf16", "batch": batch}
            for name, checkpointing in [*((name, False) for name in names), (SHIPPED, True)]:
                with Worker(folders[name], given.isa) as worker:
                    peak = worker("peak", contender=EARLIER.get(name, name), checkpointing=checkpointing, **place)
                rows.append({**place, "contender": CHECKPOINTED if checkpointing else name, "MiB": peak})
                shown(rows[-1:])
    return rows


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "batch": [{"batch": b} for b in (1, 8, 32, 128, 512)],
    "image size": [{"size": s, "batch": max(1, 128 * 32 * 32 // (s * s))} for s in (32, 64, 128, 224)],
    "depth": [{"depths": d} for d in ((1, 1, 1, 1), (2, 2, 6, 2), (2, 2, 12, 2), (2, 2, 18, 2))],
    "width": [{"widths": w} for w in ((24, 48, 96, 192), (48, 96, 192, 384), (72, 144, 288, 576))],
}
UNITS = {"batch": "images", "image size": "pixels a side", "depth": "blocks", "width": "channels of the first stage"}


def scaling(given: argparse.Namespace, network: str) -> list[dict[str, Any]]:
    """Speed against batch, image size, depth and width, beside the ReLU twin; a third of the rounds."""
    rows = []
    points = [(axis, setting) for axis, settings in SWEEPS.items() for setting in settings]
    with workers(given) as sides:
        for precision, (axis, setting) in ((p, point) for p in given.precision for point in points):
            value = next(iter(setting.values()))
            number = sum(value) if axis == "depth" else value[0] if axis == "width" else value
            task = {"network": network, "precision": precision, "batch": 64, "size": 32, **setting}
            if given.batch:
                task["batch"] = given.batch[0]
            for kind in ("training", "inference"):
                times = race(sides, [TWIN, SHIPPED], max(given.rounds // 3, 1), training=kind == "training", **task)
                place = {"network": network, "precision": precision, "axis": axis, "value": number, "kind": kind}
                rows += rows_of(times, place | {"batch": task["batch"]}, task["batch"])
                shown(rows[-1:])
    return rows


COMMANDS: dict[str, Callable[[argparse.Namespace, str], list[dict[str, Any]]]] = {
    "train": lambda given, network: contest(given, network, True),
    "infer": lambda given, network: contest(given, network, False),
    "memory": memory,
    "scaling": scaling,
}


def shown(rows: list[dict[str, Any]]) -> None:
    """Print rows as they come."""
    for row in rows:
        cells = {key: value for key, value in row.items() if not key.endswith(("q1", "q3")) and value != ""}
        print(*(f"{x:.3g}" if isinstance(x, float) else x for x in cells.values()), sep=" | ", flush=True)


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and what it can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("model name", platform.machine()), found.get("flags", "").split()


def keep(command: str, rows: list[dict[str, Any]], isa: str | None) -> None:
    """Write rows into a command's file, in place of those of the same network, instruction set and precision."""
    name, flags = processor()
    has = [name for name, flag in FLAGS.items() if flag in flags]
    packages = [f"{package} {version(package)}" for package in ("torch", "timm", "spikingjelly")]
    kernels = getattr(kernels_of(images(1, 16)), "__name__", "reference").rpartition(".")[2]
    about = {
        "isa": "cuda" if DEVICE.type == "cuda" else isa or [*has, "other"][0],
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "device": f"{torch.get_num_threads()} cores of {name} (up to {[*has, 'other'][0]})",
        "versions": ", ".join([*packages, f"lightning_msnn {__version__}", f"kernels: {kernels}"]),
        "date": date.today().isoformat(),
    }
    if DEVICE.type == "cuda":
        about["device"] = torch.cuda.get_device_name()

    def key(row: dict[str, Any]) -> tuple[int, str, str]:
        return NETWORKS.index(row["network"]), row["isa"], row["precision"]

    rows = [row | about for row in rows]
    new = {key(row) for row in rows}
    rows = [row for row in read(command) if key(row) not in new] + rows
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{command}_{DEVICE.type}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=key):
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def read(command: str, device: str = DEVICE.type) -> list[dict[str, Any]]:
    """Return the rows of a command's file."""
    path = RESULTS / f"{command}_{device}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reported(command: str, every_isa: bool = False) -> list[dict[str, Any]]:
    """Return a command's rows in bf16 on a CPU, with the most instructions of those that were measured."""
    rows = [row for row in read(command, "cpu") if row["precision"] == "bf16"]
    best = min((row["isa"] for row in rows), key=[*FLAGS, "other"].index, default="")
    return [row for row in rows if every_isa or row["isa"] == best]


ISA_NAMES = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "other": "CPU"}
TABLES = {
    "train": ("Training step, batch 128: times as fast as", "isa", ISA_NAMES),
    "infer": ("Inference, folded: times as fast as", "batch", {"256": "batch 256", "1": "batch 1"}),
    "memory": ("Peak memory of training, relative to", "batch", {"128": "batch 128", "512": "batch 512"}),
}
LABELS = {
    BEFORE: f"before (commit {COMMIT})",
    TWIN: "ReLU twin, our synapses",
    LOOP: "published loop over windows",
    FLOOR: "floor: the arithmetic alone",
    CHECKPOINTED: "itself with checkpointing",
}


def table(command: str) -> tuple[list[str], list[str]]:
    """Compare the networks as shipped with each contender, in bf16 on a CPU; return Markdown, and what it ran on."""
    title, by, groups = TABLES[command]
    rows = [row for row in reported(command, by == "isa") if row[by] in groups]
    found = {(row["contender"], row[by], row["network"]): row for row in rows}
    columns = [(group, network) for group in groups for network in NETWORKS if (SHIPPED, group, network) in found]

    def cell(name: str, column: tuple[str, str]) -> str:
        row = found.get((name, *column))
        if row is None:
            return ""
        if name == SHIPPED:
            return f"{float(row['MiB' if command == 'memory' else 'images_per_s']):.0f}"
        if command == "memory":
            return f"{float(found[SHIPPED, *column]['MiB']) / float(row['MiB']):.2f}"
        return f"{1 / float(row['speed_relative_to_shipped_median']):.2f}"

    names = [name for name in (*CONTENDERS[1:], FLOOR, CHECKPOINTED, SHIPPED) if name in {key[0] for key in found}]
    labels = LABELS | {SHIPPED: "(as shipped, MiB)" if command == "memory" else "(as shipped, images/s)"}
    lines = [[title, *(f"{network.removeprefix('msnn_')}, {groups[group]}" for group, network in columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[labels.get(name, name), *(cell(name, column) for column in columns)] for name in names]
    sources = [f"{row['device']}; {row['versions']}; {row['date']}" for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines], list(dict.fromkeys(sources))


def plot(file: Path) -> bool:
    """Draw the speed of all networks relative to their ReLU twins against each axis; return whether it is measured."""
    rows = [r for r in reported("scaling") if r["contender"] == SHIPPED]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(15, 3.6), layout="constrained", sharey=True)
    for panel, axis in zip(axes, SWEEPS, strict=True):
        for network, colour in zip(NETWORKS, ("C0", "C1", "C2"), strict=True):
            for kind, style in (("training", "-"), ("inference", "--")):
                points = [r for r in rows if (r["network"], r["axis"], r["kind"]) == (network, axis, kind)]
                y = [float(r["speed_relative_to_twin_median"]) for r in points]
                label = f"{network}, {kind}"
                panel.plot([int(r["value"]) for r in points], y, style, color=colour, marker=".", label=label)
        ticks = sorted({int(r["value"]) for r in rows if r["axis"] == axis})
        panel.set(xscale="log", xlabel=f"{axis} ({UNITS[axis]})")
        panel.set_xticks(ticks, [str(value) for value in ticks])
        panel.minorticks_off()
        panel.axhline(1, color="C7", linewidth=1)
    axes[0].set(ylabel="speed relative to the ReLU twin", ylim=(0, None))
    axes[0].legend(fontsize="x-small")
    figure.savefig(file, dpi=100)
    return True


def report() -> None:
    """Write the tables and the picture of ``results`` into ``README.md``; the words around them stay."""
    page, picture = HERE / "README.md", HERE / "scaling.png"
    text, sources = [], []
    for command in TABLES:
        lines, found = table(command)
        text += [*lines, ""] if found else [f"Not measured yet: `python -m benchmarks.speed {command}`.", ""]
        sources += found
    text += [f"{source}.  " for source in dict.fromkeys(sources)]
    if plot(picture):
        text += ["", f"![Speed relative to the ReLU twin]({picture.name})"]
    fill(page, "tables", "\n".join(text))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*COMMANDS, "all", "report"))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="memory: bf16 alone")
    parser.add_argument("--isa", choices=ISAS, help="the most that oneDNN may use; by default what the processor has")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", help="images in a batch, in place of those of the tables")
    given = parser.parse_args()
    chosen = {"all": list(COMMANDS), "report": []}.get(given.command, [given.command])
    for command, network in ((command, network) for command in chosen for network in given.network):
        keep(command, COMMANDS[command](given, network), given.isa)
    report()


if __name__ == "__main__":
    main()
