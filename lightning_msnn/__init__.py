"""One-time-step spiking networks with multiple receptive fields (arXiv 2401.10843).

Layers, timm models, a zoo of trained networks, Lightning tasks, data and callbacks. Importing the package registers its
networks with timm, so that ``timm.create_model("msnn_resnet12")`` finds them.
"""

__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_msnn import conversion, models
from lightning_msnn.conversion import convert

if TYPE_CHECKING:
    from lightning_msnn import energy, zoo

__all__ = ["__version__", "conversion", "convert", "energy", "models", "zoo"]


def __getattr__(name: str) -> Any:
    if name in ("energy", "zoo"):  # when they are asked for: they draw and export, which takes time to import
        return import_module(f"lightning_msnn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
