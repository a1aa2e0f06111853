"""Figures of an entry: measured on its real test set, and compared with those of its card."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from lightning_msnn.conversion import baselines
from lightning_msnn.energy import NETWORK, evenly, summarize
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.trained import inputs_of_entry
from lightning_msnn.zoo.card import ENERGIES
from lightning_msnn.zoo.loading import fixed_images, info, load

__all__ = ["TOLERANCES", "evaluate", "figures", "test_data", "verify"]

BATCH = 250
"""Images of a batch."""

TOLERANCES: dict[str, float] = {
    **dict.fromkeys(("parameters", "top1_images", "energy_images"), 0.0),
    **dict.fromkeys(("spike_rate", "mean_level", "accumulates", "graded_products", "multiply_accumulates"), 0.01),
    **dict.fromkeys((name + of for name in ENERGIES for of in ("", "_ann_twin")), 0.01),
}
"""Relative differences that are allowed between measured figures and those of the card. Kernels and processors round
differently, and one spike in thousands then differs. Accuracies may differ by 0.1 percentage points or one image,
whichever is more, and logits of the fixed images, which are computed in float64, by 0.001."""


def test_data(
    entry: str | Path,
    data: str | Path | LightningDataModule | None = None,  # noqa: PT028  # no test
    batch_size: int = BATCH,  # noqa: PT028
) -> LightningDataModule:
    """Return the test data of an entry, set up, with the preprocessing of its network.

    Args:
        entry: Name of the entry, in either spelling, or its folder.
        data: Folder of the data set; some need none. Or the data module itself.
        batch_size: Inputs of a batch.

    Raises:
        ConfigurationError: If the data is not there, has other classes, or is none of :mod:`lightning_msnn.data` and
            not given.
    """
    return inputs_of_entry(entry).test_data(data, batch_size=batch_size, num_workers=0)


@torch.inference_mode()
def evaluate(model: nn.Module, data: LightningDataModule, device: str | torch.device | None = None) -> dict[str, float]:
    """Classify the test images of a data module.

    Args:
        model: Network in eval mode.
        data: Data module, set up for testing.
        device: Device that the network is on.

    Returns:
        ``top1`` and ``top5`` in percent with two digits, and the number of images, ``top1_images``.
    """
    hits, images = torch.zeros(2, dtype=torch.int64), 0
    for batch in data.test_dataloader():
        pixels, targets = data.on_after_batch_transfer([part.to(device) for part in batch], 0)
        if targets.dim() > 1 or targets.is_floating_point():
            raise ConfigurationError(f"an entry or a report needs classes, and {type(data).__name__} has other targets")
        logits = model(pixels)
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        images += len(targets)
    top1, top5 = (round(100 * number / images, 2) for number in hits.tolist())
    return {"top1": top1, "top5": top5, "top1_images": images}


def figures(
    config: dict[str, Any],
    network: nn.Module,
    data: LightningDataModule,
    device: str | torch.device | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure everything that a card says of a network.

    Args:
        config: What :func:`~lightning_msnn.zoo.info` says of the entry.
        network: The entry's network in eval mode.
        data: Its data module, set up for testing.
        device: Device that the network is on.

    Returns:
        Figures by the name that ``config.json`` has for them; and the summary of all that was counted.
    """
    batches = (images.to(device) for images in evenly(data))
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 moves spikes
        accuracy = evaluate(network, data, device)
        records = compare(network, partial(baselines, network, lif=False), batches)
        # In float64 no rounding decides whether a neuron fires whose membrane lies next to its threshold.
        logits = deepcopy(network).cpu().double()(fixed_images(config).double())
    summaries = {column: summarize(record) for column, record in records.items()}
    own = summaries[NETWORK]
    found: dict[str, Any] = {
        **accuracy,
        "parameters": own["parameters"],
        "accumulates": round(own["counts"]["accumulates"]),
        "multiply_accumulates": round(own["counts"]["multiply_accumulates"]),
        "energy_images": own["samples"],
        "energy_sampling": "evenly of all classes, seed 0",
        "logits_of_fixed_images": [[round(v, 6) for v in row] for row in logits.tolist()],
    }
    if own["spike_rate"] is not None:
        found["spike_rate"] = round(own["spike_rate"], 4)
    if own["counts"]["graded_products"]:
        found["graded_products"] = round(own["counts"]["graded_products"])
        found["mean_level"] = round(own["mean_level"], 4)
    for column, of in ((NETWORK, ""), ("ANN twin", "_ann_twin")):
        if column in summaries:
            found |= {name + of: summaries[column]["energies"][way] for name, way in ENERGIES.items()}
    return found, own


def _differs(field: str, claimed: Any, found: dict[str, Any]) -> bool:
    """Whether a figure of a card is not what was found."""
    if claimed is None or field not in found:
        return True
    if isinstance(claimed, str):
        return bool(claimed != found[field])
    if field == "logits_of_fixed_images":
        theirs, ours = torch.tensor(claimed), torch.tensor(found[field])
        return theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.0, atol=1e-3)
    allowed = TOLERANCES[field] * claimed if field in TOLERANCES else max(0.1, 100 / found["top1_images"]) + 0.005
    return bool(abs(found[field] - claimed) > allowed)


def verify(
    name: str,
    data: str | Path | LightningDataModule | None = None,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Measure an entry on its real test set, and compare every figure with its card.

    Args:
        name: Name of the entry, in either spelling.
        data: Folder of the data set; digits need none. Or the data module itself.
        batch_size: Images of a batch.
        device: Device to evaluate on.

    Returns:
        What was measured, by the name that ``config.json`` has for it.

    Raises:
        ConfigurationError: If there is no such entry or data, or a figure differs from the card's by more than
            :data:`TOLERANCES` allow, is missing, or cannot be measured.
    """
    config, module = info(name), test_data(name, data, batch_size)
    found, _ = figures(config, load(name, device=device), module, device)
    claims = {*found, *(TOLERANCES.keys() & config.keys())}
    wrong = [field for field in sorted(claims) if _differs(field, config.get(field), found)]
    if wrong:
        said = (
            f"{field} differ"
            if field == "logits_of_fixed_images"
            else f"{field} is {found.get(field)}, but the card says {config.get(field)}"
            for field in wrong
        )
        raise ConfigurationError(f"{inputs_of_entry(name).name} is not what its card says: {'; '.join(said)}")
    return found
