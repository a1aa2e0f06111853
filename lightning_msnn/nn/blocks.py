"""Blocks of the backbone: stem, patch merging, encoder of the residual stream, spiking MLP, residual block."""

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.nn.mixers import Synapse
from lightning_msnn.nn.neuron import Spike

__all__ = ["MLP", "Block", "Encoder", "PatchMerging", "Stem"]


class Stem(nn.Module):
    """Analogue 3x3 convolution of stride 2 with batch norm: pixels to the residual stream.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the residual stream.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(B, in_chans, H, W)`` to ``(B, dim, ceil(H / 2), ceil(W / 2))``."""
        x = self.norm(self.conv(x))
        return x


class PatchMerging(nn.Module):
    """Analogue 2x2 convolution of stride 2 with batch norm: four patches of the residual stream become one.

    Args:
        in_dim: Channels before.
        out_dim: Channels after.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_dim, H, W)`` to ``(B, out_dim, ceil(H / 2), ceil(W / 2))``; an odd side is padded with zeros."""
        x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
        x = self.norm(self.conv(x))
        return x


class Encoder(nn.Module):
    """Spikes that leave the residual stream: batch norm, then threshold. At inference a threshold for each channel.

    Args:
        dim: Channels.
        threshold: Threshold ``V``.
        surrogate: Name of the surrogate gradient.
        norm: Whether batch norm comes before the threshold.
    """

    def __init__(self, dim: int, threshold: float = 0.5, surrogate: str = "triangular", norm: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.spike = Spike(threshold, surrogate)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, dim, H, W)`` to spikes of that shape."""
        spikes: Tensor = self.spike(self.norm(x))
        return spikes


class MLP(nn.Module):
    """Spiking channel mixer: linear layer, spikes, linear layer, each with batch norm.

    Args:
        dim: Channels of input and output.
        hidden: Channels in between.
        threshold: Threshold ``V``.
        surrogate: Name of the surrogate gradient.
        norm: Whether batch norm follows each linear layer.
    """

    def __init__(
        self, dim: int, hidden: int, threshold: float = 0.5, surrogate: str = "triangular", norm: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = Synapse(dim, hidden, 1, norm)
        self.spike = Spike(threshold, surrogate)
        self.fc2 = Synapse(hidden, dim, 1, norm)

    def forward(self, spikes: Tensor) -> Tensor:
        """Map spikes ``(B, dim, H, W)`` to a current of that shape."""
        current: Tensor = self.fc2(self.spike(self.fc1(spikes)))
        return current


class Block(nn.Module):
    """Residual block on an analogue stream: ``x = x + mixer(spikes(x)); x = x + mlp(spikes(x))``.

    Args:
        encoder1: Spikes for the mixer.
        mixer: Token mixer, spikes to current.
        encoder2: Spikes for the MLP.
        mlp: Channel mixer, spikes to current.
        drop_path: Probability with which a sample skips a branch in training (stochastic depth).
    """

    def __init__(
        self, encoder1: nn.Module, mixer: nn.Module, encoder2: nn.Module, mlp: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder1 = encoder1
        self.mixer = mixer
        self.encoder2 = encoder2
        self.mlp = mlp
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(B, C, H, W)`` to that of the next block."""
        x = x + self.drop_path(self.mixer(self.encoder1(x)))
        x = x + self.drop_path(self.mlp(self.encoder2(x)))
        return x
