"""The networks as the method is written: one time step after another, window by window, nothing batched.

Of the package it uses the parameters alone, by their names, and torch's batch norms in evaluation mode.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PlainNetwork"]

THRESHOLD = 0.5
HEAD = 24  # channels of a head of the attention

KINDS = {"alternate": ("non_dilated", "dilated"), "alternate_grid": ("non_dilated", "grid")}
"""Kinds of windows in even and odd blocks; the last stage has the first kind throughout."""


class PlainNetwork:
    """A network with sine, triangular surrogate and spiking MLP, computed by its formulas.

    Args:
        model: The network, in evaluation mode.
        tau: Decay that the network was made with.
        windows: Its windows.
        context: Its context.
    """

    def __init__(
        self,
        model: nn.Module,
        tau: float,
        windows: str = "alternate",
        context: str = "shared",
    ) -> None:
        self.model, self.tau = model, tau
        self.kinds, self.isolated = KINDS.get(windows, (windows, windows)), context == "isolated"
        self.kept: dict[object, list[Tensor]] = {}

    # Equations

    @staticmethod
    def spikes(membrane: Tensor, threshold: float | Tensor) -> Tensor:
        x = membrane - threshold
        near = x.clamp(-1.0, 1.0)
        integral = near - 0.5 * near * near.abs()  # its derivative is the triangle
        return (x >= 0).to(x.dtype) + integral - integral.detach()

    @staticmethod
    def cut(x: Tensor, kind: str) -> list[Tensor]:
        height, width = x.shape[2:]
        if kind != "single" and width >= 4 and (height == 1 or kind.startswith("time")):
            quarter = math.ceil(width / 4)
            if kind.endswith("grid"):
                padded = F.pad(x, [0, 4 * quarter - width])
                return [padded[..., k::4] for k in range(4)]
            w = quarter if kind in ("non_dilated", "time") else max(math.floor(width * 3 / 8), quarter)
            return [x[..., i : i + w] for i in (round(k * (width - w) / 3) for k in range(4))]
        if kind == "single" or min(height, width) == 1 or kind.startswith("time"):
            return [x]
        if kind == "grid":
            padded = F.pad(x, [0, width % 2, 0, height % 2])
            return [padded[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        h, w = (max(3 * n // 4 if kind == "dilated" else 0, math.ceil(n / 2)) for n in (height, width))
        return [x[:, :, i : i + h, j : j + w] for i in (0, height - h) for j in (0, width - w)]

    def join(self, windows: list[Tensor], kind: str, like: Tensor) -> Tensor:
        if len(windows) == 1:
            return windows[0]
        number = like.shape[2] * like.shape[3]
        where = self.cut(torch.arange(1, number + 1).view(1, 1, *like.shape[2:]), kind)
        total = windows[0].new_zeros(*windows[0].shape[:2], number + 1)
        covered = torch.zeros(number + 1)
        for window, at in zip(windows, where, strict=True):
            total = total.index_add(2, at.flatten(), window.flatten(2))
            covered.index_add_(0, at.flatten(), torch.ones(at.numel()))
        return (total / covered)[:, :, 1:].unflatten(2, like.shape[2:])

    def omega(self, module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        angle = math.pi * module.projection.theta
        return 2 * torch.sin(angle * a * torch.cos(angle * b))

    @staticmethod
    def decay(module: nn.Module) -> Tensor:
        if hasattr(module.decay, "tau"):
            return module.decay.tau
        return 1 / (1 + torch.exp(-module.decay.logit.view(-1, 1, 1)))

    def layer(
        self,
        spike: nn.Module,
        currents: list[Tensor],
        scan: object,
        kind: str,
        isolated: bool,
        like: Tensor,
        tau: object,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Spikes, of the map or of each window, and membranes of the windows."""
        threshold = THRESHOLD if spike.level is None else spike.level.view(-1, 1, 1)
        kept = self.kept.get(spike, [0.0] * len(currents))
        u = scan([i + k for i, k in zip(currents, kept, strict=True)])
        if isolated:
            fired = s = [self.spikes(x, threshold) for x in u]
        else:
            fired = [self.spikes(self.join(u, kind, like), threshold)]
            s = self.cut(fired[0], kind)
        self.kept[spike] = [tau * x * (1 - y) for x, y in zip(u, s, strict=True)]
        return fired, u

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        return self.layer(encoder.spike, [encoder.norm(x)], lambda i: i, "single", False, x, self.tau)[0][0]

    # Mixers

    @staticmethod
    def first(tau: Tensor) -> object:
        def scan(currents: list[Tensor]) -> list[Tensor]:
            u = []
            for k, i in enumerate(currents):
                u.append(i if k == 0 else tau * u[k - 1] + i)
            return u

        return scan

    def second(self, module: nn.Module, u1: list[Tensor]) -> object:
        def scan(currents: list[Tensor]) -> list[Tensor]:
            u = []
            for k, i in enumerate(currents):
                u.append(i if k == 0 else self.decay(module) * self.omega(module, u1[k - 1], u[k - 1]) + i)
            return u

        return scan

    def third(self, module: nn.Module, m: list[Tensor]) -> object:
        def scan(currents: list[Tensor]) -> list[Tensor]:
            if len(currents) == 1:
                return currents
            tau, new = self.decay(module), []
            new.append(tau * self.omega(module, m[0], m[1]) + currents[0])
            new.append(tau * self.omega(module, new[0], m[1]) + currents[1])
            new.append(tau * self.omega(module, m[2], new[1]) + currents[2])
            new.append(tau * self.omega(module, m[3], new[2]) + currents[3])
            return new

        return scan

    @staticmethod
    def synapse(synapse: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
        weight = synapse.conv.weight
        padding, groups = (weight.shape[2] - 1) // 2, x.shape[1] // weight.shape[1]
        return synapse.norm(F.conv2d(x, weight, synapse.conv.bias, stride, padding, groups=groups))

    def convolve(self, m: nn.Module, s: Tensor, kind: str) -> Tensor:
        where = (kind, self.isolated, s)
        one, two = m.membrane1, m.membrane2
        if self.isolated:
            i1 = [self.synapse(m.synapse1, w) for w in self.cut(s, kind)]
        else:
            i1 = self.cut(self.synapse(m.synapse1, s), kind)
        s1, u1 = self.layer(m.spike1, i1, self.first(self.decay(one)), *where, self.decay(one))
        i2 = [self.synapse(m.synapse2, x) for x in s1]
        i2 = i2 if self.isolated else self.cut(i2[0], kind)
        s2, _ = self.layer(m.spike2, i2, self.second(two, u1), *where, self.decay(two))
        return self.join([self.synapse(m.project, x) for x in s2], kind, s)

    def branch(self, m: nn.Module, x: Tensor, kind: str) -> Tensor:
        where = (kind, self.isolated, x)
        one, two = m.membrane1, m.membrane2
        s1, u1 = self.layer(m.spike1, self.cut(m.norm(x), kind), self.first(self.decay(one)), *where, self.decay(one))
        i2 = [self.synapse(m.synapse1, s) for s in s1]
        i2 = i2 if self.isolated else self.cut(i2[0], kind)
        s2, _ = self.layer(m.spike2, i2, self.second(two, u1), *where, self.decay(two))
        return self.join([self.synapse(m.synapse2, s) for s in s2], kind, x)

    def attend(self, m: nn.Module, s: Tensor, kind: str) -> Tensor:
        where = (kind, self.isolated, s)
        one, two = m.membrane1, m.membrane2
        if self.isolated:
            i1 = [self.synapse(m.qkv, w) for w in self.cut(s, kind)]
        else:
            i1 = self.cut(self.synapse(m.qkv, s), kind)
        s1, u1 = self.layer(m.spike1, i1, self.first(self.decay(one)), *where, self.decay(one))
        s1 = s1 if self.isolated else self.cut(s1[0], kind)
        dim, i2 = s.shape[1], []
        for window in s1:
            heads = []
            for h in range(dim // HEAD):
                q, k, v = (
                    window[:, part * dim + h * HEAD : part * dim + (h + 1) * HEAD].flatten(2) for part in range(3)
                )
                heads.append(torch.einsum("bdi,bdj,bej->bei", q, k, v) * HEAD**-0.5)
            i2.append(m.norm(torch.cat(heads, 1).unflatten(2, window.shape[2:])))
        values = [u[:, 2 * dim :] for u in u1]
        s2, _ = self.layer(m.spike2, i2, self.second(two, values), *where, self.decay(two))
        return self.join([self.synapse(m.project, x) for x in s2], kind, s)

    def recur(self, m: nn.Module, s: Tensor, kind: str, received: Tensor) -> tuple[Tensor, Tensor]:
        currents, dim = [], s.shape[1]
        lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True, device="meta")
        for window in self.cut(s, kind):
            tokens = window.flatten(2).transpose(1, 2)
            read = torch.func.functional_call(lstm, dict(m.recurrence.named_parameters()), tokens)[0]
            currents.append(m.norm(read.transpose(1, 2).unflatten(2, window.shape[2:])))
        scan = self.third(m.membrane, self.cut(received, kind))
        fired, u = self.layer(m.spike, currents, scan, kind, self.isolated, s, self.decay(m.membrane))
        projected = self.join([self.synapse(m.project, x) for x in fired], kind, s)
        return projected, self.join(u, kind, s)

    # The network

    def merged(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.synapse(module, F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2]), 2)

    def block(self, block: nn.Module, x: Tensor, kind: str, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if hasattr(block, "synapse1"):
            return x + self.branch(block, x, kind), received
        s = self.encode(block.encoder1, x)
        if hasattr(block.mixer, "recurrence"):
            mixed, received = self.recur(block.mixer, s, kind, received)
        else:
            mixed = (self.attend if hasattr(block.mixer, "qkv") else self.convolve)(block.mixer, s, kind)
        x = x + mixed
        mlp = block.mlp
        hidden = self.synapse(mlp.fc1, self.encode(block.encoder2, x))
        hidden = self.layer(mlp.spike, [hidden], lambda i: i, "single", False, hidden, self.tau)[0][0]
        return x + self.synapse(mlp.fc2, hidden), received

    def stem(self, stem: nn.Module, image: Tensor) -> Tensor:
        if not hasattr(stem, "whitening"):
            return self.synapse(stem, image, 2)
        below, beside = image.shape[2] == 1, image.shape[3] == 1
        image = F.pad(image, [0, int(beside), 0, int(below)])
        patches = F.conv2d(image, stem.whitening.weight, stem.whitening.bias).clamp(min=0.0)
        patches = F.pad(patches, [0, 1 + image.shape[3] % 2, 0, 1 + image.shape[2] % 2])
        return stem.norm(F.conv2d(patches, stem.conv.weight, stem.conv.bias, 2))

    def step(self, image: Tensor) -> Tensor:
        """Logits of one time step."""
        model = self.model
        x = self.stem(model.stem, image)
        received = None
        for i, stage in enumerate(model.stages):
            if i:
                x = self.merged(stage.downsample, x)
            if hasattr(stage, "membrane"):
                if i == 0 or isinstance(stage.membrane, nn.Identity):
                    received = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
                else:
                    received = self.merged(stage.membrane, received)
            elif not isinstance(stage.position, nn.Identity):
                x = x + self.synapse(stage.position.synapse, self.encode(stage.position.encoder, x))
            for j, block in enumerate(stage.blocks):
                kind = self.kinds[0 if i == len(model.stages) - 1 else j % 2]
                x, received = self.block(block, x, kind, received)
        return model.head.fc(model.norm(x).mean((2, 3)))

    def __call__(self, frames: list[Tensor]) -> Tensor:
        """Logits, the mean over the steps."""
        self.kept = {}
        return sum(self.step(frame) for frame in frames) / len(frames)
