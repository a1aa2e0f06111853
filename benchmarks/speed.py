"""How fast the networks are, and how much memory they take, as ratios within one run.

    python -m benchmarks.speed all [--root data/cifar100]     # every table and plot; half an hour on 2 CPU cores
    python -m benchmarks.speed train --network msnn_vit12     # one of them
    python -m benchmarks.speed report                         # README.md and plots of what is in results/

Contenders take turns, step by step and in alternating order, so that what else the machine does falls on all alike; a
ratio is the median over the rounds of one contender's time over another's in that round. Each command prints its table
and writes it to ``benchmarks/results/<command>_<device>.json`` with the machine, the versions and the date. On a CUDA
device times are those of events, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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

from benchmarks.contenders import CONTENDERS, SHIPPED, TWIN, fused, inference, make, training_step
from lightning_msnn.kernels.layer import kernels_of
from lightning_msnn.metrics import count_operations

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
NETWORKS = ("msnn_resnet12", "msnn_vit12", "msnn_rnn12")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Describe what runs the benchmark."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line for line in lines if line.startswith("flags")), "")
        features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
        name = f"{torch.get_num_threads()} cores of {model or platform.machine()} ({', '.join(features)})"
    packages = ("torch", "timm", "lightning_msnn", "spikingjelly")
    kernels = getattr(kernels_of(images(1, 16)), "__name__", "reference").rpartition(".")[2]
    return {
        "device": name,
        "versions": ", ".join([*(f"{package} {version(package)}" for package in packages), f"scans by {kernels}"]),
        "date": date.today().isoformat(),
    }


def images(batch: int, size: int = 32) -> torch.Tensor:
    """Random images in channels-last order."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE).to(memory_format=torch.channels_last)


def seconds(step: Callable[[], None]) -> float:
    """Time one step."""
    if DEVICE.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def race(steps: dict[str, Callable[[], None]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Let contenders take turns; return the seconds of each round by contender."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            times[name].append(seconds(steps[name]))
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Speed of a contender relative to another: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(times[name], times[reference], strict=True))


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def rows_of(times: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    """One row for each contender: milliseconds, images a second, speed relative to the ReLU twin."""
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        rows.append(
            {"contender": name, "ms": middle * 1e3, "images/s": batch / middle, "of twin": ratio(times, name, TWIN)}
        )
    return rows


def rate(precision: torch.dtype) -> dict[str, float]:
    """Multiply-accumulates a second that large products and convolutions reach, forward."""
    a, b = (torch.randn(2048, 2048, device=DEVICE).to(precision) for _ in range(2))
    x = images(64, 32)[:, :1].repeat(1, 128, 1, 1).to(precision).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=DEVICE).to(precision).contiguous(memory_format=torch.channels_last)
    work = {
        "matrix product": (lambda: torch.mm(a, b), 2048**3),
        "convolution": (lambda: torch.nn.functional.conv2d(x, w, padding=1), 64 * 32 * 32 * 128 * 128 * 9),
    }
    times = race({name: step for name, (step, _) in work.items()}, 9)
    return {name: work[name][1] / statistics.median(times[name]) for name in work}


def prepared(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """Return a contender for inference: folded, but for what others wrote, which stays as it is written."""
    folded = fused(model, images(32))
    return model if name == "as published, a loop" else folded


def contest(given: argparse.Namespace, training: bool) -> list[dict[str, Any]]:
    """Time all contenders for each network and precision at 32x32."""
    rows = []
    for network in given.network:
        for precision in given.precision:
            dtype = PRECISIONS[precision]
            peak = rate(dtype)
            for batch in [128] if training else [256, 1]:
                x = images(batch)
                steps = {}
                for name in CONTENDERS:
                    model = make(name, network).to(DEVICE)
                    if training:
                        steps[name] = training_step(model, x, dtype)
                    else:
                        steps[name] = inference(prepared(name, model), x, dtype)
                times = race(steps, given.rounds * (8 if batch == 1 else 1))
                macs = {}
                for name, context in ((SHIPPED, "shared"), ("isolated windows", "isolated")):
                    record = count_operations(make(name, network, context=context).eval(), images(2).cpu())
                    macs[name] = record.total("dense") / 2
                floor = batch * (3 if training else 1) / max(peak.values())
                for row in rows_of(times, batch):
                    row |= {"network": network, "precision": precision, "batch": batch}
                    row["floor"] = floor * macs.get(row["contender"], macs[SHIPPED]) * 1e3
                    row["published"] = ratio(times, row["contender"], "as published, a loop")
                    row["LIF, T = 1"] = ratio(times, row["contender"], "SpikingJelly LIF, T = 1")
                    row["LIF, T = 4"] = ratio(times, row["contender"], "SpikingJelly LIF, T = 4")
                    rows.append(row)
                print(show("train" if training else "infer", rows[-len(times) :]), flush=True)
    return rows


def profile(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Say what share of a training step each kind of work takes, by torch's profiler, of processor time."""
    operator, gradient = "lightning_msnn::neurons", "lightning_msnn::neurons_backward"
    generated = "GeneratedBackwardFor_lightning_msnn_{}_default"
    small = generated.format("small_convolution")
    groups = {
        "layers of neurons": (generated.format("neurons"), operator, gradient),
        "convolutions": ("aten::convolution", "aten::convolution_backward", small, f"{small}Backward"),
        "matrix products": ("aten::linear", "aten::mm"),
        "recurrent cell": ("aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward", "aten::_cudnn_rnn"),
        "batch norm of torch": ("aten::batch_norm", "aten::native_batch_norm_backward"),
        "optimizer": ("Optimizer.step#AdamW.step",),
    }
    rows = []
    for network in given.network:
        for contender in (SHIPPED, "grid windows", "isolated windows", TWIN):
            step = training_step(make(contender, network).to(DEVICE), images(128), torch.bfloat16)
            for _ in range(2):
                step()
            with torch.profiler.profile() as profiler:
                for _ in range(3):
                    step()
            events = {event.key: event for event in profiler.key_averages()}
            device = DEVICE.type == "cuda"

            def spent(event: Any, own: bool, device: bool = device) -> float:
                kind = "device" if device else "cpu"
                return float(getattr(event, f"self_{kind}_time_total" if own else f"{kind}_time_total"))

            total = sum(spent(event, True) for event in events.values())
            row: dict[str, Any] = {"network": network, "contender": contender}
            for group, names in groups.items():
                own = group == "recurrent cell"  # which calls itself, so that its total has it twice
                row[group] = 100 * sum(spent(events[name], own) for name in names if name in events) / total
            row["else"] = 100 - sum(row[group] for group in groups)
            rows.append(row)
    return rows


def _peak(contender: str, network: str, batch: int, checkpointing: bool) -> float:
    """Peak memory of training in MiB, over that of the process before the network is made."""
    x = images(batch)
    scratch = torch.randn(512, 512)
    scratch @ scratch  # threads and libraries are there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = make(contender, network).to(DEVICE)
    if checkpointing:
        model.set_grad_checkpointing(True)
    step = training_step(model, x, torch.bfloat16)
    for _ in range(3):
        step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of training, each contender in a process of its own, bf16."""
    rows: list[dict[str, Any]] = []
    for network in given.network:
        for batch, names in ((128, list(CONTENDERS)), (512, [TWIN, SHIPPED])):
            peaks = {}
            for name, checkpointing in [(name, False) for name in names] + [(SHIPPED, True)]:
                command = [sys.executable, "-m", "benchmarks.speed", "_peak", name, network, str(batch)]
                done = subprocess.run(
                    [*command, str(checkpointing)], cwd=HERE.parent, capture_output=True, text=True, check=True,
                    timeout=600,
                )  # fmt: skip
                peaks[f"{name}, checkpointing" if checkpointing else name] = float(done.stdout.split()[-1])
            for label, peak in peaks.items():
                row = {"network": network, "batch": batch, "contender": label, "MiB": peak}
                rows.append({**row, "memory of twin": peak / peaks[TWIN]})
    return rows


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "batch": [{"batch": b} for b in (1, 8, 32, 128, 512)],
    "image size": [{"size": s, "batch": max(1, 128 * 32 * 32 // (s * s))} for s in (32, 64, 128, 224)],
    "depth": [{"depths": d} for d in ((1, 1, 1, 1), (2, 2, 6, 2), (2, 2, 12, 2), (2, 2, 18, 2))],
    "width": [{"widths": w} for w in ((24, 48, 96, 192), (48, 96, 192, 384), (72, 144, 288, 576))],
}


def scaling(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost of training and inference against batch, image size, depth and width."""
    rows = []
    for network in given.network:
        for axis, settings in SWEEPS.items():
            for setting in settings:
                rows += sweep(given, network, axis, setting)
    return rows


def sweep(given: argparse.Namespace, network: str, axis: str, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Time one point of an axis."""
    rows = []
    arguments = {key: value for key, value in setting.items() if key in ("depths", "widths")}
    batch = min(setting.get("batch", 64), 128 if DEVICE.type == "cpu" and axis != "batch" else 512)
    x = images(batch, setting.get("size", 32))
    for precision in given.precision:
        for kind in ("training", "inference"):
            steps = {}
            for name in (TWIN, SHIPPED, "grid windows"):
                model = make(name, network, **arguments).to(DEVICE)
                if kind == "training":
                    steps[name] = training_step(model, x, PRECISIONS[precision])
                else:
                    steps[name] = inference(fused(model, images(16)), x, PRECISIONS[precision])
            times = race(steps, max(3, given.rounds // 2) * (4 if batch < 8 else 1), 1)
            value = next(iter(setting.values()))
            shown = sum(value) if axis == "depth" else (value[0] if axis == "width" else value)
            place = {"network": network, "axis": axis, "value": shown, "precision": precision, "kind": kind}
            rows += [{**place, **row} for row in rows_of(times, batch)]
    return rows


def compiled(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What torch.compile makes of a training step."""
    rows = []
    for network in given.network:
        steps = {}
        spent = {}
        for name in (TWIN, SHIPPED, "grid windows"):
            steps[name] = training_step(make(name, network).to(DEVICE), images(128), torch.bfloat16)
            model = torch.compile(make(name, network).to(DEVICE), fullgraph=True)
            steps[f"{name}, compiled"] = training_step(model, images(128), torch.bfloat16)
            start = time.perf_counter()
            steps[f"{name}, compiled"]()
            spent[f"{name}, compiled"] = time.perf_counter() - start
        times = race(steps, given.rounds)
        for row in rows_of(times, 128):
            before = row["contender"].removesuffix(", compiled")
            row |= {"network": network, "compile s": spent.get(row["contender"], 0.0)}
            rows.append({**row, "of uncompiled": ratio(times, row["contender"], before)})
    return rows


def data(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Images a second of the data module alone, augmentation included, beside those of a training step."""
    from lightning_msnn.data import CIFAR100, Digits

    rows = []
    modules: dict[str, Any] = {"digits": Digits(batch_size=128, num_workers=0)}
    if given.root:
        modules["CIFAR-100"] = CIFAR100(given.root, batch_size=128, num_workers=0, policy="none")
        modules["CIFAR-100, AutoAugment"] = CIFAR100(given.root, batch_size=128, num_workers=0, policy="autoaugment")
    step = training_step(make(SHIPPED).to(DEVICE), images(128), torch.bfloat16)
    training = 128 / statistics.median(race({"step": step}, given.rounds)["step"])

    class _Trainer:
        training, validating, testing, predicting, world_size, global_rank = True, False, False, False, 1, 0
        current_epoch = 0

    for name, module in modules.items():
        module.prepare_data()
        module.setup("fit")
        module.trainer = _Trainer()
        loader = module.train_dataloader()
        for repeat in range(2):  # the first fills the cache
            start, seen = time.perf_counter(), 0
            for i, batch in enumerate(loader):
                x, _ = module.on_after_batch_transfer([part.to(DEVICE) for part in batch], 0)
                seen += len(x)
                if i == 60:
                    break
            if repeat:
                rows.append({"data": name, "images/s": seen / (time.perf_counter() - start)})
    for row in rows:
        row |= {"training step of msnn_resnet12, images/s": training, "times faster": row["images/s"] / training}
    return rows


COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], list[dict[str, Any]]]]] = {
    "train": ("Training step at 32x32, batch 128", lambda given: contest(given, True)),
    "infer": ("Inference at 32x32, the networks and the twin folded", lambda given: contest(given, False)),
    "profile": ("Where a training step goes, percent of its time (batch 128, bf16)", profile),
    "memory": ("Peak memory of training (bf16)", memory),
    "scaling": ("Cost against batch, image size, depth and width", scaling),
    "compiled": ("torch.compile, training step (batch 128, bf16)", compiled),
    "data": ("Input pipeline alone", data),
}

SHOWN = {
    "of twin": "speed relative to the ReLU twin",
    "memory of twin": "relative to the ReLU twin",
    "published": "to the published loop",
    "LIF, T = 1": "to SpikingJelly's LIF, T = 1",
    "LIF, T = 4": "to T = 4",
    "floor": "floor in ms",
    "of uncompiled": "speed relative to the same uncompiled",
}


def show(command: str, rows: list[dict[str, Any]]) -> str:
    """Return a command's table."""
    if not rows:
        return ""
    keys = [key for key in rows[0] if key != "contender"]
    lead = [key for key in ("network", "axis", "value", "kind", "precision", "batch") if key in keys]
    keys = [*lead, *(["contender"] if "contender" in rows[0] else []), *(k for k in keys if k not in lead)]
    return table([SHOWN.get(key, key) for key in keys], [[row[key] for key in keys] for row in rows])


def plot(rows: list[dict[str, Any]], network: str, file: Path) -> None:
    """Draw a network's cost an image, and speed relative to the twin, against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(15, 7), layout="constrained", sharex="col")
    labels = {"batch": "images in a batch", "image size": "side of the image in pixels", "depth": "blocks"}
    top = 1.1 * max(r["of twin"] for r in rows if (r["network"], r["precision"]) == (network, "bf16"))
    for column, axis in zip(axes.T, SWEEPS, strict=True):
        for kind, style in (("training", "-"), ("inference", "--")):
            for name, colour in ((TWIN, "C7"), (SHIPPED, "C0"), ("grid windows", "C2")):
                found = [r for r in rows if (r["axis"], r["kind"], r["contender"]) == (axis, kind, name)]
                found = [r for r in found if (r["network"], r["precision"]) == (network, "bf16")]
                x = [r["value"] for r in found]
                column[0].plot(x, [1e3 / r["images/s"] for r in found], style, color=colour, marker="o", label=None)
                if name != TWIN:
                    column[1].plot(x, [r["of twin"] for r in found], style, color=colour, marker="o")
        column[0].set(xscale="log", yscale="log", title=f"against {axis}")
        column[1].set(xlabel=labels.get(axis, "channels of the first stage"), ylim=(0, top))
        column[1].set_xticks(x, [str(value) for value in x])
        column[1].minorticks_off()
        column[1].axhline(1, color="C7", linewidth=1)
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("speed relative to the ReLU twin")
    for name, colour in ((TWIN, "C7"), (SHIPPED, "C0"), ("grid windows", "C2")):
        axes[0, 0].plot([], [], color=colour, label=name)
    for kind, style in (("training step", "-"), ("inference, folded", "--")):
        axes[0, 0].plot([], [], style, color="black", label=kind)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(f"{network}, bf16")
    figure.savefig(file, dpi=100)


def report() -> None:
    """Write the tables of ``results`` into ``README.md``; the words around them stay."""
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition("<!-- tables -->")
    after = rest.partition("<!-- end of tables -->")[2]
    text = []
    for file in sorted(RESULTS.glob("*.json"), key=lambda f: list(COMMANDS).index(f.stem.rpartition("_")[0])):
        content = json.loads(file.read_text())
        command = file.stem.rpartition("_")[0]
        text += [f"## {COMMANDS[command][0]}", "", f"`{content['command']}`, on {content['device']}; "]
        text[-1] += f"{content['versions']}; {content['date']}."
        text += ["", show(command, content["rows"]), ""]
        if command == "scaling":
            for network in dict.fromkeys(row["network"] for row in content["rows"]):
                picture = f"{network}_{file.stem}.png"
                plot(content["rows"], network, HERE / picture)
                text += [f"![Cost of {network} against batch, image size, depth and width]({picture})", ""]
    page.write_text(f"{before}<!-- tables -->\n\n" + "\n".join(text) + f"\n<!-- end of tables -->{after}")


def run(command: str, given: argparse.Namespace) -> None:
    """Run one benchmark, print its table and keep it."""
    rows = COMMANDS[command][1](given)
    print(f"\n{COMMANDS[command][0]}\n{machine()}\n\n{show(command, rows)}\n", flush=True)
    RESULTS.mkdir(exist_ok=True)
    line = f"python -m benchmarks.speed {command} --network {' '.join(given.network)} --rounds {given.rounds}"
    line += "" if given.precision == list(PRECISIONS) else f" --precision {' '.join(given.precision)}"
    content = {"command": line, **machine(), "rows": rows}
    (RESULTS / f"{command}_{DEVICE.type}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["_peak"]:
        print(_peak(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "True"))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*COMMANDS, "all", "report"))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=None)
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--root", help="folder of CIFAR-100")
    given = parser.parse_args()
    chosen = given.network
    for command in COMMANDS if given.command == "all" else [given.command]:
        if command == "report":
            continue
        all_networks = command in ("train", "infer", "profile", "memory", "scaling")
        given.network = chosen or list(NETWORKS if all_networks else NETWORKS[:1])
        run(command, given)
    report()


if __name__ == "__main__":
    main()
