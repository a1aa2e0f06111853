"""``torch.hub``: the networks of the package, with the weights of its zoo.

>>> torch.hub.load("path/of/a/checkout", "msnn_resnet12", source="local", pretrained="c100")  # doctest: +SKIP
"""

from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from lightning_msnn import zoo

dependencies = ["torch", "torchvision", "timm", "safetensors", "lightning"]


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: str | None = None, **kwargs: Any) -> nn.Module:
        return zoo.load(f"{name}.{pretrained}", **kwargs) if pretrained else timm.create_model(name, **kwargs)

    create.__doc__ = f"""Return {name}.

    Args:
        pretrained: Tag of a zoo entry, such as ``"c100"``, whose weights are loaded, in evaluation mode; by default the
            network is untrained.
        **kwargs: Arguments of the network.
    """
    return create


globals().update({name: _entry_point(name) for name in timm.list_models("msnn*")})
