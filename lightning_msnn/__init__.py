"""One-time-step spiking networks with multiple receptive fields (arXiv 2401.10843): layers, timm models, Lightning tasks.

Importing the package registers its networks with timm, so that ``timm.create_model("msnn_resnet12")`` finds them.
"""

__version__ = "0.1.0"

from lightning_msnn import models

__all__ = ["__version__", "models"]
