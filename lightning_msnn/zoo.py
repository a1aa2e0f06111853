"""The zoo: trained networks by name, verified by hash, and their export from a Lightning checkpoint.

>>> from lightning_msnn import zoo
>>> zoo.load("msnn_resnet12_tiny_digits").num_classes
10

On the command line: ``python -m lightning_msnn.zoo list | info | verify | export | card | table``.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from lightning_msnn.errors import ConfigurationError, choose
from lightning_msnn.models.backbone import MSNN, PRESETS, entry_cfg
from lightning_msnn.models.weights import CONFIG_FILE, WEIGHTS_FILE, entries, find, read_config, resolve
from lightning_msnn.nn.folding import fold_batch_norm

__all__ = [
    "DATA_OF_TAGS",
    "TOLERANCE",
    "evaluate",
    "export",
    "fixed_images",
    "info",
    "list_models",
    "load",
    "resolve",
    "test_data",
    "transforms",
    "verify",
]

DATA_OF_TAGS = {"digits": "Digits", "c10": "CIFAR10", "c100": "CIFAR100", "tin": "TinyImageNet200"}
"""Data set of an entry by its tag, or by what comes before an underscore in it, as in ``c100_relu``."""

TOLERANCE = 0.1
"""Percentage points by which a top-1 accuracy may differ from that of the card: kernels and processors round otherwise,
and a membrane next to its threshold then fires or does not."""


def list_models(filter: str = "*", pretrained: bool = True) -> list[str]:
    """List the networks of the zoo.

    Args:
        filter: Pattern of shell wildcards that a name must match.
        pretrained: List the entries with weights; else every registered architecture too.
    """
    names = list(entries())
    if not pretrained:
        names += timm.list_models("msnn*")
    return sorted(name for name in names if fnmatch(name, filter) or fnmatch(name.replace(".", "_"), filter))


def info(name: str) -> dict[str, Any]:
    """Return the ``config.json`` of an entry: its network, recipe and measured figures.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return read_config(find(name))


def _cfg(name: str) -> PretrainedCfg:
    """Return timm's configuration of an entry, also of one that came after the package was imported."""
    folder = find(name)
    architecture, _, tag = folder.name.partition(".")
    return PretrainedCfg(**entry_cfg(folder), architecture=architecture, tag=tag)


def load(
    name: str,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    device: str | torch.device | None = None,
    fuse: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load a network of the zoo in eval mode.

    Args:
        name: Name of the entry, in either spelling.
        pretrained: Whether to load its weights, whose sha256 is checked.
        num_classes: Classes of a new read-out; by default the entry's own, with its weights.
        in_chans: Channels of the images; by default the entry's own. The stem is adapted as timm adapts its own.
        device: Device to move the network to.
        fuse: Fold batch norm into synapses and thresholds: the same outputs, faster, for inference only.
        **kwargs: Further arguments of the network.

    Raises:
        ConfigurationError: If there is no such entry, its files are not what they should be, or an argument is not
            allowed.
    """
    cfg = _cfg(name)
    model: nn.Module = timm.create_model(
        cfg.architecture, pretrained, pretrained_cfg=cfg, num_classes=num_classes, in_chans=in_chans, **kwargs
    )
    model.eval()
    return (fold_batch_norm(model) if fuse else model).to(device)


def transforms(name: str) -> Any:
    """Return the preprocessing of an entry, a function from a PIL image to the network's input ``(C, H, W)``.

    Args:
        name: Name of the entry, in either spelling.

    Raises:
        ConfigurationError: If there is no such entry.
    """
    return create_transform(**resolve_data_config(_cfg(name).to_dict()))


def fixed_images(config: dict[str, Any]) -> Tensor:
    """Return two images that are the same everywhere, to compare logits with those of a card.

    Args:
        config: ``config.json`` of the entry.

    Returns:
        Images ``(2, C, H, W)``, normalised as the entry's data.
    """
    channels, height, width = config["input_size"]
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(size) for size in (2, channels, height, width)), indexing="ij"
    )
    pixels = (row * (7 + 4 * image) + column * 13 + channel * 29) % 256
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


def test_data(config: dict[str, Any], root: str | Path | None, batch_size: int) -> Any:
    """Return the data module of an entry, its test part ready.

    Args:
        config: ``config.json`` of the entry.
        root: Folder of the data set; digits need none.
        batch_size: Images of a batch.

    Raises:
        ConfigurationError: If no data set goes with its tag, or the data is not there.
    """
    from lightning_msnn import data  # Lightning is needed to evaluate, not to load

    kind = choose(DATA_OF_TAGS, config["tag"].partition("_")[0], "tag of a zoo entry with data")
    arguments = {} if root is None else {"root": root}
    module = getattr(data, kind)(batch_size=batch_size, image_size=config["input_size"][1], num_workers=0, **arguments)
    module.check("test")
    module.prepare_data()
    module.setup("test")
    return module


@torch.inference_mode()
def evaluate(model: nn.Module, data: Any, device: str | torch.device | None = None) -> dict[str, float]:
    """Classify the test images of a data module.

    Args:
        model: Network in eval mode.
        data: Data module of :mod:`lightning_msnn.data`, set up for testing.
        device: Device that the network is on.

    Returns:
        ``top1`` and ``top5`` in percent, and the number of ``images``.
    """
    hits = torch.zeros(2, dtype=torch.int64)
    images = 0
    for batch in data.test_dataloader():
        pixels, targets = data.on_after_batch_transfer([part.to(device) for part in batch], 0)
        logits = model(pixels)
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        images += len(targets)
    return {"top1": 100 * hits[0].item() / images, "top5": 100 * hits[1].item() / images, "images": images}


def verify(
    name: str,
    data: str | Path | None = None,
    batch_size: int = 250,
    device: str | torch.device | None = None,
    fuse: bool = False,
) -> dict[str, float]:
    """Evaluate an entry on its real test set and compare with its card.

    Args:
        name: Name of the entry, in either spelling.
        data: Folder of the data set; digits need none.
        batch_size: Images of a batch.
        device: Device to evaluate on.
        fuse: Whether to verify the network with batch norm folded.

    Returns:
        ``top1`` and ``top5`` in percent, the number of ``images``, and the card's top-1, ``claimed``.

    Raises:
        ConfigurationError: If there is no such entry or data, or top-1 differs from the card's by more than
            :data:`TOLERANCE`, or was measured on another number of images.
    """
    config = info(name)
    found = evaluate(load(name, device=device, fuse=fuse), test_data(config, data, batch_size), device)
    claimed = config.get("top1")
    if claimed is None or abs(found["top1"] - claimed) > TOLERANCE or found["images"] != config.get("top1_images"):
        raise ConfigurationError(
            f"{resolve(name)} has a top-1 of {found['top1']:.2f} % on {found['images']} test images, but its card says "
            f"{claimed} % on {config.get('top1_images')}"
        )
    return {**found, "claimed": claimed}


def _pinned() -> dict[str, Any]:
    """Return the defaults that decide what a network computes, so that later ones leave an entry as it is."""
    free = {"mixer", "in_chans", "num_classes", "global_pool", "depths", "widths", "drop_rate", "drop_path_rate"}
    return {name: p.default for name, p in signature(MSNN).parameters.items() if name not in free}


def export(checkpoint: str | Path, name: str, folder: str | Path = "zoo", half: bool = False, **fields: Any) -> Path:
    """Make a zoo entry of a Lightning checkpoint.

    The weights are those that the checkpoint evaluates with: the moving average where there is one.

    Args:
        checkpoint: Checkpoint of a :class:`lightning_msnn.tasks.SpikingClassifier`.
        name: timm name of the entry, ``<architecture>.<tag>``.
        folder: Folder of the zoo.
        half: Whether to keep the weights in float16; the network that loads them still computes in float32.
        **fields: Further fields of ``config.json``, such as recipe and figures; plain values.

    Returns:
        The folder of the entry.

    Raises:
        ConfigurationError: If the checkpoint cannot be read or is of another network, a weight is beyond float16, or
            the entry exists.
    """
    from lightning_msnn.checkpoints import network_state, read_checkpoint  # Lightning is needed to export, not to load

    content = read_checkpoint(checkpoint)
    hparams, data = content.get("hyper_parameters", {}), content.get("preprocessing", {})
    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture):
        raise ConfigurationError(f"an entry is named <architecture>.<tag>, not {name!r}")
    if str(hparams.get("network")).partition(".")[0] != architecture or not data:
        raise ConfigurationError(
            f"{str(checkpoint)!r} is of network {hparams.get('network')!r}, not of {architecture!r}"
        )
    target = Path(folder) / name
    if target.exists():
        raise ConfigurationError(f"{target} exists: remove it to make the entry anew")
    given = dict(hparams.get("network_kwargs") or {})
    given = PRESETS[given.pop("preset", "default")] | given | content.get("network_arguments", {})
    for stated in ("num_classes", "in_chans"):
        given.pop(stated, None)
    state = network_state(content)
    if half:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value.half()
                if not state[key].isfinite().all():
                    raise ConfigurationError(f"{key} of {str(checkpoint)!r} has values beyond float16")
    weights = safetensors.torch.save(state, {"format": "pt"})
    config = {
        "architecture": architecture,
        "tag": tag,
        "num_classes": hparams["num_classes"],
        "input_size": [hparams["in_chans"], data["image_size"], data["image_size"]],
        "mean": data["mean"],
        "std": data["std"],
        "class_names": content["class_names"],
        "network_kwargs": _pinned() | given,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "weights": "float16" if half else "float32",
    }
    # What it takes to make the entry includes what these took.
    origin = {"init_from": content.get("started_from"), "teacher": hparams.get("teacher")}
    config |= {key: name for key, name in origin.items() if name is not None}
    config |= fields
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        made = Path(temporary) / name
        made.mkdir()
        (made / WEIGHTS_FILE).write_bytes(weights)
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.move(made, target)
    return target


def _run(given: argparse.Namespace) -> str:
    """Do what the command line asks for; return what it prints."""
    if given.command == "list":
        rows = []
        for name in list_models(given.filter, pretrained=not given.all):
            config = info(name) if name in entries() else {}
            rows.append(f"{name:32s} {config.get('top1', '-')!s:>6} % top-1" if config else name)
        return "\n".join(rows) or "no entry matches"
    if given.command == "info":
        return json.dumps(info(given.name), indent=2)
    if given.command == "verify":
        found = verify(given.name, given.data, given.batch_size, given.device, given.fuse)
        return (
            f"{resolve(given.name)}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on {found['images']} "
            f"test images; its card says {found['claimed']} %"
        )
    from lightning_msnn import cards  # draws pictures and counts operations, which loading needs not

    if given.command == "table":
        return cards.table(list_models())
    if given.command == "export":
        fields = json.loads(Path(given.fields).read_text(encoding="utf-8")) if given.fields else {}
        folder = export(given.checkpoint, given.name, given.folder, given.half, **fields)
        try:
            cards.complete(folder, given.data, given.checkpoint)
        except ConfigurationError:
            shutil.rmtree(folder)
            raise
        return f"{folder} made"
    folder = find(given.name)
    cards.write_card(folder)
    return f"card of {folder.name} written"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line of the zoo.

    Args:
        args: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_msnn.zoo", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="entries and their accuracy")
    listing.add_argument("filter", nargs="?", default="*", help="pattern of shell wildcards")
    listing.add_argument("--all", action="store_true", help="untrained architectures too")
    commands.add_parser("table", help="accuracy, spike rate and energy of all entries, in Markdown")
    for name, text in (
        ("info", "config.json of an entry"),
        ("verify", "evaluate an entry on its test set; fails if its card is wrong"),
        ("card", "write the model card of an entry anew from its config.json"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", help="name of the entry")
        if name == "verify":
            command.add_argument("--data", help="folder of the data set (digits need none)")
            command.add_argument("--batch_size", type=int, default=250)
            command.add_argument("--device", help="device to evaluate on")
            command.add_argument("--fuse", action="store_true", help="with batch norm folded")
    exporting = commands.add_parser("export", help="make an entry of a checkpoint, measure it and write its card")
    exporting.add_argument("checkpoint", help="checkpoint of lightning-msnn fit")
    exporting.add_argument("name", help="<architecture>.<tag>")
    exporting.add_argument("--data", help="folder of the data set (digits need none)")
    exporting.add_argument("--folder", default="zoo", help="folder of the zoo (default: zoo)")
    exporting.add_argument("--half", action="store_true", help="float16 weights, if they cost less than 0.1 points")
    exporting.add_argument("--fields", help="JSON file of further fields: command, recipe, epochs, seed, hardware, ...")
    given = parser.parse_args(args)
    try:
        sys.stdout.write(f"{_run(given)}\n")
    except ConfigurationError as error:
        sys.stderr.write(f"lightning-msnn: error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
