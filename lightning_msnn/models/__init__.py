"""Networks, registered with timm when this package is imported."""

from lightning_msnn.models.backbone import MSNN
from lightning_msnn.models.msnn_resnet import MSNNResNet

__all__ = ["MSNN", "MSNNResNet"]
