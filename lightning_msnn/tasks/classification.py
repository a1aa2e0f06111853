"""LightningModules: what is trained, with which loss, optimizer, schedule and metrics."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose, suggestion
from lightning_msnn.models.twins import TWINS, twins
from lightning_msnn.models.weights import find, read_weights, warm_start
from lightning_msnn.runs.checkpoints import is_checkpoint, network_state, read_checkpoint
from lightning_msnn.tasks.conversion import convert_network, converted_twins, fit_neurons
from lightning_msnn.tasks.distillation import Teacher, distillation_loss

__all__ = ["OPTIMIZERS", "SCHEDULES", "SpikingClassifier", "decayed_names", "parameter_groups", "warmup_cosine"]

OPTIMIZERS = ("adamw", "sgd")
"""Optimizers by the name that configurations use."""

SCHEDULES = ("cosine", "one_cycle", "constant")
"""Learning rate schedules by the name that configurations use; all go by the step."""


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the learning rate: linear from 0 to 1 over ``warmup`` steps, then half a cosine down to ``floor``.

    Args:
        step: Optimizer steps taken so far.
        total: Steps of the whole training.
        warmup: Steps of the warm-up.
        floor: Factor at the end.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decayed_names(module: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that decay.

    Vectors and scalars (norms, biases, decays tau, theta) do not decay, nor does what the network's own
    ``no_weight_decay()`` names.

    Args:
        module: The network, before a strategy has cut its parameters into pieces.
    """
    spared = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()  # type: ignore[operator]
    return frozenset(name for name, p in module.named_parameters() if p.ndim > 1 and name not in spared)


def parameter_groups(
    module: nn.Module, weight_decay: float, decayed: frozenset[str] | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into those that decay and those that do not.

    Args:
        module: The network.
        weight_decay: Weight decay of the first.
        decayed: What :func:`decayed_names` said before a strategy such as FSDP made vectors of all parameters; by
            default what it says now.
    """
    names = decayed_names(module) if decayed is None else decayed
    # FSDP puts its own module around some.
    named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in names], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in names], "weight_decay": 0.0},
    ]


class SpikingClassifier(pl.LightningModule):
    """Image classification by a network from timm's registry.

    Batches are ``(images, targets)``: float images ``(B, in_chans, H, W)``, normalised, and integer targets ``(B,)``.
    To predict, they are ``(images, files)``.

    Args:
        network: Registered name of the network, ``timm.list_models("msnn*")`` or any other of timm's.
        num_classes: Classes of the read-out; must be the data's.
        in_chans: Channels of the images; must be the data's.
        network_kwargs: Further arguments of the network, such as ``theta``, ``windows``, ``context``.
        pretrained: Whether to start from the weights that belong to the name.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        mixup: Alpha of the Beta distribution that mixup draws from; 0 is off.
        cutmix: Alpha of the Beta distribution that cutmix draws from; 0 is off. With both, each batch gets one.
        mix_prob: Share of the batches that are mixed, in [0, 1]; or shares by the epoch that they begin with, such as
            ``{0: 0.5, 40: 0}``, and no batch is mixed before the first of them.
        optimizer: ``"adamw"`` or ``"sgd"`` (with Nesterov momentum 0.9).
        lr: Peak learning rate.
        lr_base_size: Images of a step, over all processes and accumulated batches, that ``lr`` is meant for; the rate
            grows linearly with those that there are (Goyal et al., arXiv 1706.02677). By default ``lr`` is the rate
            whatever their number.
        weight_decay: Weight decay of weights; norms, biases, tau and theta have none.
        schedule: ``"cosine"`` (after a linear warm-up), ``"one_cycle"`` or ``"constant"``, each by the step.
        warmup_epochs: Length of the warm-up in epochs, or of one-cycle's rise; at most 30 % of the training.
        channels_last: Whether the network keeps its tensors in channels-last order, which is faster.
        init_from: Zoo entry of another network to start from, such as ``"msnn_resnet12.c100"``, or a checkpoint of this
            class (a path that ends in ``.ckpt``): what fits by name and shape is taken over, the rest starts at random.
        twin: ``"relu"`` trains the network's twin in its place: rectifiers instead of neurons, and no windows.
        convert: Whether to convert a network with rectifiers, once it has its weights, to a spiking one: true, or a
            dictionary of ``windows``, ``image_size`` and ``teacher``, see
            :func:`lightning_msnn.tasks.conversion.convert_network`. The teacher is then by default the network itself.
        teacher: Network that this one also learns from: a checkpoint of this class (a path that ends in ``.ckpt``), a
            zoo entry, or any pretrained network of timm's. Only ``fit`` loads it, and no checkpoint holds it.
        teacher_weight: Share of the teacher in the loss, in (0, 1]; the labels have the rest.
        teacher_temperature: What logits are divided by before the teacher's classes are compared with the student's.

    Raises:
        ConfigurationError: If an argument is not allowed, or the data does not fit the network.
    """

    def __init__(
        self,
        network: str = "msnn_resnet12_tiny",
        num_classes: int = 10,
        in_chans: int = 3,
        network_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        schedule: str = "cosine",
        warmup_epochs: float = 5.0,
        channels_last: bool = True,
        lr_base_size: int | None = None,
        mix_prob: float | dict[int, float] = 1.0,
        init_from: str | None = None,
        twin: str | None = None,
        convert: bool | dict[str, Any] = False,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        teacher_temperature: float = 2.0,
    ) -> None:
        super().__init__()
        choose(dict.fromkeys(OPTIMIZERS), optimizer, "optimizer")
        choose(dict.fromkeys(SCHEDULES), schedule, "schedule")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigurationError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        for value, name in (
            (mixup, "mixup"),
            (cutmix, "cutmix"),
            (lr, "lr"),
            (weight_decay, "weight_decay"),
            (warmup_epochs, "warmup_epochs"),
        ):
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigurationError(f"{name} must be a finite number of at least 0, not {value}")
        for epoch, share in (mix_prob if isinstance(mix_prob, dict) else {0: mix_prob}).items():
            check_integer("an epoch of mix_prob", epoch, 0)
            check_number("mix_prob", share)
        if not timm.is_model(network):
            hint = suggestion(network, timm.list_models())
            raise ConfigurationError(
                f"unknown network {network!r}: allowed are {', '.join(timm.list_models('msnn*'))} "
                f"and every other name in timm.list_models(){hint}"
            )
        check_integer("num_classes", num_classes, 2)
        if init_from is not None and pretrained:
            raise ConfigurationError(
                f"init_from must not be given beside pretrained: the weights are {network}'s own or {init_from}'s"
            )
        if lr_base_size is not None:
            check_integer("lr_base_size", lr_base_size, 1)
        if twin is not None:
            choose(TWINS, twin, "twin")
        if check_number("teacher_weight", teacher_weight) == 0.0:
            raise ConfigurationError("teacher_weight must be above 0, not 0: leave out the teacher")
        if not (math.isfinite(teacher_temperature) and teacher_temperature > 0.0):
            raise ConfigurationError(f"teacher_temperature must be a finite number above 0, not {teacher_temperature}")
        self.save_hyperparameters()
        self.network = timm.create_model(
            network, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **(network_kwargs or {})
        )
        if twin is not None:
            self.network = TWINS[twin](self.network)
        self._started_from = network if pretrained else init_from
        if init_from is not None:
            from_file = is_checkpoint(init_from)
            weights = network_state(read_checkpoint(init_from)) if from_file else read_weights(find(init_from))
            taken = warm_start(self.network, weights, init_from)
            total = sum(parameter.numel() for parameter in self.network.parameters())
            rank_zero_info("started from %s: %.2f of %.2f million parameters", init_from, taken / 1e6, total / 1e6)
        self._to_fit = bool(convert)
        if convert:
            self.hparams.update(convert_network(self.network, self.hparams))
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._decayed = decayed_names(self.network)
        self.teacher: Teacher | None = None
        self.class_names: list[str] = [str(i) for i in range(num_classes)]
        self.preprocessing: dict[str, Any] = {}
        mixers = [
            *([v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []),
            *([v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []),
        ]
        self.mix: nn.Module | None = v2.RandomChoice(mixers) if mixers else None
        top5 = min(5, num_classes)
        metrics = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=top5, average="micro"),
            }
        )
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # Sums over images, so that neither the size of batches nor the number of processes is in the mean.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.test_loss = MeanMetric(nan_strategy="disable")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        images = images.to(self.dtype)  # data modules give float32, and bf16-true has weights of another type
        if self.hparams["channels_last"]:
            images = images.to(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def twins(self, images: Tensor) -> dict[str, nn.Module]:
        """Return the networks that a report compares this one with: with ReLU, and with LIF neurons at T = 4.

        Args:
            images: Images ``(B, in_chans, H, W)`` that set the statistics of their batch norms.

        Returns:
            Twins in eval mode by name; none for a network of which there are no twins.
        """
        converted = converted_twins(self.network, images)
        return twins(self.network, images) if converted is None else converted

    def _prepare_metrics(self, metrics: MetricCollection, mean_loss: MeanMetric) -> None:
        """Begin an evaluation with sums that lose no digit to their order."""
        with torch.inference_mode(False):  # tensors made in inference mode could not be added to when fitting
            if mean_loss.device.type != "mps":  # which has no float64
                mean_loss.set_dtype(torch.float64)
            mean_loss.reset()
            metrics.reset()

    def on_validation_epoch_start(self) -> None:
        """Begin the sums of a validation."""
        self._prepare_metrics(self.val_metrics, self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Begin the sums of a test."""
        self._prepare_metrics(self.test_metrics, self.test_loss)

    def check_data(self, datamodule: Any) -> None:
        """Compare the network's shape with that of the data before any work starts.

        Args:
            datamodule: Anything; attributes ``num_classes``, ``in_chans`` and ``class_names`` are compared if there.

        Raises:
            ConfigurationError: If the number of classes or channels differs.
        """
        for name in ("num_classes", "in_chans"):
            theirs = getattr(datamodule, name, None)
            if theirs is not None and theirs != self.hparams[name]:
                raise ConfigurationError(
                    f"model.{name} is {self.hparams[name]}, but {type(datamodule).__name__} has {theirs}: "
                    f"set model.{name} to {theirs}"
                )

    def load_teacher(self) -> None:
        """Load the teacher, if there is one and it is not there yet.

        Raises:
            ConfigurationError: If there is no such network, or it has other classes or channels than this one.
        """
        if self.hparams["teacher"] is not None and self.teacher is None:
            self.teacher = Teacher(self.hparams["teacher"], self.hparams["num_classes"], self.hparams["in_chans"])

    def setup(self, stage: str) -> None:
        """Check the data, take over the names of its classes, and load the teacher."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and stage != "predict":
            self.check_data(datamodule)
            self.class_names = list(getattr(datamodule, "class_names", self.class_names))
            if all(hasattr(datamodule, name) for name in ("image_size", "mean", "std")):
                self.preprocessing = {
                    "data": type(datamodule).__name__,
                    "image_size": datamodule.image_size,
                    "mean": list(datamodule.mean),
                    "std": list(datamodule.std),
                }
        if stage == "fit":
            self.load_teacher()

    def on_fit_start(self) -> None:
        """Let the teacher have the device and the precision of the training."""
        if self.teacher is not None:
            precisions = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
            dtype = precisions.get(str(self.trainer.precision).partition("-")[0], torch.float32)
            normalised = {name: self.preprocessing[name] for name in ("mean", "std") if name in self.preprocessing}
            self.teacher.prepare(self.device, dtype, **normalised)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Fit the neurons of a network that has just been converted."""
        if self._to_fit and self.global_step == 0 and batch_idx == 0:
            fit_neurons(self, self.network, batch)
        self._to_fit = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store class names, preprocessing of the images and how the network was made, as plain values."""
        checkpoint["class_names"] = list(self.class_names)
        checkpoint["preprocessing"] = dict(self.preprocessing)
        # The hyper-parameters leave out what an entry of the zoo that was started from has set.
        checkpoint["network_arguments"] = dict(getattr(self.network, "arguments", {}))
        # Whoever loads the checkpoint needs no longer what the training started from.
        checkpoint["started_from"] = self._started_from
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**self.hparams, "init_from": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names of the classes and the preprocessing."""
        self.class_names = list(checkpoint.get("class_names", self.class_names))
        self.preprocessing = dict(checkpoint.get("preprocessing", self.preprocessing))
        self._started_from = checkpoint.get("started_from", self._started_from)

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix to a batch, if they are on and it is its turn."""
        share = self.hparams["mix_prob"]
        if isinstance(share, dict):
            share = share[max(begun)] if (begun := [e for e in share if e <= self.current_epoch]) else 0.0
        # No number is drawn where nothing depends on it.
        if self.mix is None or share == 0.0 or (share < 1.0 and torch.rand(()).item() >= share):
            return images, targets
        mixed: tuple[Tensor, Tensor] = self.mix(images, targets)
        return mixed

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        # In float32: with many classes the sum of exponentials loses digits in bf16.
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.hparams["label_smoothing"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; accuracies are those of the labels before mixing."""
        images, targets = batch
        mixed_images, mixed_targets = self._mixed(images, targets)
        logits = self(mixed_images)
        loss = self._loss(logits, mixed_targets)
        if self.teacher is not None:
            distilled = distillation_loss(logits, self.teacher(mixed_images), self.hparams["teacher_temperature"])
            loss = torch.lerp(loss, distilled, self.hparams["teacher_weight"])
            self.log("train/distillation", distilled)
        self.train_metrics.update(logits.detach().float(), targets)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> None:
        images, targets = batch
        logits = self(images).float()
        mean_loss.update(F.cross_entropy(logits, targets, reduction="none"))
        metrics.update(logits, targets)
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate loss and accuracies of the validation set."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate loss and accuracies of the test set."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Classify a batch.

        Args:
            batch: Images ``(B, in_chans, H, W)``, alone or followed by the names of their files.
            batch_idx: Number of the batch.

        Returns:
            ``file`` (names, if given), ``class`` (names), ``index`` ``(B,)``, ``probability`` ``(B,)`` of that class
            and ``logits`` ``(B, num_classes)``.
        """
        images, files = batch if isinstance(batch, list | tuple) else (batch, [])
        logits = self(images).float()
        probability, index = logits.softmax(1).max(1)
        names = [self.class_names[i] for i in index.tolist()]
        return {"file": list(files), "class": names, "index": index, "probability": probability, "logits": logits}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from the hyper-parameters."""
        h = self.hparams
        groups = parameter_groups(self.network, h["weight_decay"], self._decayed)
        lr = h["lr"] * self._lr_scale()
        optimizer: torch.optim.Optimizer
        # A fused step takes half the time on a CPU; in mixed precision Lightning does not clip gradients before it.
        fused = not self.trainer.gradient_clip_val and self.device.type in ("cpu", "cuda")
        if h["optimizer"] == "sgd":
            optimizer = SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=fused)
        else:
            optimizer = AdamW(groups, lr=lr, fused=fused)
        if h["schedule"] == "constant":
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        epochs = max(1, self.trainer.max_epochs or 1)
        warmup = min(0.3, h["warmup_epochs"] / epochs)
        scheduler: LRScheduler
        if h["schedule"] == "one_cycle":
            rise = min(max(warmup, 1.5 / total), 0.99)  # OneCycleLR divides by the length of the rise
            scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=total + 1, pct_start=rise)
        else:
            steps = round(warmup * total)
            scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_scale(self) -> float:
        """Images of a step divided by those that the learning rate is meant for."""
        base = self.hparams["lr_base_size"]
        if base is None:
            return 1.0
        self.trainer.fit_loop.setup_data()  # else Lightning makes the loader later
        batch_size = getattr(self.trainer.train_dataloader, "batch_size", None)
        if batch_size is None:
            raise ConfigurationError(f"lr_base_size must not be given, not {base}: the loader has no batch size")
        return float(batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size / base)
