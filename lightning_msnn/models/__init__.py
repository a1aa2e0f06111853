"""Networks, registered with timm when this package is imported."""

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.msnn_resnet import MSNNResNet
from lightning_msnn.models.msnn_rnn import MSNNRNN
from lightning_msnn.models.msnn_vit import MSNNViT

__all__ = ["MSNN", "MSNNRNN", "MSNNResNet", "MSNNViT"]
