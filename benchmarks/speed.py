"""How fast the networks are, and how much memory they take, beside others in the same run.

    python -m benchmarks.speed all                  # every table
    python -m benchmarks.speed train --isa avx512   # one of them, here with oneDNN kept to AVX-512
    python -m benchmarks.speed report               # README.md from what is in results/

Contenders take turns, a step each and in alternating order, so that what else the machine does falls on all alike, each
in a process of its own; those of an earlier commit run that commit's package. A ratio is the median over the rounds of
the ratio within a round, beside its quartiles. Each command writes ``results/<command>_<device>.csv``, where networks,
precisions and instruction sets that it did not measure keep their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.common import PAUSE, Times, fill, markdown, processor, read, rows_of, versions, write
from benchmarks.contenders import DEVICE, LOOP, SHIPPED, TWIN, images, make
from lightning_msnn.energy import count_operations
from lightning_msnn.kernels.layer import kernels_of

HERE = Path(__file__).resolve().parent
NETWORKS = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
PRECISIONS = ("bf16", "float32")
ISAS = {"avx512": "AVX512_CORE_BF16", "avx2": "AVX2"}
FLAGS = {"amx": "amx_bf16", "avx512": "avx512_bf16", "avx2": "avx2"}
COMMIT = "715a5a2"
BEFORE, OWN, FLOOR = "before", "ReLU baseline, torch's own", "floor"
LIF, LIFS = "SpikingJelly LIF, T = 1", "SpikingJelly LIF, T = 4"
CHECKPOINTED = f"{SHIPPED}, checkpointing"
EARLIER = {BEFORE: SHIPPED, OWN: TWIN}
CONTENDERS = (SHIPPED, BEFORE, TWIN, OWN, LIF, LIFS, LOOP)
VARIANTS = ("grid windows", "one window", "isolated windows")
REFERENCES = {"shipped": SHIPPED, "before": BEFORE, "twin": TWIN}
FEW = (LIF, LIFS, LOOP, *VARIANTS)


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
        for name in ("common.py", "contenders.py", "worker.py"):
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


def contest(given: argparse.Namespace, network: str, training: bool) -> list[dict[str, Any]]:
    """Time all contenders at 32x32."""
    rows = []
    macs = count_operations(make(SHIPPED, network).eval(), images(2)).total("dense") / 2
    with workers(given) as sides:
        names = [name for name in (*CONTENDERS, *VARIANTS) if name in sides]
        for precision in given.precision:
            rate = sides[SHIPPED]("rate", precision=precision)
            for batch in given.batch or ([128] if training else [256, 1]):
                place = {"network": network, "precision": precision}
                times = race(sides, names, given.rounds, training=training, size=32, batch=batch, **place)
                times[FLOOR] = dict.fromkeys(range(given.rounds), batch * macs * (3 if training else 1) / rate)
                rows += rows_of(times, place, batch, REFERENCES)
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
                print(*rows[-1].values(), sep=" | ", flush=True)
    return rows


COMMANDS: dict[str, Callable[[argparse.Namespace, str], list[dict[str, Any]]]] = {
    "train": lambda given, network: contest(given, network, True),
    "infer": lambda given, network: contest(given, network, False),
    "memory": memory,
}


def keep(command: str, rows: list[dict[str, Any]], isa: str | None) -> None:
    """Write rows into a command's file, in place of those of the same network, instruction set and precision."""
    name, flags = processor()
    has = [name for name, flag in FLAGS.items() if flag in flags]
    kernels = getattr(kernels_of(images(1, 16)), "__name__", "reference").rpartition(".")[2]
    about = {
        "isa": "cuda" if DEVICE.type == "cuda" else isa or [*has, "other"][0],
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "device": f"{torch.get_num_threads()} cores of {name} (up to {[*has, 'other'][0]})",
        "versions": f"{versions('torch', 'timm', 'spikingjelly')}, kernels: {kernels}",
        "date": date.today().isoformat(),
    }
    if DEVICE.type == "cuda":
        about["device"] = torch.cuda.get_device_name()

    def key(row: dict[str, Any]) -> tuple[int, str, str]:
        return NETWORKS.index(row["network"]), row["isa"], row["precision"]

    rows = [row | about for row in rows]
    new = {key(row) for row in rows}
    rows = [row for row in read(f"{command}_{DEVICE.type}.csv") if key(row) not in new] + rows
    write(f"{command}_{DEVICE.type}.csv", sorted(rows, key=key))


def reported(command: str, every_isa: bool = False) -> list[dict[str, Any]]:
    """Return a command's rows in bf16 on a CPU, with the most instructions of those that were measured."""
    rows = [row for row in read(f"{command}_cpu.csv") if row["precision"] == "bf16"]
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
    TWIN: "ReLU baseline, our synapses",
    LOOP: "published loop over windows",
    FLOOR: "floor: the arithmetic alone",
    CHECKPOINTED: "itself with checkpointing",
}


def table(command: str) -> tuple[str, list[str]]:
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
    head = [title, *(f"{network.removeprefix('msnn_')}, {groups[group]}" for group, network in columns)]
    lines = [[labels.get(name, name), *(cell(name, column) for column in columns)] for name in names]
    sources = [f"{row['device']}; {row['versions']}; {row['date']}" for row in rows]
    return markdown(head, lines), list(dict.fromkeys(sources))


def report() -> None:
    """Write the tables of ``results`` into ``README.md``; the words around them stay."""
    page = HERE / "README.md"
    text, sources = [], []
    for command in TABLES:
        lines, found = table(command)
        text += [lines, ""] if found else [f"Not measured yet: `python -m benchmarks.speed {command}`.", ""]
        sources += found
    text += [f"{source}.  " for source in dict.fromkeys(sources)]
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
