"""Networks, registered with timm when this package is imported."""

from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.msnn_resnet import ConvMixer, MSNNResNet
from lightning_msnn.models.msnn_resnet9 import ConvBlock, MSNNResNet9
from lightning_msnn.models.msnn_rnn import CELLS, MSNNRNN, SPIKING_CELLS, Recurrence, RecurrentMixer, SpikingRecurrence
from lightning_msnn.models.msnn_vit import AttentionMixer, MSNNViT

__all__ = [
    "CELLS",
    "MSNN",
    "MSNNRNN",
    "SPIKING_CELLS",
    "AttentionMixer",
    "ConvBlock",
    "ConvMixer",
    "MSNNResNet",
    "MSNNResNet9",
    "MSNNViT",
    "Recurrence",
    "RecurrentMixer",
    "SpikingRecurrence",
]
