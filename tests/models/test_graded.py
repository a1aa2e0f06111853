"""Graded spikes: networks whose neurons return one of several levels."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_msnn.conversion import convert
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models import Recurrence
from lightning_msnn.models.baselines import lif_network
from lightning_msnn.nn import Neuron, Spike, Synapse
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.nn.integer import to_integers
from tests.conftest import SHALLOW, TINY
from tests.models.test_registry import lively

LEVELS = 4


class Unrolled(nn.Module):
    """A synapse that is sent each level as a binary step of its own."""

    def __init__(self, synapse: nn.Module, steps: int) -> None:
        super().__init__()
        self.synapse, self.steps = synapse, steps

    def forward(self, spikes: Tensor) -> Tensor:
        sent = [(spikes >= k).to(spikes.dtype) for k in range(1, self.steps + 1)]
        assert torch.equal(sum(sent), spikes), "spikes are whole numbers, from 0 to the number of levels"
        return sum(self.synapse(step) for step in sent)


class UnrolledLSTM(nn.Module):
    """An LSTM whose input is sent so: its currents are made here, and are what torch's own reads."""

    def __init__(self, cell: Recurrence, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, tokens: Tensor) -> Tensor:
        made = []
        for end in ("", "_reverse"):
            weights = {name: getattr(self.cell, f"{name}_l0{end}") for name in ("weight_ih", "weight_hh")}
            current = Unrolled(lambda s, w=weights["weight_ih"]: F.linear(s, w), self.steps)(tokens)
            lstm = nn.LSTM(current.shape[2], self.cell.hidden_size, batch_first=True).to(tokens.dtype)
            with torch.no_grad():
                lstm.weight_ih_l0.copy_(torch.eye(current.shape[2]))
                lstm.weight_hh_l0.copy_(weights["weight_hh"])
                lstm.bias_ih_l0.copy_(getattr(self.cell, f"bias_ih_l0{end}"))
                lstm.bias_hh_l0.copy_(getattr(self.cell, f"bias_hh_l0{end}"))
            read = lstm(current.flip(1) if end else current)[0]
            made.append(read.flip(1) if end else read)
        return torch.cat(made, 2)


def unrolled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, Synapse):
            module.conv = Unrolled(module.conv, LEVELS)
        for name, child in module.named_children():
            if type(child) is Recurrence:
                setattr(module, name, UnrolledLSTM(child, LEVELS))
    return model


def network(name: str) -> nn.Module:
    """One whose weights are short numbers, so that sums in float64 are exact in any order."""
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=10, levels=LEVELS, **SHALLOW)).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | Recurrence):
            for parameter in module.parameters():
                parameter.data = (parameter.data * 1024).round() / 1024
    return model


@pytest.mark.parametrize("name", TINY)
def test_levels_are_binary_steps(name):
    """Each level sent as a step of its own gives the same output, to the last bit in float64."""
    model, x = network(name), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen = []
    for module in model.modules():
        if isinstance(module, Spike):
            module.register_forward_hook(lambda m, args, out: seen.append(out.amax()))
    expected = model(x)
    assert max(seen) == LEVELS
    tolerance = 1e-12 if "rnn" in name else 0.0  # torch's LSTM adds the current of its input in another order
    torch.testing.assert_close(unrolled(model)(x), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(fold_batch_norm(model)(x), expected)
    narrow = model.float()
    agree = (narrow(x.float()) - unrolled(narrow)(x.float())).abs().amax(1) < 1e-5
    assert agree.any()
    assert to_integers(narrow)(x.float()).isfinite().all()
    assert {m.levels for m in lif_network(narrow).modules() if isinstance(m, Spike)} <= {1, LEVELS}


def test_a_graded_step_exports():
    spike, x = Spike(Neuron(levels=3)), torch.randn(2, 3, 4, 4)
    found = torch.export.export(spike, (x,)).module()(x)
    assert torch.equal(found, (x / 0.5).floor().clamp(0, 3))


@pytest.mark.parametrize("levels", [0, -1, 1.5, 16, "a", True])
def test_levels_that_are_none(levels):
    rectified = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    for make in (
        lambda: timm.create_model("msnn_resnet12_tiny", levels=levels),
        lambda: convert(rectified, torch.rand(2, 3, 4, 4), levels=levels),
    ):
        with pytest.raises(ConfigurationError, match=f"^levels must be .*, not {levels!r}$"):
            make()


def test_levels_need_a_positive_threshold():
    with pytest.raises(ConfigurationError, match="threshold must be positive .* not -0.1"):
        Spike(Neuron(levels=2, threshold=-0.1))
