"""What every task shares: network, optimizer and schedule, metrics, checkpoints; a task adds its loss and metrics."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import timm
import timm.optim
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_msnn.conversion import adopt, baselines
from lightning_msnn.entries import entries, find, read_config, read_weights, warm_start
from lightning_msnn.errors import ConfigurationError, UnknownNameError, check_integer, choose, suggestion
from lightning_msnn.models.registry import make_network, own_class
from lightning_msnn.runs.checkpoints import is_checkpoint, network_state, read_checkpoint
from lightning_msnn.runs.trainer import planned, refuse_shards
from lightning_msnn.tasks.optimization import SCHEDULES, Muon, make_schedule, named_groups

# Lightning 2.6 asks torch 2.13 for a leaf in a way that warns in each training, and a user can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")

__all__ = ["Task", "TrainingStepCallback", "only_size"]


class TrainingStepCallback(pl.Callback):
    """A callback that takes part in training steps, as :class:`lightning_msnn.callbacks.Teacher` does.

    A training step of a :class:`Task` asks each of them, in the order of the Trainer's callbacks.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise a ConfigurationError for a module whose training steps do not ask it."""
        if stage == "fit" and not isinstance(pl_module, Task):
            who = type(self).__name__
            raise ConfigurationError(f"{who} must be left out: {type(pl_module).__name__} is no Task, which calls it")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Raise a ConfigurationError for a training step that has not asked it."""
        if not pl_module._asks_callbacks:
            who, step = type(self).__name__, f"training_step of {type(pl_module).__name__}"
            raise ConfigurationError(f"{who} must be left out, or {step} call super().training_step(batch, batch_idx)")

    def change_batch(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets that the step learns from. Metrics use the data's own targets."""
        return inputs, targets

    def change_loss(self, task: Task, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the loss of the step, a scalar.

        Args:
            task: The task.
            loss: The loss so far.
            inputs: What the network was given.
            outputs: What it returned.
        """
        return loss


def _plain(values: Any) -> dict[str, Any]:
    """Arguments with NumPy's numbers as Python's and paths as text: what a checkpoint may hold."""

    def to_plain(value: Any) -> Any:
        value = value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    plain: dict[str, Any] = tree_map(to_plain, dict(values))
    return plain


def only_size(network: nn.Module) -> tuple[int, int] | None:
    """Return height and width of the images of a network that takes no others, as timm's transformers."""
    embed = getattr(network, "patch_embed", None)
    return tuple(embed.img_size) if embed is not None and getattr(embed, "strict_img_size", False) else None


class Task(pl.LightningModule):
    """A network in training; a subclass gives its losses and metrics.

    It overrides :meth:`losses` and, if it needs to, :meth:`loss`, :meth:`make_metrics` and :meth:`unpack`. Batches are
    ``(images, targets)``, images ``(B, in_chans, H, W)``, normalised. What is optional is a callback: a teacher, mixed
    images, a frozen stem, conversion, a target of energy; see :mod:`lightning_msnn.callbacks`.

    Its arguments are those of :class:`~lightning_msnn.tasks.SpikingClassifier` without the last two; ``num_classes`` is
    the number of the network's outputs.

    Raises:
        ConfigurationError: If an argument is not allowed, or the data does not fit the network.
    """

    def __init__(
        self,
        network: str | nn.Module = "msnn_resnet12_tiny",
        num_classes: int = 10,
        in_chans: int = 3,
        network_kwargs: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        optimizer: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        schedule: Literal["cosine", "one_cycle", "triangle", "constant"] = "cosine",
        warmup_epochs: float = 5.0,
    ) -> None:
        super().__init__()
        name = f"{type(network).__name__}()" if isinstance(network, nn.Module) else str(network)
        if isinstance(network, str) and not timm.is_model(name) and own_class(name) is None:
            raise UnknownNameError(
                f"unknown network {name!r}: allowed are {', '.join(timm.list_models('msnn*'))}, every other name in "
                f"timm.list_models(), and a class of yours that is imported{suggestion(name, timm.list_models())}",
                "network",
                name,
            )
        if pretrained is True and not timm.is_model(name):
            raise ConfigurationError(f"pretrained must be false, an entry or a checkpoint with {name}, not true")
        if optimizer not in (known := timm.optim.list_optimizers()):
            raise ConfigurationError(
                f"unknown optimizer {optimizer!r}: allowed are adamw, sgd and every other name in "
                f"timm.optim.list_optimizers(){suggestion(str(optimizer), known)}"
            )
        choose(dict.fromkeys(SCHEDULES), schedule, "schedule")
        check_integer("num_classes", num_classes, 1)
        for key, value in {"lr": lr, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs}.items():
            if not (isinstance(value, int | float | np.number) and 0.0 <= value < math.inf):
                raise ConfigurationError(f"{key} must be a finite number of at least 0, not {value!r}")
        if isinstance(network, nn.Module) and network_kwargs and "layers" not in network_kwargs:
            raise ConfigurationError(f"network_kwargs are for a network that is named, not for {name}")
        if not isinstance(pretrained, bool):
            pretrained = os.fspath(pretrained)
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else None)
        self.hparams.update(_plain({**self.hparams, "network": name}))
        if isinstance(network, nn.Module):
            if type(network).__name__ == "OptimizedModule":
                raise ConfigurationError("a compiled network renames its weights: use network.compile() in its place")
            head = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
            if (its := getattr(head, "out_features", num_classes)) != num_classes:
                raise ConfigurationError(f"num_classes is {num_classes}, but the network that is given has {its}")
            self.network = network
            if network_kwargs:  # of the checkpoint of a converted one
                adopt(network, **network_kwargs)
        else:
            given = {"num_classes": num_classes, "in_chans": in_chans, **(network_kwargs or {})}
            self.network = make_network(name, **given, **({"pretrained": True} if pretrained is True else {}))
        self._started_from = name if pretrained is True else pretrained or None
        if isinstance(pretrained, str):
            from_file = is_checkpoint(pretrained)
            weights = network_state(read_checkpoint(pretrained)) if from_file else read_weights(find(pretrained))
            taken = warm_start(self.network, weights, pretrained)
            total = sum(parameter.numel() for parameter in self.network.parameters())
            rank_zero_info("started from %s: %.2f of %.2f million parameters", pretrained, taken / 1e6, total / 1e6)
        elif not pretrained and name in entries():
            rank_zero_info("%s starts at random: pretrained true gives it its weights", name)
        self._groups = named_groups(self.network, weight_decay, optimizer)
        self._planned_steps: int | None = None
        self._asks_callbacks = False
        self.class_names: list[str] = [str(i) for i in range(num_classes)]
        self.preprocessing: dict[str, Any] = {}
        metrics = MetricCollection(dict(self.make_metrics(num_classes)))
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # Sums over images, so that neither the size of batches nor the number of processes is in the mean.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.test_loss = MeanMetric(nan_strategy="disable")

    # What a task says

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return what is measured in training, validation and test, by name; each is updated with outputs and targets.

        Args:
            num_classes: Outputs of the network.
        """
        return {}

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the network's inputs and the targets of a batch."""
        inputs, targets = batch
        return inputs, targets

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, ``(B,)``: validation and test report its mean."""
        raise NotImplementedError(f"{type(self).__name__} must say its losses")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a training step, a scalar; targets are as callbacks have changed them."""
        return self.losses(outputs, targets).mean()

    # The network

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to outputs ``(B, num_classes)``, which are logits in a classification."""
        images = images.to(self.dtype)  # data modules give float32, and bf16-true has weights of another type
        if images.dim() == 4:
            images = images.to(memory_format=torch.channels_last)  # which is faster
        outputs: Tensor = self.network(images)
        return outputs

    def twins(self, images: Tensor) -> dict[str, nn.Module]:
        """Return the baselines that a report compares this network with, by name, in eval mode.

        Images ``(B, in_chans, H, W)`` set the statistics of their batch norms.
        """
        return baselines(self.network, images)

    def made_of(self) -> tuple[str, dict[str, Any]]:
        """Return name and arguments that build the network again, beside the numbers of classes and channels.

        A zoo entry's tag is not in the name: what the entry says is among the arguments.
        """
        name, kwargs = str(self.hparams["network"]), dict(self.hparams["network_kwargs"] or {})
        own = self._arguments()
        if own is None and name not in entries():
            return name, kwargs
        arguments = {**read_config(find(name))["model_args"], **kwargs} if own is None else dict(own)
        architecture = getattr(self.network, "architecture", name.partition(".")[0])
        return architecture, {k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")}

    def _arguments(self) -> dict[str, Any] | None:
        """Arguments of a network of this package or of a converted one, with which it says that it was built."""
        own = getattr(self.network, "arguments", None)
        return dict(own) if hasattr(self.network, "architecture") and isinstance(own, Mapping) else None

    # Data and checkpoints

    def check_data(self, datamodule: Any) -> None:
        """Compare the network's shape with the data's before any work starts.

        Args:
            datamodule: Anything; attributes ``num_classes``, ``in_chans``, ``image_size`` and ``train_sizes`` are
                compared if there.

        Raises:
            ConfigurationError: If the number of classes or channels differs, or a network of one size of images would
                be given another.
        """
        data = type(datamodule).__name__
        for name in ("num_classes", "in_chans"):
            theirs = getattr(datamodule, name, None)
            if theirs is not None and theirs != self.hparams[name]:
                raise ConfigurationError(
                    f"model.{name} is {self.hparams[name]}, but {data} has {theirs}: set model.{name} to {theirs}"
                )
        only = only_size(self.network)
        sizes = [getattr(datamodule, "image_size", None), *(getattr(datamodule, "train_sizes", None) or {}).values()]
        for size in (size for size in sizes if size is not None):
            if only is not None and only != ((size, size) if isinstance(size, int) else tuple(size)):
                raise ConfigurationError(
                    f"{self.hparams['network']} takes images of {only[0]}x{only[1]} pixels alone, but {data} has "
                    f"{size}: give network_kwargs that img_size, or the data one size"
                )

    def setup(self, stage: str) -> None:
        """Check the data, and take over the names of its classes and its preprocessing.

        Raises:
            ConfigurationError: If the data does not fit.
        """
        if self._compiler_ctx is not None:
            raise ConfigurationError("compile in place: task.network.compile(dynamic=False), not torch.compile(task)")
        finders = [c for c in self.trainer.callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)]  # type: ignore[attr-defined]
        if stage == "fit" and any(not finder._early_exit for finder in finders):  # as those of a Tuner do
            what = f"{type(finders[0]).__name__} changes what the schedule was built of"
            raise ConfigurationError(f"{what}: leave it out, and use Lightning's Tuner before fit")
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and stage != "predict":
            self.check_data(datamodule)
            names = list(getattr(datamodule, "class_names", self.class_names))
            self.class_names = names if stage == "fit" else self._agreed(names, type(datamodule).__name__)
            if all(hasattr(datamodule, name) for name in ("image_size", "mean", "std")):
                self.preprocessing = {
                    "data": f"{type(datamodule).__module__}.{type(datamodule).__name__}",
                    "image_size": datamodule.image_size,
                    "mean": list(datamodule.mean),
                    "std": list(datamodule.std),
                }
                self._tell_timm()
        if stage == "fit":
            self._planned_steps = None  # of an earlier training; a resumed one is restored later
            # Before a strategy shards them.
            self._groups = named_groups(self.network, self.hparams["weight_decay"], self.hparams["optimizer"])

    def _tell_timm(self) -> None:
        """Say what the network takes in its ``pretrained_cfg``, for timm's transforms and hub."""
        cfg, seen = getattr(self.network, "pretrained_cfg", None), self.preprocessing
        if isinstance(cfg, dict) and seen.get("mean"):
            sides = [seen["image_size"]] * 2 if isinstance(seen["image_size"], int) else seen["image_size"]
            for stale in ("test_input_size", "test_crop_pct", "test_pool_size", "label_descriptions"):
                cfg.pop(stale, None)
            cfg |= {"input_size": (self.hparams["in_chans"], *sides), "crop_pct": 1.0, "interpolation": "bilinear"}
            cfg |= {"mean": tuple(seen["mean"]), "std": tuple(seen["std"])}
            cfg |= {"num_classes": len(self.class_names), "label_names": tuple(self.class_names)}

    def _agreed(self, names: list[str], source: str) -> list[str]:
        """Return names of classes, if they are those that are known; as many numbers are no names."""
        known = self.class_names
        numbers = [str(i) for i in range(len(known))]
        if names != known and (len(names) != len(known) or numbers not in (names, known)):
            raise ConfigurationError(f"{source} has the classes {names!s:.99}, but known are {known!s:.99}")
        return names

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store class names, preprocessing and how the network is built again, as plain values."""
        checkpoint["class_names"] = list(self.class_names)
        checkpoint["preprocessing"] = dict(self.preprocessing)
        checkpoint["started_from"] = self._started_from
        checkpoint["planned_steps"] = self._planned_steps
        made = self._arguments() or {}  # complete, whatever the defaults of later versions
        shape = {key: self.hparams[key] for key in ("num_classes", "in_chans")}
        checkpoint["network_arguments"] = _plain(made | shape) if made else {}
        # Whoever loads the checkpoint needs neither the entry that its network is named by nor what it started from.
        hparams, (name, kwargs) = {**self.hparams, "pretrained": False}, self.made_of()
        if name != hparams["network"] or name == "spiking":  # whose layers are found only once
            hparams |= {"network": name, "network_kwargs": kwargs}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = _plain(hparams)
        of_data = pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
        if of_data in checkpoint:
            checkpoint[of_data] = _plain(checkpoint[of_data])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names of the classes, unless the Trainer's data has others, and the preprocessing."""
        self.class_names = self._agreed(list(checkpoint.get("class_names", self.class_names)), "the checkpoint")
        self.preprocessing = dict(checkpoint.get("preprocessing", self.preprocessing))
        self._tell_timm()
        self._started_from = checkpoint.get("started_from", self._started_from)
        self._planned_steps = checkpoint.get("planned_steps")

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; metrics are of the targets as they come from the data."""
        self._asks_callbacks = True
        inputs, targets = self.unpack(batch)
        parts = [part for part in self.trainer.callbacks if isinstance(part, TrainingStepCallback)]  # type: ignore[attr-defined]
        mixed, goals = inputs, targets
        for part in parts:
            mixed, goals = part.change_batch(self, mixed, goals)
        outputs = self(mixed)
        loss = self.loss(outputs.float(), goals)  # with many classes a sum of exponentials loses digits in bf16
        for part in parts:
            loss = part.change_loss(self, loss, mixed, outputs)
        self.train_metrics.update(outputs.detach().float(), targets)
        self.log("train/loss_step", loss, prog_bar=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.log("train/lr", max(group["lr"] for group in self.optimizers().param_groups))  # type: ignore[union-attr]
        return loss

    def _begin(self) -> None:
        """Reset the metrics, outside inference mode so that a later training can update them."""
        with torch.inference_mode(False):
            for sums in (self.val_metrics, self.val_loss, self.test_metrics, self.test_loss):
                sums.reset()
            for mean in (self.val_loss, self.test_loss):  # whose sums bf16-true has made bfloat16
                mean.set_dtype(torch.promote_types(mean.dtype, torch.float32))

    on_validation_epoch_start = on_test_epoch_start = _begin

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection, mean_loss: MeanMetric) -> dict[str, Tensor]:
        inputs, targets = self.unpack(batch)
        if inputs.dim() == 4 and "mean" not in self.preprocessing:
            self.preprocessing["image_size"] = list(inputs.shape[2:])  # of data that does not say it
        outputs = self(inputs).float()
        losses = self.losses(outputs, targets)
        mean_loss.update(losses)
        metrics.update(outputs, targets)
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True, add_dataloader_idx=False)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, add_dataloader_idx=False)
        return {"loss": losses.mean(), "outputs": outputs, "targets": targets}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Accumulate loss and metrics of the validation set, and return ``loss``, ``outputs`` and ``targets``."""
        return self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Accumulate loss and metrics of the test set, and return ``loss``, ``outputs`` and ``targets``."""
        return self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    # Optimizer and schedule

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from the hyper-parameters.

        Raises:
            ConfigurationError: If a schedule has no end, or another than the training that is resumed.
        """
        h = self.hparams
        # FSDP puts its own module around some.
        parameters = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in self.network.named_parameters()}
        groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in self._groups]
        own = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("network.")]
        for decay, some in ((h["weight_decay"], [p for p in own if p.ndim > 1]), (0.0, [p for p in own if p.ndim < 2])):
            groups += [{"params": some, "weight_decay": decay, "orthogonal": False}] if some else []  # a subclass's
        # A fused step takes half the time on a CPU; in mixed precision Lightning does not clip gradients before it.
        kind = timm.optim.get_optimizer_class(h["optimizer"], bind_defaults=False)
        fused = not self.trainer.gradient_clip_val and self.device.type in ("cpu", "cuda")
        options = {"fused": fused} if "fused" in signature(kind).parameters else {}
        if h["optimizer"] == "muon":
            refuse_shards(self.trainer.strategy, "muon")
            optimizer: Optimizer = Muon(groups, h["lr"])
        else:
            optimizer = create_optimizer_v2(groups, h["optimizer"], lr=h["lr"], **options)
        if h["schedule"] == "constant":
            return optimizer
        total = planned(self.trainer, f"the {h['schedule']} schedule")
        if self._planned_steps not in (None, total):
            raise ConfigurationError(
                f"the {h['schedule']} schedule of the training that is resumed ends at step {self._planned_steps}, not "
                f"at {total}: give max_epochs, max_steps and devices as before, or start another with model.pretrained"
            )
        self._planned_steps = total
        self.trainer.fit_loop.setup_data()  # else the batches of an epoch may not be known yet
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # inf if data has no length
        schedule = make_schedule(optimizer, h["schedule"], total, epoch, h["warmup_epochs"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
