"""Knowledge distillation: a network learns from what a trained one says of the same images, and from its blocks.

Sources: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531; blocks are compared as
in Romero and others, *FitNets: Hints for Thin Deep Nets*, arXiv 1412.6550.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.errors import ConfigurationError, check_number
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.synapse import CentredConv2d, PatchConv2d, PointwiseConv2d
from lightning_msnn.tasks import Task, TrainingStepCallback
from lightning_msnn.tasks.base import only_size
from lightning_msnn.trained import load_trained

__all__ = ["Teacher", "block_loss", "block_names", "distillation_loss"]


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's classes to the student's, both softened.

    It is multiplied by the square of the temperature, so that its gradient does not shrink with it.

    Args:
        logits: Logits of the student, ``(B, num_classes)``.
        taught: Logits of the teacher, of that shape.
        temperature: Both are divided by it.

    Returns:
        The mean over the images, a scalar of at least 0.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(taught.float() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def block_loss(blocks: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """How far blocks of the student are from those of the teacher.

    Args:
        blocks: Output of each block of the student.
        taught: Outputs of the teacher's, in the same shapes.

    Returns:
        Mean square of the difference as a share of the teacher's mean square, the mean over the blocks.
    """
    shares = [
        (blocks[name].float() - goal.float()).square().mean() / goal.float().square().mean().clamp(min=1e-12)
        for name, goal in taught.items()
    ]
    return torch.stack(shares).mean()


def block_names(network: nn.Module) -> list[str]:
    """Return the names of a network's blocks: the parts of the stages that timm's ``feature_info`` names."""
    names: list[str] = []
    for info in getattr(network, "feature_info", ()):
        name = info["module"].removesuffix(".feature")  # where blocks pass on more than a map
        name = f"{name}.blocks" if hasattr(network.get_submodule(name), "blocks") else name
        stage = network.get_submodule(name)
        inner = isinstance(stage, nn.Sequential | nn.ModuleList)
        names += [f"{name}.{part}" for part, _ in stage.named_children()] if inner else [name]
    return names


class Teacher(TrainingStepCallback):
    """Let a task's network learn from a trained one too: ``(1 - weight) loss + weight distillation``.

    The teacher runs in evaluation mode with its batch norm folded, and sees the images of the training step as it
    normalises its own. Only ``fit`` loads it, and no checkpoint holds it. ``train/distillation`` and ``train/blocks``
    are logged.

    Args:
        source: A checkpoint (a path that ends in ``.ckpt``), an entry of the zoo, or any pretrained network of timm's,
            with the student's classes.
        weight: Share of the teacher in the loss, in (0, 1]; the targets have the rest.
        temperature: Logits are divided by it before classes are compared, above 0.
        blocks: Weight of :func:`block_loss`, which is added; for a teacher with the student's blocks, such as its ReLU
            baseline or the network that it was converted from.

    Raises:
        ConfigurationError: If an argument is not allowed; when training starts, if there is no such network, or it has
            other classes, channels or blocks than the student.
    """

    def __init__(self, source: str, weight: float = 0.5, temperature: float = 2.0, blocks: float = 0.0) -> None:
        if check_number("weight of the teacher", weight) == 0.0:
            raise ConfigurationError("weight of the teacher must be above 0, not 0: leave out the teacher")
        if not (0.0 < temperature < float("inf") and 0.0 <= blocks < float("inf")):
            raise ConfigurationError(
                f"temperature must be above 0 and blocks at least 0, not {temperature} and {blocks}"
            )
        self.source, self.weight, self.temperature, self.blocks = str(source), weight, temperature, blocks
        self.names: list[str] = []
        """Blocks that are compared."""
        self.network: nn.Module | None = None
        """The teacher, while there is a training."""
        self._kept: dict[str, Tensor] = {}
        self._taught: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.normalised: tuple[list[float], list[float]] = ([], [])
        """Mean and standard deviation by channel that its images are normalised with."""
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the teacher, and compare it with student and data."""
        if stage != "fit":
            return
        trained = load_trained(self.source)
        self.normalised = trained.mean, trained.std
        student = pl_module.get_submodule("network")
        theirs = {"num_classes": len(trained.class_names), "in_chans": trained.input_size[0]}
        for name, value in theirs.items():
            if (ours := pl_module.hparams[name]) != value:
                raise ConfigurationError(
                    f"the teacher must have the student's {name}, {ours}: {self.source} has {value}"
                )
        named = [str(name) for name in getattr(getattr(trainer, "datamodule", None), "class_names", [])]
        if named and named != trained.class_names and sorted(named) == sorted(trained.class_names):
            raise ConfigurationError(f"the data has its classes in another order than the teacher {self.source}")
        if named and not set(named) & set(trained.class_names) and not trained.class_names[0].isdecimal():
            rank_zero_warn(f"the teacher {self.source} knows other classes than the data's, such as {named[0]}")
        if self.blocks:
            known = set(block_names(trained.network))
            self.names = [name for name in block_names(student) if name in known]
            if not self.names:
                raise ConfigurationError(
                    f"blocks needs a teacher with blocks of the student's names, such as {block_names(student)[:1]}: "
                    f"{self.source} has {', '.join(sorted(known)[:3]) or 'none'}"
                )
        self.network = fold_batch_norm(trained.network.requires_grad_(False))
        for module in self.network.modules():
            if isinstance(module, CentredConv2d | PatchConv2d | PointwiseConv2d):
                module.train()  # matrix products where they are faster, whose rounding depends on the batch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the teacher to the device and precision of the training, and watch the blocks."""
        assert self.network is not None
        precisions = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
        dtype = precisions.get(str(trainer.precision).partition("-")[0], torch.float32)
        network = self.network.to(pl_module.device, dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seen = getattr(pl_module, "preprocessing", {})
        ours: tuple[Any, Any] = seen.get("mean"), seen.get("std")
        theirs = self.normalised
        self._scale = self._shift = None
        if all(ours) and all(theirs) and (list(ours[0]), list(ours[1])) != (list(theirs[0]), list(theirs[1])):
            our_mean, our_std, its_mean, its_std = (
                torch.tensor(x, device=pl_module.device).view(-1, 1, 1) for x in (*ours, *theirs)
            )
            self._scale, self._shift = our_std / its_std, (our_mean - its_mean) / its_std
        self._unhook()
        for name in self.names:
            for kept, module in ((self._kept, pl_module.get_submodule("network")), (self._taught, network)):
                self._handles.append(module.get_submodule(name).register_forward_hook(partial(_keep, kept, name)))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images, normalised as the student's, to the teacher's logits ``(B, num_classes)``."""
        assert self.network is not None
        if self._scale is not None and self._shift is not None:
            images = images * self._scale + self._shift
        size, network = only_size(self.network), self.network
        if size is not None and images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(next(network.parameters()).dtype)
            logits: Tensor = network(images.to(memory_format=torch.channels_last))
        return logits

    def change_loss(self, task: Task, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the loss with the teacher's share."""
        distilled = distillation_loss(outputs, self(inputs), self.temperature)
        loss = torch.lerp(loss, distilled, self.weight)
        task.log("train/distillation", distilled)
        if not self.names:
            return loss
        for name, block in self._kept.items():
            if block.shape != (shape := self._taught[name].shape):
                raise ConfigurationError(
                    f"blocks needs a teacher with blocks of the student's sizes: {name} of {self.source} returns "
                    f"{list(shape)}, not {list(block.shape)}"
                )
        apart = block_loss(self._kept, self._taught)
        task.log("train/blocks", apart)
        self._kept.clear()
        self._taught.clear()
        return loss + self.blocks * apart

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept.clear()
        self._taught.clear()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no more."""
        self._unhook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no more."""
        self._unhook()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say who taught the network."""
        checkpoint["teacher"] = self.source


def _keep(kept: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Keep what a block returns; recurrent ones return their membranes beside the map."""
    kept[name] = output[0] if isinstance(output, tuple) else output
