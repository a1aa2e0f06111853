"""The backbone that the four families share: stages of residual spiking blocks on an analogue stream.

Source: Yao, Wu, Chen, Zhang, *Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency*,
ACML 2023, arXiv 2401.10843.
Licence: Apache-2.0.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_msnn.errors import ConfigurationError, check_integer, check_number, choose
from lightning_msnn.functional.windows import WINDOWS
from lightning_msnn.nn.blocks import MLP, STEMS, AnalogueMLP, BernoulliEncoder, Block, Encoder, PatchMerging
from lightning_msnn.nn.layer import normalise
from lightning_msnn.nn.neuron import Neuron, Rectifier, Spike

__all__ = ["MSNN", "WINDOW_SCHEDULES", "Stage", "recomputed"]

BRANCH_GAIN = 0.2
"""Initial scale of a branch's last batch norm, or of its last synapse without one. At 1 each of the 24 branches adds
one to the stream's variance and drowns the stem's output; at 0 a branch has no gradient to begin with."""

WINDOW_SCHEDULES: dict[str, tuple[str, str]] = {
    "alternate": ("non_dilated", "dilated"),
    "alternate_grid": ("non_dilated", "grid"),
}
"""Kinds of windows in even and odd blocks of a stage, by the name that configurations use. The last stage has windows
of the first kind throughout."""


def _window_kinds(schedule: str, depths: Sequence[int]) -> list[list[str]]:
    """Return the kind of windows of every block, a list for each stage."""
    kinds = choose({kind: (kind, kind) for kind in WINDOWS} | WINDOW_SCHEDULES, schedule, "windows")
    last = len(depths) - 1
    return [[kinds[0 if stage == last else block % 2] for block in range(n)] for stage, n in enumerate(depths)]


def _for_each_block(theta: float | Sequence[float], depths: Sequence[int]) -> list[float]:
    """Spread theta over the blocks: one number, one for each stage, or one for each block."""
    thetas = [theta] * sum(depths) if isinstance(theta, int | float) else list(theta)
    if len(thetas) == len(depths):
        thetas = [value for value, depth in zip(thetas, depths, strict=True) for _ in range(depth)]
    if len(thetas) != sum(depths):
        raise ConfigurationError(
            f"theta must be one number, {len(depths)} (one for each stage) or {sum(depths)} (one for each block), "
            f"not {theta!r}"
        )
    return thetas


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a block's batch norms from following what it computes."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, number) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if number is None else number.clone()
    try:
        yield
    finally:
        for norm, (momentum, number) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, number


def recomputed(block: nn.Module, *inputs: Tensor) -> Any:
    """Run a block, and run it again in the backward pass instead of keeping what it computed."""
    if torch.compiler.is_compiling():  # a compiler leaves the statistics out of the second run
        return checkpoint(block, *inputs, use_reentrant=False)
    contexts = lambda: (nullcontext(), _untracked(block))  # noqa: E731
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


class Stage(nn.Module):
    """Blocks at one resolution, after the patch merging that leads to it.

    Args:
        before: Channels of the stage before, None for the first.
        width: Channels of this stage.
        blocks: Residual blocks.
        encoder: Makes an encoder of the stream for so many channels.
        norm: Whether there is batch norm.
    """

    def __init__(
        self, before: int | None, width: int, blocks: list[nn.Module], encoder: Callable[[int], nn.Module], norm: bool
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = PatchMerging(before, width, norm) if before else nn.Identity()
        self.position: nn.Module = nn.Identity()  # of families whose mixers do not see where a token is
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` of the stage before to that of this stage."""
        x = self.position(self.downsample(x))
        for block in self.blocks:
            x = recomputed(block, x) if self.grad_checkpointing else block(x)
        return x


class MSNN(nn.Module):
    """Spiking network of one time step whose neurons visit several windows of a map in turn.

    Stem, patch merging and read-out are analogue; every convolution and linear layer inside a branch of a block
    receives spikes that are exactly 0 or 1. The network keeps no state between calls. It follows the contract of timm's
    models.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the read-out; 0 removes it.
        global_pool: Pooling before the read-out (timm's names), ``""`` for none.
        depths: Number of blocks of each stage.
        widths: Channels of each stage.
        stem_stride: Stride of the stem, 2 or 4.
        stem: ``"convolution"``, or ``"whitened"``: behind filters that whiten patches of the image and do not learn.
        mlp_ratio: Hidden channels of the MLP as a multiple of the width.
        windows: Kinds of windows, one of :data:`WINDOW_SCHEDULES` or of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``: what a synapse sees beyond the border of a window.
        projection: Name of the projection Omega.
        theta: Radian factor of the projection in units of pi, in [0, 1]: one number, one for each stage, or one for
            each block; the initial ones if they are learnt.
        learn_theta: Whether each block learns its own theta, kept in (0, 1).
        tau: Decay of membranes from window to window; the initial one if it is learnt.
        learn_tau: False, ``"layer"`` or ``"channel"`` (or True): how finely the decay from window to window is learnt.
        threshold: Threshold ``V`` of all neurons; the initial one if it is learnt.
        learn_threshold: False, ``"layer"`` or ``"channel"`` (or True): how finely the threshold is learnt.
        levels: Levels ``D`` of a spike, 1 to 15: how many of ``V, 2 V, ..., D V`` a membrane has reached.
        surrogate: Name of the surrogate gradient.
        norm: Whether batch norm follows every synapse and comes before every spike that leaves the stream.
        mlp: Channel mixers: ``"spiking"``, or ``"gelu"`` on the analogue stream as in the paper.
        coding: ``"threshold"``: the stream fires where it reaches one; ``"bernoulli"``: with its value as probability.
        spiking: Whether neurons fire; else each is a ReLU, as in the ReLU baseline.
        drop_rate: Dropout before the read-out.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 at the first.
        mixer_kwargs: Further arguments of the token mixers.

    Raises:
        ConfigurationError: If an argument is not allowed.
    """

    mixer: type[nn.Module]
    """Class of the token mixers, see :class:`lightning_msnn.nn.Mixer`."""

    block: type[Block] = Block
    """Class of the residual blocks."""

    stage: type[nn.Module] = Stage
    """Class of the stages."""

    feature_module = "stages.{}"
    """Name of the module whose output is the feature of a stage, for FX feature extraction."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        widths: Sequence[int] = (48, 96, 192, 384),
        stem_stride: int = 2,
        stem: str = "convolution",
        mlp_ratio: float = 3.0,
        windows: str = "alternate",
        context: str = "shared",
        projection: str = "sine",
        theta: float | Sequence[float] = 0.25,
        learn_theta: bool = False,
        tau: float = 0.1,
        learn_tau: bool | str = True,
        threshold: float = 0.5,
        learn_threshold: bool | str = False,
        levels: int = 1,
        surrogate: str = "triangular",
        norm: bool = True,
        mlp: str = "spiking",
        coding: str = "threshold",
        spiking: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_chans", in_chans, 1)
        check_integer("num_classes", num_classes, 0)
        check_number("drop_rate", drop_rate, below_one=True)
        check_number("drop_path_rate", drop_path_rate, below_one=True)
        choose(dict.fromkeys(("spiking", "gelu")), mlp, "mlp")
        choose(dict.fromkeys(("threshold", "bernoulli")), coding, "coding")
        for name, flag in (("norm", norm), ("spiking", spiking), ("learn_theta", learn_theta)):
            if not isinstance(flag, bool):
                raise ConfigurationError(f"{name} must be true or false, not {flag!r}")
        if not 0 < mlp_ratio < math.inf:
            raise ConfigurationError(f"mlp_ratio must be a positive number, not {mlp_ratio}")
        if stem_stride not in (2, 4):
            raise ConfigurationError(f"stem_stride must be 2 or 4, not {stem_stride!r}")
        if not (isinstance(depths, Sequence) and isinstance(widths, Sequence) and len(depths) == len(widths) > 0):
            raise ConfigurationError(
                f"depths and widths must be lists of integers, one for each stage, not {depths!r} and {widths!r}"
            )
        for value in (*depths, *widths):
            check_integer("each of depths and widths", value, 1)
        kinds = _window_kinds(windows, depths)
        self.architecture = ""
        self.arguments: dict[str, Any] = {}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = widths[-1]

        alike = Neuron(
            threshold=threshold, learn_threshold=learn_threshold, levels=levels, surrogate=surrogate, tau=tau,
            learn_tau=learn_tau, projection=projection, learn_theta=learn_theta,
        )  # fmt: skip
        encoder: Callable[[int], nn.Module] = (
            partial(Encoder, norm=norm, neuron=alike) if coding == "threshold" else lambda dim: BernoulliEncoder()
        )
        self.stem = choose(STEMS, stem, "stem")(in_chans, widths[0], norm, stem_stride)
        make_block = partial(
            self.make_block, context=context, norm=norm, encoder=encoder, mlp=mlp, mlp_ratio=mlp_ratio,
            mixer_kwargs=mixer_kwargs or {},
        )  # fmt: skip
        thetas = _for_each_block(theta, depths)
        rates = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, width in enumerate(widths):
            blocks = [make_block(width, replace(alike, theta=thetas.pop(0)), kind, rates.pop(0)) for kind in kinds[i]]
            before = widths[i - 1] if i else None
            stages.append(self.stage(before, width, blocks, encoder, norm))
            self.feature_info.append(
                {"num_chs": width, "reduction": stem_stride * 2**i, "module": self.feature_module.format(i)}
            )
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features) if norm else nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.apply(_init_weights)
        for block in (block for stage in stages for block in stage.blocks):  # type: ignore[union-attr]
            for last in block.last_synapses:
                (last.norm if norm else last.conv).weight.data.mul_(BRANCH_GAIN)
        if not spiking:
            for parent in list(self.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, Spike | BernoulliEncoder):
                        setattr(parent, name, Rectifier())

    def make_block(
        self,
        dim: int,
        neuron: Neuron,
        windows: str,
        drop_path: float,
        *,
        context: str,
        norm: bool,
        encoder: Callable[[int], nn.Module],
        mlp: str,
        mlp_ratio: float,
        mixer_kwargs: Mapping[str, Any],
    ) -> nn.Module:
        """Return a block of ``dim`` channels; ``windows`` is its kind, ``encoder`` makes an encoder of the stream.

        It has ``last_synapses``, which end its branches. The other arguments are those of the network.
        """
        hidden = int(mlp_ratio * dim)
        return self.block(
            encoder(dim),
            self.mixer(dim, windows=windows, context=context, norm=norm, neuron=neuron, **mixer_kwargs),
            encoder(dim) if mlp == "spiking" else None,
            MLP(dim, hidden, norm, neuron) if mlp == "spiking" else AnalogueMLP(dim, hidden, norm),
            drop_path,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must spare beyond vectors: decays, thresholds, radian factors."""
        return {name for name, _ in self.named_parameters() if name.endswith(("decay.logit", "theta_logit", "level"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates.

        Args:
            coarse: One group a stage instead of one a block.
        """
        by_block = [
            (r"^stages\.(\d+)\.(?:downsample|position|membrane)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what they computed."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the read-out."""
        return self.head.fc  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the read-out.

        Args:
            num_classes: Classes of the new one; 0 removes it.
            global_pool: New pooling, unchanged if None.
        """
        self.num_classes = check_integer("num_classes", num_classes, 0)
        stem = next(self.stem.parameters())
        self.head.reset(num_classes, global_pool, device=stem.device, dtype=stem.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if self.arguments:  # baselines are built with them
            pooled = {} if global_pool is None else {"global_pool": global_pool}
            self.arguments |= {"num_classes": self.num_classes, **pooled}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the residual stream after chosen stages.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: The last n stages if an integer, all if None, else the stages listed.
            norm: Whether to apply the final norm to the last stage's.
            stop_early: Whether to leave out what comes after the last stage asked for.
            output_fmt: ``"NCHW"``, the only one there is.
            intermediates_only: Whether to return the intermediates alone.

        Returns:
            Intermediates, or the final features and the intermediates.

        Raises:
            ConfigurationError: If another output format is asked for.
        """
        if output_fmt != "NCHW":
            raise ConfigurationError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        outputs = self._pass(self.stem(x), last_taken if stop_early else last)
        intermediates = [normalise(outputs[i], self.norm) if norm and i == last else outputs[i] for i in sorted(take)]
        if intermediates_only:
            return intermediates
        return (normalise(outputs[-1], self.norm) if len(outputs) > last else outputs[-1]), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the chosen intermediates do not need.

        Args:
            indices: The last n stages if an integer, else the stages listed.
            prune_norm: Whether to remove the final norm.
            prune_head: Whether to remove the read-out.

        Returns:
            Indices of the stages chosen.
        """
        take, last_taken = feature_take_indices(len(self.stages), indices)
        shortened = last_taken < len(self.stages) - 1
        self.stages = self.stages[: last_taken + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        chosen: list[int] = take
        return chosen

    def _pass(self, x: Tensor, last: int) -> list[Tensor]:
        """Pass the stream through the stages up to number ``last``; return it after each of them."""
        outputs: list[Tensor] = []
        for stage in self.stages[: last + 1]:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to features ``(B, num_features, H / 16, W / 16)``, rounded up.

        With a stem of stride 4 it is a 32nd of each side.
        """
        return normalise(self._pass(self.stem(x), len(self.stages) - 1)[-1], self.norm)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits ``(B, num_classes)``, or to pooled features ``(B, num_features)``."""
        y: Tensor = self.head(x, pre_logits=pre_logits)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    """Kaiming for convolutions, whose scale batch norm absorbs; a narrow normal for the read-out."""
    if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
