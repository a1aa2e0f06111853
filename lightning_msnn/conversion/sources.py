"""Networks to convert that timm does not have: a ResNet for images of 32 by 32 pixels."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.models.registry import of_entry, zoo_cfgs

__all__ = ["SmallImageResNet", "build", "resnet18_cifar"]

default_cfgs = generate_default_cfgs(
    {name: replace(cfg, first_conv="conv1", classifier="fc") for name, cfg in zoo_cfgs("resnet18_cifar").items()}
)

own_arguments = ("channels", "global_pool")
"""Arguments that a file may give, see :func:`lightning_msnn.models.registry.own_arguments`."""


def build(
    network: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    kwargs: Mapping[str, Any],
    own: Iterable[str],
    **arguments: Any,
) -> nn.Module:
    """Build a network that has no weights but those of zoo entries, as timm builds its own.

    Args:
        network: Its class, or a function that makes it.
        variant: Its registered name.
        pretrained: Whether to load an entry's weights, whose sha256 is checked.
        kwargs: What timm was given; it comes before what the entry says.
        own: Names of the arguments that an entry may give beside the numbers of classes and channels.
        **arguments: Further arguments of timm's builder and of the network, which ``kwargs`` override.

    Raises:
        ConfigurationError: If there are no weights, or the entry's files are not what they should be.
    """
    given = dict(kwargs)
    cfg = resolve_pretrained_cfg(variant, given.pop("pretrained_cfg", None), given.pop("pretrained_cfg_overlay", None))
    allowed = {*own, "num_classes", "in_chans"}
    cfg, given, folder = of_entry(cfg, variant, pretrained, given, allowed)
    if pretrained and folder is None and not (cfg.has_weights or cfg.source):
        raise ConfigurationError(f"no weights for {variant}: name a zoo entry, or convert a network that is trained")
    # Where stem and read-out are, for other numbers of channels and classes.
    ends = timm.get_pretrained_cfg(str(given.get("source", variant)), allow_unregistered=True)
    if ends is not None:
        cfg = replace(cfg, first_conv=ends.first_conv, classifier=ends.classifier)
    try:
        model: nn.Module = build_model_with_cfg(
            network, variant, pretrained, pretrained_cfg=cfg.to_dict(), **{**arguments, **given}
        )
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the values in a file make torch raise
        if folder is None:
            raise
        raise ConfigurationError(f"{folder} does not fit {variant}: {brief(error)}") from error
    named = {name: value for name, value in given.items() if name in allowed}
    model._model_args = {**named, **getattr(model, "arguments", {})}  # type: ignore[assignment]  # for timm
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    return model


class SmallImageResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet with the stem that is usual on CIFAR: one 3x3 convolution of stride 1, and no pooling.

    Args:
        *args: Arguments of :class:`timm.models.ResNet`.
        in_chans: Channels of the images.
        **kwargs: Its further arguments.
    """

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, self.bn1.num_features, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


@register_model  # type: ignore[untyped-decorator]
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for images of 32 by 32 pixels, 0.56 G multiply-accumulates; ``channels`` makes it narrower.

    Args:
        pretrained: Whether to load the weights of its zoo entry.
        **kwargs: Arguments of :class:`timm.models.ResNet`.
    """
    arguments = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build(SmallImageResNet, "resnet18_cifar", pretrained, kwargs, own_arguments, **arguments)
