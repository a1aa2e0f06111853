"""Networks to convert that timm does not have: a ResNet for images of 32 by 32 pixels."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from lightning_msnn.models.registry import build, zoo_cfgs

__all__ = ["SmallImageResNet", "resnet18_cifar"]

default_cfgs = generate_default_cfgs(zoo_cfgs("resnet18_cifar", first_conv="conv1", classifier="fc"))

own_arguments = ("channels", "global_pool")
"""Arguments that a file may give, see :func:`lightning_msnn.models.registry.own_arguments`."""


class SmallImageResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet with the stem that is usual on CIFAR: one 3x3 convolution of stride 1, and no pooling."""

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
    own = {*own_arguments, "num_classes", "in_chans"}
    arguments = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    model, given = build(SmallImageResNet, "resnet18_cifar", pretrained, own, kwargs, arguments)
    model._model_args = {name: value for name, value in given.items() if name in own}  # type: ignore[assignment]
    return model
