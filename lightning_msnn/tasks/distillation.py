"""Knowledge distillation: a network learns from what a trained one says of the same images, and from its blocks.

Sources: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531; what blocks return is
compared as in Romero and others, *FitNets: Hints for Thin Deep Nets*, arXiv 1412.6550.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.entries import entries, find, read_config
from lightning_msnn.errors import ConfigurationError, suggestion
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.synapse import CentredConv2d, PatchConv2d, PointwiseConv2d
from lightning_msnn.runs.checkpoints import is_checkpoint, network_of, read_checkpoint

__all__ = ["HOTTEST", "Teacher", "block_names", "distillation_loss", "feature_loss", "only_size", "watched"]

HOTTEST = 1000.0
"""Highest temperature: all classes are the same by then."""


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Cross entropy from the teacher's classes to the student's, both softened, less the teacher's own entropy.

    It is multiplied by the square of the temperature, so that its gradient does not shrink with it.

    Args:
        logits: Logits of the student, ``(B, num_classes)``.
        taught: Logits of the teacher, of that shape.
        temperature: What both are divided by.

    Returns:
        The mean over the images, a scalar of at least 0.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(taught.float() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(features: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """How far what blocks of the student return is from what those of the teacher do.

    Args:
        features: What each block of the student returned.
        taught: What those of the teacher did, in the same shapes.

    Returns:
        Mean square of the difference as a share of the mean square of the teacher's, the mean over the blocks.
    """
    shares = [
        (features[name].float() - goal.float()).square().mean() / goal.float().square().mean().clamp(min=1e-12)
        for name, goal in taught.items()
    ]
    return torch.stack(shares).mean()


def only_size(network: nn.Module) -> tuple[int, int] | None:
    """Return height and width of the images of a network that is known to take no others."""
    embed = getattr(network, "patch_embed", None)
    return tuple(embed.img_size) if embed is not None and getattr(embed, "strict_img_size", False) else None


def _stages(network: nn.Module) -> dict[str, str]:
    """Return the names of a network's stages, and the size of what each makes of an image."""
    # Where blocks pass on more than a map, timm finds it in a module beside them.
    return {
        info["module"].removesuffix(".feature"): f"{info['num_chs']} channels at 1/{info['reduction']} of the image"
        for info in getattr(network, "feature_info", ())
    }


def block_names(network: nn.Module) -> list[str]:
    """Return the names of a network's blocks: the parts of what timm's ``feature_info`` names."""
    names: list[str] = []
    for name in _stages(network):
        name = f"{name}.blocks" if hasattr(network.get_submodule(name), "blocks") else name
        stage = network.get_submodule(name)
        inner = isinstance(stage, nn.Sequential | nn.ModuleList)
        names += [f"{name}.{part}" for part, _ in stage.named_children()] if inner else [name]
    return names


@contextmanager
def watched(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what modules of a network return while it runs.

    Args:
        network: The network.
        names: Names of the modules.

    Yields:
        What each returned last, by its name.
    """
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        # Recurrent blocks return their membranes beside the map.
        return lambda module, args, output: kept.update({name: output[0] if isinstance(output, tuple) else output})

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class Teacher:
    """A trained network that another learns from, in evaluation mode and with its batch norm folded.

    It is no module, so that it is in no checkpoint, has no gradients and is not copied with the student.

    Args:
        source: A checkpoint of :class:`lightning_msnn.tasks.SpikingClassifier` (a path that ends in ``.ckpt``; where it
            is of a network of timm's own, after its name, ``resnet18:<path>``), an entry of the zoo, or any pretrained
            network of timm's.
        num_classes: Classes of the student.
        in_chans: Channels of the student's images.

    Raises:
        ConfigurationError: If there is no such network, it has no weights, or other classes or channels.
    """

    def __init__(self, source: str, num_classes: int, in_chans: int) -> None:
        self.source = source
        self.mean: Sequence[float] | None = None
        self.std: Sequence[float] | None = None
        self.size: tuple[int, int] | None = None
        """Height and width that images are brought to, where the network takes no others."""
        self.season: int | None = None
        """Values of a season, of a forecaster."""
        self.class_names: list[str] | None = None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        if is_checkpoint(source):
            named, _, path = source.rpartition(":")
            named, path = (named, path) if timm.is_model(named) else ("", source)
            content = read_checkpoint(path)
            hparams = content.get("hyper_parameters", {})
            self._check(hparams.get("num_classes"), num_classes, "num_classes")
            self._check(hparams.get("in_chans"), in_chans, "in_chans")
            network = network_of(content, path, named)
            size = hparams.get("img_size")
            if size is not None and timm.get_pretrained_cfg(hparams["network"].partition(".")[0]).fixed_input_size:
                self.size = (size, size) if isinstance(size, int) else tuple(size)
            seen = content.get("preprocessing", {})
            self.mean, self.std = seen.get("mean"), seen.get("std")
            self.season, self.class_names = hparams.get("season"), content.get("class_names")
        else:
            network = self._named(source, num_classes, in_chans)
        self.size = only_size(network) or self.size
        self.network = fold_batch_norm(network.eval().requires_grad_(False))
        for module in self.network.modules():
            if isinstance(module, CentredConv2d | PatchConv2d | PointwiseConv2d):
                module.train()  # matrix products where they are faster: what it says may round with the batch

    def _named(self, source: str, num_classes: int, in_chans: int) -> nn.Module:
        if any(source.replace(".", "_") == entry.replace(".", "_") for entry in entries()):
            folder = find(source)
            config = read_config(folder)
            classes, channels, self.class_names = config["num_classes"], config["input_size"][0], config["class_names"]
            self.mean, self.std = config["mean"], config["std"]
            source = f"local-dir:{folder}"  # also of an entry that was made after timm has heard of them
        else:
            try:
                cfg = timm.get_pretrained_cfg(source) if timm.is_model(source) else None
            except RuntimeError:  # a tag that the network has not
                cfg = None
            if cfg is None or not cfg.has_weights:
                known = [*entries(), *timm.list_pretrained()]
                raise ConfigurationError(
                    f"unknown teacher {source!r}: allowed are a .ckpt file, an entry of the zoo "
                    f"({', '.join(entries())}) and every name in timm.list_pretrained(){suggestion(source, known)}"
                )
            classes, channels = cfg.num_classes, cfg.input_size[0]
            self.mean, self.std = cfg.mean, cfg.std
            self.size = tuple(cfg.input_size[1:]) if cfg.fixed_input_size else None
        self._check(classes, num_classes, "num_classes")  # before weights are fetched
        self._check(channels, in_chans, "in_chans")
        network: nn.Module = timm.create_model(source, pretrained=True)
        return network

    def _check(self, theirs: Any, ours: int, name: str) -> None:
        if theirs != ours:
            raise ConfigurationError(f"the teacher must have the student's {name}, {ours}: {self.source} has {theirs}")

    def check_data(self, datamodule: Any) -> None:
        """Compare names of classes with those of the data.

        Args:
            datamodule: Anything; an attribute ``class_names`` is compared if there.

        Raises:
            ConfigurationError: If it has the same classes in another order.
        """
        ours, theirs = getattr(datamodule, "class_names", None), self.class_names
        if not ours or not theirs or list(ours) == list(theirs):
            return
        if sorted(ours) == sorted(theirs):
            raise ConfigurationError(
                f"the data has its classes in another order than the teacher {self.source}: {ours[0]} is first, not "
                f"{theirs[0]}"
            )
        if not all(name.isdigit() for name in ours) and not all(name.isdigit() for name in theirs):
            rank_zero_warn(
                f"the teacher {self.source} knows other classes than the data's: {theirs[0]} is first, not {ours[0]}"
            )

    def blocks_of(self, student: nn.Module) -> list[str]:
        """Return the names of the blocks that a student has too.

        Args:
            student: The student.

        Raises:
            ConfigurationError: If there is none, or one is of another size.
        """
        theirs = block_names(self.network)
        names = [name for name in block_names(student) if name in theirs]
        if not names:
            raise ConfigurationError(
                "teacher_features needs a teacher with blocks of the student's names, as its twin or what it was "
                f"converted from has: {self.source} has {', '.join(theirs[:3]) or 'none'}"
            )
        own, its = _stages(student), _stages(self.network)
        for name, size in own.items():
            if its.get(name, size) != size:
                raise ConfigurationError(
                    f"teacher_features needs a teacher with blocks of the student's sizes: {name} of {self.source} has "
                    f"{its[name]}, not {size}"
                )
        return names

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """A copy of a student has the same teacher."""
        return self

    def prepare(
        self,
        device: torch.device,
        dtype: torch.dtype,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Go where the student is.

        Args:
            device: Device of the images.
            dtype: Data type of the teacher's weights.
            mean: Mean by channel that the student's images are normalised with, if known.
            std: Standard deviation, likewise.
        """
        self.network.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._scale = self._shift = None
        if mean is None or std is None or self.mean is None or self.std is None:
            return
        if (list(mean), list(std)) != (list(self.mean), list(self.std)):
            our_mean, our_std, its_mean, its_std = (
                torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std, self.mean, self.std)
            )
            self._scale, self._shift = our_std / its_std, (our_mean - its_mean) / its_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images, normalised as the student's, to outputs ``(B, num_classes)``.

        Args:
            images: Images ``(B, in_chans, H, W)``, or frames ``(B, T, in_chans, H, W)``.
        """
        if self._scale is not None and self._shift is not None:
            images = images * self._scale + self._shift
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(dtype)
            if images.dim() == 4:
                images = images.to(memory_format=torch.channels_last)
            logits: Tensor = self.network(images)
        return logits
