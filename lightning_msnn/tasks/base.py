"""What every task shares: network, optimizer and schedule, distillation, metrics; a task adds its loss and metrics."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any, SupportsFloat

import lightning.pytorch as pl
import numpy as np
import timm
import timm.optim
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from torch.utils._pytree import tree_map
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_msnn.conversion import converted_twins
from lightning_msnn.entries import entries, find, read_config, read_weights, warm_start
from lightning_msnn.errors import ConfigurationError, UnknownNameError, check_integer, check_number, choose, suggestion
from lightning_msnn.models.twins import TWINS, twins
from lightning_msnn.runs.checkpoints import is_checkpoint, network_state, read_checkpoint
from lightning_msnn.runs.strategies import flattens_weights
from lightning_msnn.tasks.conversion import check_strategy, convert_network, fit_neurons, without_shape
from lightning_msnn.tasks.dial import COUNTED, ENDLESS, Dial, check_targets
from lightning_msnn.tasks.distillation import HOTTEST, Teacher, feature_loss, only_size, watched

__all__ = ["SCHEDULES", "Task", "check_positive", "named_groups"]

SCHEDULES = ("cosine", "one_cycle", "constant")
"""Learning rate schedules by the name that configurations use; all go by the step."""

LONGEST_WARMUP = 0.3  # of the training


def named_groups(network: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Return timm's parameter groups of a network, with names in the place of the parameters.

    Vectors and scalars (norms, biases, tau, theta) have no weight decay, nor has what the network's own
    ``no_weight_decay()`` names. Names hold when a strategy such as FSDP has made vectors of all parameters; groups made
    after that would spare all of them.

    Args:
        network: The network, before a strategy has cut its parameters into pieces.
        weight_decay: Weight decay of the parameters that are not spared.
        layer_decay: Factor of the learning rate from a layer to the one below it, by the network's ``group_matcher()``.

    Returns:
        Groups with ``params`` (names), ``weight_decay`` and, with a layer decay, ``lr_scale``; those that decay first.
    """
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    by_layer = partial(param_groups_layer_decay, layer_decay=layer_decay)
    groups = (param_groups_weight_decay if layer_decay is None else by_layer)(
        network, weight_decay, no_weight_decay_list=spared
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    named = [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]
    return sorted(named, key=lambda group: -group["weight_decay"])


def check_positive(name: str, value: float) -> None:
    """Raise a ConfigurationError unless a value is a finite number of at least 0."""
    if not isinstance(value, SupportsFloat) or not 0.0 <= value < math.inf:
        raise ConfigurationError(f"{name} must be a finite number of at least 0, not {value!r}")


def _sides(size: Any) -> str:
    """Text of a height and a width, or of one number that is both; empty of none."""
    return "" if size is None else "x".join(map(str, size if isinstance(size, list | tuple) else (size, size)))


def _plain(values: Any) -> dict[str, Any]:
    """Arguments with NumPy's numbers as Python's and paths as text, however deep: what a checkpoint may hold."""

    def to_plain(value: Any) -> Any:
        value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    plain: dict[str, Any] = tree_map(to_plain, dict(values))
    return plain


class Task(pl.LightningModule):
    """A network of timm's registry that learns; a subclass says from which loss, and what is measured.

    It overrides :meth:`losses`, and where it has to :meth:`loss`, :meth:`make_metrics`, :meth:`unpack` and :meth:`mix`,
    and :meth:`distil` where a teacher may be given.
    Batches are ``(images, targets)``, images ``(B, in_chans, H, W)`` or frames ``(B, T, in_chans, H, W)``, normalised.

    Args:
        network: Registered name of the network, ``timm.list_models("msnn*")`` or any other of timm's.
        num_classes: Outputs of the network; by default the data's classes on the command line.
        in_chans: Channels of the images; by default the data's on the command line.
        network_kwargs: Further arguments of the network, such as ``theta``, ``windows``, ``context``.
        pretrained: Whether to start from the weights that belong to the name.
        img_size: Height and width of the images, for networks that take one size alone; by default the data's on the
            command line.
        optimizer: Name in ``timm.optim.list_optimizers()``; ``"sgd"`` has Nesterov momentum 0.9.
        lr: Peak learning rate.
        lr_base_size: Images of a step, over all processes and accumulated batches, that ``lr`` is meant for; the rate
            grows linearly with those that there are (Goyal et al., arXiv 1706.02677). By default ``lr`` is the rate
            whatever their number.
        weight_decay: Weight decay of weights; norms, biases, tau and theta have none.
        layer_decay: Factor of the learning rate from a layer to the one below it, in (0, 1]; by default 1.
        freeze: Modules of the network that do not learn and keep their statistics: names or shell-style patterns, such
            as ``stem`` or ``stages.[01]``; or ``all_but_head``.
        schedule: ``"cosine"`` (after a linear warm-up), ``"one_cycle"`` or ``"constant"``, each by the step.
        warmup_epochs: Length of the warm-up in epochs, or of one-cycle's rise; at most 30 % of the training.
        channels_last: Whether the network keeps its tensors in channels-last order, which is faster.
        init_from: Zoo entry of another network to start from, such as ``"msnn_resnet12.c100"``, or a checkpoint (a path
            that ends in ``.ckpt``): what fits by name and shape is taken over, the rest starts at random.
        twin: ``"relu"`` trains the network's twin in its place: rectifiers instead of neurons, and no windows.
        convert: Whether to convert a network with rectifiers, once it has its weights, to a spiking one: true, or a
            dictionary of ``windows``, ``image_size`` and ``teacher``, see
            :func:`lightning_msnn.tasks.conversion.convert_network`. The teacher is then by default the network itself.
        teacher: Network that this one also learns from: a checkpoint (a path that ends in ``.ckpt``), a zoo entry, or
            any pretrained network of timm's. Only ``fit`` loads it, and no checkpoint holds it.
        teacher_weight: Share of the teacher in the loss, in (0, 1]; the targets have the rest.
        teacher_temperature: What logits are divided by before the teacher's classes are compared with the student's.
        teacher_features: Weight of a further loss, at least 0: the square of the difference of what blocks of the
            student and of the teacher return, as a share of the teacher's own; for a teacher with the student's blocks,
            as its twin or the network that it was converted from.
        target_rate: Spike rate to train towards, weighted by what spikes cause: accumulates of a sample as a share of
            those that there would be if all neurons fired, in (0, 1]. What exceeds it is part of the loss, see
            :mod:`lightning_msnn.tasks.dial`; a network that needs less is left alone.
        target_energy: Likewise joules of a sample under the default energy profile, in the place of a rate.

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
        img_size: int | tuple[int, int] | None = None,
        optimizer: str = "adamw",
        lr: float = 2e-3,
        lr_base_size: int | None = None,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        freeze: str | list[str] | None = None,
        schedule: str = "cosine",
        warmup_epochs: float = 5.0,
        channels_last: bool = True,
        init_from: str | None = None,
        twin: str | None = None,
        convert: bool | dict[str, Any] = False,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        teacher_temperature: float = 2.0,
        teacher_features: float = 0.0,
        target_rate: float | None = None,
        target_energy: float | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in (known := timm.optim.list_optimizers()):
            raise ConfigurationError(
                f"unknown optimizer {optimizer!r}: allowed are adamw, sgd and every other name in "
                f"timm.optim.list_optimizers(){suggestion(str(optimizer), known)}"
            )
        if not isinstance(network_kwargs, Mapping | None):
            raise ConfigurationError(f"network_kwargs must be arguments by name, not {network_kwargs!r}")
        init_from, teacher = (os.fspath(x) if isinstance(x, os.PathLike) else x for x in (init_from, teacher))
        for name, source in {"network": network, "init_from": init_from or "", "teacher": teacher or ""}.items():
            if not isinstance(source, str):
                raise ConfigurationError(f"{name} must be a name or a checkpoint's path, not a {type(source).__name__}")
        choose(dict.fromkeys(SCHEDULES), schedule, "schedule")
        positive = {"lr": lr, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs}
        for name, value in {**positive, "teacher_features": teacher_features}.items():
            check_positive(name, value)
        if layer_decay is not None and check_number("layer_decay", layer_decay) == 0.0:
            raise ConfigurationError("layer_decay must be above 0, not 0: freeze what must not learn")
        if not timm.is_model(network):
            raise UnknownNameError(
                f"unknown network {network!r}: allowed are {', '.join(timm.list_models('msnn*'))} "
                f"and every other name in timm.list_models(){suggestion(network, timm.list_models())}",
                "network",
                network,
            )
        check_integer("num_classes", num_classes, 1)
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
        if not (isinstance(teacher_temperature, SupportsFloat) and 0.0 < teacher_temperature <= HOTTEST):
            raise ConfigurationError(
                f"teacher_temperature must be a number above 0, at most {HOTTEST}, not {teacher_temperature!r}"
            )
        check_targets(target_rate, target_energy)
        self.save_hyperparameters()
        self.hparams.update(_plain(self.hparams))
        self._as_given = {
            name: self.hparams[name] for name in ("network", "network_kwargs", "teacher", "twin", "convert")
        }
        given = dict(network_kwargs or {})
        if img_size is not None and timm.get_pretrained_cfg(network.partition(".")[0]).fixed_input_size:
            given.setdefault("img_size", img_size)
        self.network = timm.create_model(
            network, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **given
        )
        if twin is not None:
            self.network = TWINS[twin](self.network)
        self._started_from = network if pretrained else init_from
        self._at_random = self._started_from is None  # and so are the weights
        if init_from is not None:
            from_file = is_checkpoint(init_from)
            weights = network_state(read_checkpoint(init_from)) if from_file else read_weights(find(init_from))
            taken = warm_start(self.network, weights, init_from)
            total = sum(parameter.numel() for parameter in self.network.parameters())
            rank_zero_info("started from %s: %.2f of %.2f million parameters", init_from, taken / 1e6, total / 1e6)
        self.unfitted = convert is not False
        """Whether the neurons of a converted network are still to be fitted, to the first batch of a training."""
        if convert is not False:
            self.hparams.update(convert_network(self.network, self.hparams))
            if teacher is None and type(self).distil is Task.distil:
                self.hparams["teacher"] = None  # the task cannot follow one
        elif "source" in given:  # of a network that was built converted: as it can be built again
            self.hparams["network_kwargs"] = without_shape(self.network.arguments)
        if teacher_features and self.hparams["teacher"] is None:
            why = ": what is converted started at random, or from other classes, and teaches nothing" if convert else ""
            raise ConfigurationError(f"teacher_features must be 0 without a teacher, not {teacher_features}{why}")
        self.dial: Dial | None = None
        if target_rate is not None or target_energy is not None:
            self.dial = Dial(self.network, target_rate, target_energy)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if freeze is not None:
            self._freeze(freeze)
            self.train()
        self._groups = named_groups(self.network, weight_decay, layer_decay)
        self._planned_steps: int | None = None
        self.teacher: Teacher | None = None
        self._taught_blocks: list[str] = []
        self.class_names: list[str] = [str(i) for i in range(num_classes)]
        self.preprocessing: dict[str, Any] = {}
        self._learnt_from: Any = None  # height and width of the images that the weights are of
        self._of_entry: dict[str, Any] | None = None  # arguments of the network, if its name is that of an entry
        if network in entries():
            entry = read_config(find(network))
            self._learnt_from = entry["input_size"][1:] if pretrained else None
            self._of_entry = {**entry.get("model_args", {}), **given}
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

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a training step learns from, where that is not the batch itself, as with mixup."""
        return inputs, targets

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, ``(B,)``: what validation and test report the mean of."""
        raise NotImplementedError(f"{type(self).__name__} must say its losses")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a training step, a scalar, from what :meth:`mix` returned as targets."""
        return self.losses(outputs, targets).mean()

    def taught(self, inputs: Tensor) -> Tensor:
        """Return what the teacher makes of a task's inputs, as :meth:`forward` returns it of the network."""
        assert self.teacher is not None
        return self.teacher(inputs)

    def distil(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """Return how far outputs are from what a teacher says, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must say how a teacher is followed")

    # The network

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to outputs ``(B, num_classes)``, which are logits in a classification."""
        images = images.to(self.dtype)  # data modules give float32, and bf16-true has weights of another type
        if self.hparams["channels_last"] and images.dim() == 4:
            images = images.to(memory_format=torch.channels_last)
        outputs: Tensor = self.network(images)
        return outputs

    def seen(self, inputs: Tensor) -> Tensor:
        """Return what the network is given for a task's inputs."""
        return inputs

    def twins(self, images: Tensor) -> dict[str, nn.Module]:
        """Return the networks that a report compares this one with: with ReLU, and with LIF neurons at T = 4.

        Args:
            images: Images ``(B, in_chans, H, W)`` that set the statistics of their batch norms.

        Returns:
            Twins in eval mode by name; none for a network of which there are no twins.
        """
        converted = converted_twins(self.network, images)
        return twins(self.network, images) if converted is None else converted

    def _freeze(self, freeze: str | list[str]) -> None:
        """Let the parameters of named modules not learn."""
        modules = dict(self.network.named_modules())
        if freeze == "all_but_head":
            self.network.requires_grad_(False)
            self.network.get_classifier().requires_grad_(True)
            return
        for pattern in [freeze] if isinstance(freeze, str) else freeze:
            if not (found := [module for name, module in modules.items() if name and fnmatchcase(name, pattern)]):
                raise ConfigurationError(
                    f"freeze {pattern!r} is no module of {self.hparams['network']}: allowed are all_but_head, "
                    f"{', '.join(name for name, _ in self.network.named_children())} and those in them"
                    f"{suggestion(pattern, ['all_but_head', *modules])}"
                )
            for module in found:
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> Task:
        """Set training mode; modules that are frozen as a whole stay in evaluation mode."""
        super().train(mode)
        if mode and self.hparams["freeze"] is not None:
            for module in self.network.modules():
                learns = [parameter.requires_grad for parameter in module.parameters()]
                if learns and not any(learns):
                    module.eval()
        return self

    # Data and checkpoints

    def check_data(self, datamodule: Any) -> None:
        """Compare the network's shape with that of the data before any work starts.

        Args:
            datamodule: Anything; attributes ``num_classes``, ``in_chans``, ``time_steps``, ``image_size`` and
                ``train_sizes`` are compared if there.

        Raises:
            ConfigurationError: If the number of classes or channels differs, data has several time steps, or a network
                of one size of images would be given another.
        """
        data = type(datamodule).__name__
        if (frames := getattr(datamodule, "time_steps", 1)) > 1:
            raise ConfigurationError(f"networks have 1 time step, but {data} has {frames}: set data.time_steps to 1")
        size, by_epoch = getattr(datamodule, "image_size", None), getattr(datamodule, "train_sizes", None) or {}
        fixed = timm.get_pretrained_cfg(self.hparams["network"].partition(".")[0]).fixed_input_size
        if (fixed or only_size(self.network)) and (others := sorted(set(by_epoch.values()) - {size})):
            raise ConfigurationError(
                f"{self.hparams['network']} takes images of one size alone, {size}: data.train_sizes must not have "
                f"{', '.join(map(str, others))}"
            )
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
            ConfigurationError: If there is no such network, it has other classes or channels than this one, or the task
                does not say how a teacher is followed.
        """
        if self.hparams["teacher"] is not None and self.teacher is None:
            if type(self).distil is Task.distil:
                raise ConfigurationError(
                    f"teacher must be null, not {self.hparams['teacher']!r}: {type(self).__name__} does not say, by "
                    "distil, how a teacher is followed"
                )
            self.teacher = Teacher(self.hparams["teacher"], self.hparams["num_classes"], self.hparams["in_chans"])
            if self.hparams["teacher_features"]:
                self._taught_blocks = self.teacher.blocks_of(self.network)

    def setup(self, stage: str) -> None:
        """Check the data, take over the names of its classes, and load the teacher."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and stage != "predict":
            self.check_data(datamodule)
            size, learnt = (_sides(x) for x in (getattr(datamodule, "image_size", None), self._learnt_from))
            if stage != "fit" and size and learnt and size != learnt:
                rank_zero_warn(
                    f"{type(datamodule).__name__} has images of {size} pixels, but the weights have learnt from images "
                    f"of {learnt}: their accuracy is another"
                )
            self.class_names = list(getattr(datamodule, "class_names", self.class_names))
            if all(hasattr(datamodule, name) for name in ("image_size", "mean", "std")):
                self.preprocessing = {
                    "data": type(datamodule).__name__,
                    "image_size": datamodule.image_size,
                    "mean": list(datamodule.mean),
                    "std": list(datamodule.std),
                }
            self._learnt_from = self.preprocessing.get("image_size") if stage == "fit" else self._learnt_from
        if stage == "fit":
            self._planned_steps = None  # of an earlier training; a resumed one is restored later
            if self._at_random and self.trainer.ckpt_path is None and self.hparams["network"] in entries():
                rank_zero_info("%s starts at random: pretrained true gives it its weights", self.hparams["network"])
            self._at_random = False
            if self.unfitted:
                check_strategy(self.trainer.strategy)
            if "muon" in self.hparams["optimizer"] and flattens_weights(self.trainer.strategy):
                raise ConfigurationError(
                    f"optimizer must be another than {self.hparams['optimizer']!r}, which needs whole matrices, with "
                    f"{type(self.trainer.strategy).__name__}, which cuts them up"
                )
            self.load_teacher()
            if self.teacher is not None:
                self.teacher.check_data(datamodule)

    def on_fit_start(self) -> None:
        """Let the teacher have the device and the precision of the training."""
        if self.teacher is not None:
            precisions = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
            dtype = precisions.get(str(self.trainer.precision).partition("-")[0], torch.float32)
            normalised = {name: self.preprocessing[name] for name in ("mean", "std") if name in self.preprocessing}
            self.teacher.prepare(self.device, dtype, **normalised)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Fit the neurons of a network that has just been converted, and find out what spikes cost."""
        if self.unfitted:
            fit_neurons(self, self.network, self.seen(self.unpack(batch)[0]))
        self.unfitted = False
        if self.dial is not None:
            size = self.preprocessing.get("image_size")  # which a training may begin below
            sides = [size, size] if isinstance(size, int) else size
            with self.trainer.precision_plugin.forward_context():
                self.dial.prepare(self.network, self.seen(self.unpack(batch)[0]), sides)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store class names, preprocessing of the images and how the network was made, as plain values."""
        checkpoint["class_names"] = list(self.class_names)
        checkpoint["preprocessing"] = dict(self.preprocessing)
        # The hyper-parameters leave out what an entry of the zoo that was started from has set.
        checkpoint["network_arguments"] = dict(getattr(self.network, "arguments", {}))
        checkpoint["started_from"] = self._started_from
        checkpoint["planned_steps"] = self._planned_steps
        if self.dial is not None:
            checkpoint["dial"] = self.dial.state_dict()
        # Whoever loads the checkpoint needs no longer what the training started from.
        hparams = {**self.hparams, "init_from": None, "pretrained": False}
        architecture, dot, _ = self.hparams["network"].partition(".")
        if dot and (made := checkpoint["network_arguments"] or self._of_entry) is not None:
            hparams |= {"network": architecture, "network_kwargs": without_shape(made)}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = hparams
        checkpoint["as_given"] = self._as_given
        of_data = pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
        if of_data in checkpoint:
            checkpoint[of_data] = _plain(checkpoint[of_data])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names of the classes and the preprocessing."""
        self.class_names = list(checkpoint.get("class_names", self.class_names))
        self.preprocessing = dict(checkpoint.get("preprocessing", self.preprocessing))
        self._learnt_from = self.preprocessing.get("image_size")
        self._started_from, self._at_random = checkpoint.get("started_from", self._started_from), False
        self._planned_steps = checkpoint.get("planned_steps")
        self._as_given = checkpoint.get("as_given", self._as_given)
        self.unfitted = self.unfitted and not checkpoint.get("global_step")
        if self.dial is not None and "dial" in checkpoint:
            self.dial.load_state_dict(checkpoint["dial"])

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; metrics are those of the targets before mixing.

        Raises:
            ConfigurationError: If the batch is of one sample and the network needs more, as batch norm does where its
                map is one pixel.
        """
        inputs, targets = self.unpack(batch)
        mixed, goals = self.mix(inputs, targets)
        try:
            dialled = nullcontext() if self.dial is None else self.dial.watching(self.network)
            with watched(self.network, self._taught_blocks) as features, dialled:
                outputs = self(mixed)
        except ValueError as error:
            if len(mixed) > 1 or isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"a batch of 1 is too small to train {self.hparams['network']}: {error}"
            ) from error
        loss = self.loss(outputs.float(), goals)  # with many classes a sum of exponentials loses digits in bf16
        if self.teacher is not None:
            with watched(self.teacher.network, self._taught_blocks) as taught:
                distilled = self.distil(outputs, self.taught(mixed))
            loss = torch.lerp(loss, distilled, self.hparams["teacher_weight"])
            self.log("train/distillation", distilled)
            if self._taught_blocks:
                apart = feature_loss(features, taught)
                loss = loss + self.hparams["teacher_features"] * apart
                self.log("train/features", apart)
        if self.dial is not None:
            loss = loss + self._dialled(self.dial)
        self.train_metrics.update(outputs.detach().float(), targets)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.log("train/lr", max(group["lr"] for group in self.optimizers().param_groups))  # type: ignore[union-attr]
        return loss

    def _dialled(self, dial: Dial) -> Tensor:
        """Return the regulariser of a step, and log what it is of."""
        share = 1.0 / (self._steps() * self.trainer.accumulate_grad_batches)
        measured = dial.measured()
        loss = dial.loss(measured, self._progress(), share, self._mean)
        self.log_dict({f"train/{name}": value.detach() for name, value in measured.items()})
        self.log("train/multiplier", dial.multiplier)
        return loss

    def _steps(self) -> float:
        """Steps of the training, or of what a dial takes for one where it has no end."""
        steps = float(self.trainer.estimated_stepping_batches)
        return max(1.0, steps) if 0 <= steps < math.inf else ENDLESS  # -1 for data without a length

    def _progress(self) -> float:
        """Share of the training that is over."""
        return min(1.0, self.global_step / self._steps())

    def _names(self, rest: Sequence[Any], batch_idx: int, samples: int) -> list[str]:
        """Names that follow the samples in a batch; without any, numbers of the process of several, batch and place."""
        if rest and not isinstance(rest[0], Tensor) and (names := list(rest[0])):
            return names
        several = self._trainer is not None and self.trainer.world_size > 1
        process = f"{self.global_rank}/" if several else ""
        return [f"{process}{batch_idx}/{i}" for i in range(samples)]

    def _mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a training."""
        mean: Tensor = self.trainer.strategy.reduce(value, reduce_op="mean")
        return mean

    @property
    def at_target(self) -> bool:
        """Whether the last validation found the network at its target of rate or energy; true if it has none."""
        return self.dial is None or self.dial.met

    def _begin(self, metrics: MetricCollection, mean_loss: MeanMetric) -> None:
        """Begin an evaluation with its sums at zero."""
        with torch.inference_mode(False):  # tensors made in inference mode could not be added to when fitting
            mean_loss.reset()
            metrics.reset()

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection, mean_loss: MeanMetric) -> None:
        inputs, targets = self.unpack(batch)
        outputs = self(inputs).float()
        if mean_loss.device.type != "mps":  # which has no float64
            with torch.inference_mode(False):  # tensors made in inference mode could not be added to when fitting
                mean_loss.set_dtype(torch.float64)  # each time, as Lightning gives metrics its own type
        mean_loss.update(self.losses(outputs, targets))
        metrics.update(outputs, targets)
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        """Begin the sums of a validation."""
        self._begin(self.val_metrics, self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Begin the sums of a test."""
        self._begin(self.test_metrics, self.test_loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accumulate loss and metrics of the validation set; count what some of it costs on the way to a target."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)
        if self.dial is not None and self._dialling:
            batches, images = COUNTED
            numbers = self.trainer.num_val_batches
            number = numbers[0] if isinstance(numbers, list) else numbers
            every = math.ceil(number / batches) if math.isfinite(number) else 1
            if batch_idx % every == 0 and batch_idx < every * batches:
                inputs, _ = self.unpack(batch)
                self.dial.count(self.network, lambda: self(inputs[:images]))

    @property
    def logged_in_training(self) -> tuple[str, ...]:
        """Metrics of a validation that it has in a training alone, not before the first step."""
        return () if self.dial is None else ("val/rate", "val/energy")

    @property
    def _dialling(self) -> bool:
        """Whether this validation is one of a training towards a target."""
        return self.dial is not None and self.dial.cost is not None and self.trainer.state.fn == TrainerFn.FITTING

    def on_validation_epoch_end(self) -> None:
        """Tell of a loss that is not finite; go by what was counted on the way to a target."""
        self._tell_unless_finite("val", self.val_loss)
        if self.dial is not None and self._dialling:
            counted = self.dial.settle(self._progress(), self._mean)
            self.log_dict({f"val/{name}": value for name, value in counted.items()})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accumulate loss and metrics of the test set."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def on_test_epoch_end(self) -> None:
        """Tell of a loss that is not finite."""
        self._tell_unless_finite("test", self.test_loss)

    @staticmethod
    def _tell_unless_finite(stage: str, mean_loss: MeanMetric) -> None:
        loss = float(mean_loss.compute()) if mean_loss.update_called else 0.0
        if not math.isfinite(loss):
            rank_zero_warn(f"{stage}/loss is {loss}: the output or the loss of at least one sample is not finite")

    # Optimizer and schedule

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from the hyper-parameters.

        Raises:
            ConfigurationError: If a training is resumed whose schedule ends at another step.
        """
        h = self.hparams
        rate = h["lr"] * self._lr_scale()
        # FSDP puts its own module around some.
        parameters = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in self.network.named_parameters()}
        groups = [
            {"params": [parameters[name] for name in group["params"]], "weight_decay": group["weight_decay"],
             "lr": rate * group.get("lr_scale", 1.0)}
            for group in self._groups
        ]  # fmt: skip
        # A fused step takes half the time on a CPU; in mixed precision Lightning does not clip gradients before it.
        kind = timm.optim.get_optimizer_class(h["optimizer"], bind_defaults=False)
        fused = not self.trainer.gradient_clip_val and self.device.type in ("cpu", "cuda")
        options = {"fused": fused} if "fused" in signature(kind).parameters else {}
        optimizer: Optimizer = create_optimizer_v2(groups, h["optimizer"], lr=rate, **options)
        if h["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            raise ConfigurationError(
                f"the {h['schedule']} schedule needs an end: set max_steps for data without a length or epochs without "
                "a number, or schedule: constant"
            )
        total = int(steps)
        if self._planned_steps not in (None, total):
            raise ConfigurationError(
                f"the {h['schedule']} schedule of the training that is resumed ends at step {self._planned_steps}, not "
                f"at {total}: give max_epochs and max_steps as before, or start another one with model.init_from"
            )
        self._planned_steps = total
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def _schedule(self, optimizer: Optimizer) -> LRScheduler:
        """Return the schedule over all the steps."""
        total, longest = int(self.trainer.estimated_stepping_batches), LONGEST_WARMUP
        self.trainer.fit_loop.setup_data()  # else the batches of an epoch may not be known yet
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # inf if data has no length
        asked = self.hparams["warmup_epochs"]
        share = min(longest, asked * max(1.0, epoch) / max(1, total)) if asked else 0.0
        if self.hparams["schedule"] == "one_cycle":
            rise = min(max(share, 1.5 / total), 0.99)  # OneCycleLR divides by the length of the rise
            rates = [group["lr"] for group in optimizer.param_groups]
            cycled = bool({"momentum", "betas"} & optimizer.defaults.keys())
            return OneCycleLR(optimizer, rates, total + 1, pct_start=rise, cycle_momentum=cycled)
        steps = round(share * total)
        cosine = CosineAnnealingLR(optimizer, max(1, total - steps))
        if not steps:
            return cosine
        return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (steps + 1), total_iters=steps), cosine], [steps])

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
