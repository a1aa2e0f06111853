"""One-time-step spiking networks with multiple receptive fields (arXiv 2401.10843).

Layers, timm models, a zoo of trained networks, Lightning tasks, data and callbacks. Importing the package registers its
networks with timm, so that ``timm.create_model("msnn_resnet12")`` finds them.
"""

__version__ = "0.1.0"

from lightning_msnn import models, zoo

__all__ = ["__version__", "models", "zoo"]
