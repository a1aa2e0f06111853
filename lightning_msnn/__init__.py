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
    from lightning_msnn import zoo

__all__ = ["__version__", "conversion", "convert", "models", "zoo"]


def __getattr__(name: str) -> Any:
    # When it is asked for: it evaluates, exports and draws, which takes seconds to import.
    if name == "zoo":
        return import_module("lightning_msnn.zoo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
