"""``lightning-msnn describe <network>``: what a network is, and what it costs to train it on this machine."""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_msnn import data, zoo
from lightning_msnn.energy import count_operations, predict_rates, synaptic_operations
from lightning_msnn.energy.expected import CostOfRates
from lightning_msnn.entries import entries
from lightning_msnn.errors import ConfigurationError, check_device, check_integer, choose
from lightning_msnn.imports import HELP, explained, import_files
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.zoo.verification import make_data

__all__ = ["describe", "forget_peak", "main", "make_parser", "peak_memory"]

_WARMUP = 2  # steps that are not timed


_CPU = torch.device("cpu")


def peak_memory(device: torch.device = _CPU) -> int:
    """Most bytes that this process, or the device, has held since :func:`forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device = _CPU) -> int:
    """Begin to look for the peak anew; return what is held now, less what was freed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    with suppress(OSError):  # the peak is then that since the process began
        clear.write_text("5")
    return peak_memory(device)


def _activations(task: SpikingClassifier, loss: Any) -> int:
    """Bytes that autograd keeps for the backward pass of a step, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*task.parameters(), *task.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step = loss()  # alive while its tensors are told apart by their place
        del step
    return sum(kept.values())


def _data(network: str, kind: str | None, root: str | None, batch_size: int, image_size: int | None) -> Any:
    """The data module of a network that is described."""
    given: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0}
    given |= {} if root is None else {"root": root}
    every = (getattr(data, name) for name in data.__all__)
    bases = (data.ImageDataModule, data.ArrayDataModule)
    others = {*bases, data.AudioDataModule, data.ForecastSeries}
    classified = {x.__name__: x for x in every if isinstance(x, type) and issubclass(x, bases) and x not in others}
    config = zoo.info(network) if kind is None and network in entries() else None
    kind = kind or (str(config["data"]["class_path"]).rpartition(".")[2] if config else "Digits")
    made: Any = choose(classified, kind, "data set")
    if image_size is not None and not issubclass(made, data.ImageDataModule):
        raise ConfigurationError(f"image_size is of images, and {kind} has none: leave it out")
    given |= {} if image_size is None else {"image_size": image_size}
    return make_data(config, **given) if config else made(**given)


def describe(
    network: str,
    kind: str | None = None,
    root: str | None = None,
    batch_size: int = 128,
    image_size: int | None = None,
    steps: int = 5,
    device: str = "cpu",
    precision: str = "32-true",
    **network_kwargs: Any,
) -> dict[str, Any]:
    """Say what a network is and what its training costs here; steps are those of AdamW on random images.

    Args:
        network: Registered name of a network, or of a zoo entry.
        kind: Data set, a class of :mod:`lightning_msnn.data`, which says size and number of images; by default that
            of a zoo entry, and ``"Digits"`` for any other network.
        root: Folder of the data.
        batch_size: Images of a step.
        image_size: Height and width of the images, by default the data's.
        steps: Steps that are timed.
        device: Device to train on.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        **network_kwargs: Further arguments of the network.

    Returns:
        ``parameters``; ``operations`` of an image (``dense``, of which ``accumulates`` at the predicted
        rates); ``activations`` (bytes kept for the backward pass), ``memory`` (bytes of the peak of a training step
        beyond the process before); ``step`` and ``epoch`` (seconds); ``images`` of an epoch; ``energy`` (joules of an
        image, None with ``why`` where rates cannot be predicted).

    Raises:
        ConfigurationError: If an argument is not allowed, or there is no such network or data.
    """
    check_integer("batch_size", batch_size, 2)
    check_integer("steps", steps, 1)
    choose({"32-true": 1, "bf16-mixed": 1}, precision, "precision")
    on = check_device(device)
    network = {name.replace(".", "_"): name for name in entries()}.get(network, network)
    datamodule = _data(network, kind, root, batch_size, image_size)
    datamodule.check("fit")
    datamodule.prepare_data()
    datamodule.setup("fit")
    images = len(datamodule.train_dataloader().dataset)
    size, frames = datamodule.image_size, getattr(datamodule, "time_steps", 1)
    sides = [size, size] if isinstance(size, int) else list(size)
    shape = [*([frames] if frames > 1 else []), datamodule.in_chans, *sides]
    before = forget_peak(on)
    task = SpikingClassifier(
        network, datamodule.num_classes, datamodule.in_chans, network_kwargs, pretrained="." in network
    ).to(on)
    model: nn.Module = task.network
    optimizer = torch.optim.AdamW(task.parameters(), fused=True)
    batch = torch.randn(batch_size, *shape, device=on)
    targets = torch.randint(datamodule.num_classes, (batch_size,), device=on)

    def loss() -> Tensor:
        with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = task(batch)
        return task.loss(outputs.float(), targets)

    task.train()
    times = []
    for i in range(_WARMUP + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        if i >= _WARMUP:
            times.append(time.perf_counter() - start)
    memory = peak_memory(on) - before
    activations = _activations(task, loss)
    fresh = timm.create_model(
        network, pretrained="." in network, num_classes=datamodule.num_classes, in_chans=datamodule.in_chans,
        **network_kwargs,
    ).eval()  # fmt: skip
    operations = synaptic_operations(count_operations(fresh, torch.randn(1, *shape)))
    found: dict[str, Any] = {
        "network": network,
        "data": type(datamodule).__name__,
        "image": [datamodule.in_chans, *sides],
        "batch_size": batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operations": {"dense": float(operations["dense"])},
        "activations": activations,
        "memory": memory,
        "step": median(times),
        "images": images,
        "epoch": median(times) * images / batch_size,
        "energy": None,
    }
    try:
        with torch.no_grad():
            rates = predict_rates(fresh)
            cost = CostOfRates(fresh, torch.randn(1, *shape))
            found["energy"] = float(cost.joules(rates))
            found["operations"]["accumulates"] = float(cost.accumulates(rates))
    except ConfigurationError as error:
        found["why"] = str(error)
    return found


def _text(found: dict[str, Any]) -> str:
    """What the command line prints."""
    mib = 2.0**20
    channels, height, width = found["image"]
    accumulates = found["operations"].get("accumulates")
    at_rates = "" if accumulates is None else f", {accumulates / 1e6:.1f} M accumulates at the predicted rates"
    energy = f"{found['energy']:.3g} J" if found["energy"] is not None else f"not known: {found['why']}"
    return "\n".join(
        [
            f"{found['network']} on {found['data']}, {channels}x{height}x{width}, batches of {found['batch_size']}",
            f"parameters            {found['parameters'] / 1e6:.2f} M",
            f"operations an image   {found['operations']['dense'] / 1e6:.1f} M synaptic{at_rates}",
            f"activations a step    {found['activations'] / mib:.0f} MiB kept for the backward pass",
            f"peak memory a step    {found['memory'] / mib:.0f} MiB with weights, gradients and AdamW's state",
            f"time a step           {found['step']:.3f} s",
            f"time an epoch         {found['epoch']:.0f} s for {found['images']} images, without loading them",
            f"energy an image       {energy}",
        ]
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(prog="lightning-msnn describe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("network", help="name of a network or of a zoo entry")
    parser.add_argument("--data", help="data set, a class of lightning_msnn.data (default: a zoo entry's, else Digits)")
    parser.add_argument("--root", help="folder of the data (default: that of the data set)")
    parser.add_argument("--batch_size", type=int, default=128, help="images of a step (default: 128)")
    parser.add_argument("--image_size", type=int, help="height and width of the images (default: the data's)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default: 5)")
    parser.add_argument("--device", default="cpu", help="device to train on (default: cpu)")
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: 32-true)")
    parser.add_argument("--imports", action="append", default=[], help=HELP)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the verb."""
    given = make_parser().parse_args(args)
    try:
        import_files(given.imports)
        found = describe(
            given.network, given.data, given.root, given.batch_size, given.image_size, given.steps, given.device,
            given.precision,
        )  # fmt: skip
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {explained(error, '--imports')}\n")
        sys.exit(2)
    sys.stdout.write(f"{_text(found)}\n")
