"""What networks compute with: spikes, decay, theta, drop path, recurrent cells, and the paper's preset."""

import pytest
import torch
from torch import nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import PROJECTIONS
from lightning_msnn.functional.projection import WITHOUT_THETA
from lightning_msnn.models import CELLS, Recurrence
from lightning_msnn.models.baselines import relu_baseline
from lightning_msnn.nn import AnalogueMLP, BernoulliEncoder, Block, FixedDecay, PatchMerging, Spike, Stem
from lightning_msnn.nn.folding import fold_batch_norm
from tests.conftest import PUBLISHED, TINY
from tests.models.test_registry import SMALL, lively, make


@pytest.mark.parametrize(
    ("dtype", "context"),
    [(torch.float32, "shared"), (torch.bfloat16, "isolated"), (torch.float16, "shared")],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("name", TINY)
def test_synapses_receive_nothing_but_spikes(name, context, dtype):
    """Every synapse but those of the analogue stem, patch merging and read-out sees 0 and 1 alone."""
    model = lively(make(name, **SMALL, context=context))
    analogue = {id(m) for a in model.modules() if isinstance(a, Stem | PatchMerging) for m in a.modules()}
    analogue.add(id(model.get_classifier()))
    synapses = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | Recurrence)]
    synapses = [m for m in synapses if id(m) not in analogue]
    assert len(synapses) >= 2 * 4
    rates = []

    def watch(module, inputs):
        s = inputs[0]
        assert s.dtype == dtype
        assert ((s == 0) | (s == 1)).all(), f"{module} received something else than spikes"
        rates.append(s.float().mean().item())

    for module in synapses:
        module.register_forward_pre_hook(watch)
    with torch.no_grad():
        model.to(dtype)(torch.randn(4, 3, 15, 16, dtype=dtype))
    assert len(rates) == len(synapses)
    assert sum(r > 0 for r in rates) > 0.9 * len(rates), "most layers must fire, or this test shows nothing"


@pytest.mark.parametrize("name", TINY)
def test_spikes_are_binary_under_autocast(name):
    model = make(name, **SMALL).train()
    seen = []
    for module in model.modules():
        if isinstance(module, Spike):
            module.register_forward_hook(lambda m, i, out: seen.append(((out == 0) | (out == 1)).all().item()))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 16, 16)).float().square().sum().backward()
    assert len(seen) >= 2 * 4
    assert all(seen)


@pytest.mark.parametrize("name", TINY)
def test_stateless(name):
    """An image gives the same output, whatever comes with it and came before."""
    model = lively(make(name)).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    first = model(x)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(4)]), first)
    assert torch.equal(model(x), first)
    assert not [n for n in dir(model) if "reset_state" in n or n == "reset"]


def thetas(model):
    return [b.mixer.membrane2.projection.theta.item() for stage in model.stages for b in stage.blocks]


def test_theta_for_all_for_each_stage_and_for_each_block():
    assert thetas(make("msnn_resnet12_tiny", theta=0.3)) == pytest.approx([0.3] * 12)
    each = thetas(make("msnn_resnet12_tiny", theta=[0.1, 0.2, 0.3, 0.4]))
    assert each == pytest.approx([0.1] * 2 + [0.2] * 2 + [0.3] * 6 + [0.4] * 2)
    each = [0.05 * i for i in range(12)]
    assert thetas(make("msnn_resnet12_tiny", theta=each)) == pytest.approx(each)
    with pytest.raises(ConfigurationError, match=r"theta must be one number, 4 .* or 12 .*, not \[0.1, 0.2\]"):
        make("msnn_resnet12_tiny", theta=[0.1, 0.2])
    with pytest.raises(ConfigurationError, match=r"theta .*\[0, 1\], not 1.5"):
        make("msnn_resnet12_tiny", theta=[0.1, 0.2, 0.3, 1.5])


@pytest.mark.parametrize("projection", sorted(set(PROJECTIONS) - WITHOUT_THETA))
def test_learnt_theta(projection):
    """It starts where it is told to, moves, stays inside its bounds and is spared by weight decay."""
    model = make("msnn_resnet12_tiny", **SMALL, projection=projection, theta=0.3, learn_theta=True).train()
    named = {n: p for n, p in model.named_parameters() if "theta" in n}
    assert len(named) == 4
    assert set(named) <= model.no_weight_decay()
    assert all(torch.sigmoid(p).item() == pytest.approx(0.3) for p in named.values())
    optimizer = torch.optim.SGD(named.values(), lr=1e6)
    x = torch.randn(4, 3, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in named.values()), "also where the map is one window"
    assert sum(p.grad != 0 for p in named.values()) >= 3
    optimizer.step()
    assert all(0.0 <= torch.sigmoid(p).item() <= 1.0 for p in named.values())
    assert model.eval()(x).shape == (4, 10)


def test_learnt_theta_needs_a_theta():
    with pytest.raises(ConfigurationError, match="projection 'mean' has no theta to learn"):
        make("msnn_resnet12_tiny", projection="mean", learn_theta=True)
    with pytest.raises(ConfigurationError, match=r"a learnt theta must start in \(0, 1\), not at 0.0"):
        make("msnn_resnet12_tiny", theta=0.0, learn_theta=True)


@pytest.mark.parametrize("name", TINY)
def test_drop_path_is_of_each_branch(name):
    """A sample skips each branch with the probability, and if it skips all, the block leaves it as it is."""
    model = make(name, depths=(1, 1), widths=(24, 24), drop_path_rate=0.5).train()
    block = model.stages[-1].blocks[0]
    branches = len(block.last_synapses)
    x = torch.randn(400, 24, 4, 4)
    others = (torch.zeros(400, 48, 4, 4),) if name.startswith("msnn_rnn") else ()
    out = block(x, *others)
    out = out[0] if others else out
    skipped = (out == x).flatten(1).all(1).sum().item()
    expected = 400 * 0.5**branches
    assert abs(skipped - expected) <= 4 * (expected * (1 - 0.5**branches)) ** 0.5, "four standard deviations"


@pytest.mark.parametrize("name", TINY)
def test_decay_and_threshold_learnt_by_layer_or_by_channel(name):
    fixed = make(name, **SMALL, learn_tau=False)
    assert not [n for n, _ in fixed.named_parameters() if "logit" in n or "level" in n]
    for grain in ("layer", "channel", True):
        model = make(name, **SMALL, learn_tau=grain, learn_threshold=grain, threshold=0.4)
        learnt = {n: p for n, p in model.named_parameters() if n.endswith(("decay.logit", "level"))}
        assert set(learnt) <= model.no_weight_decay()
        assert sum("level" in n for n in learnt) == sum(isinstance(m, Spike) for m in model.modules())
        assert all((p.numel() == 1) == (grain == "layer") for p in learnt.values())
        model.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
        assert all(p.grad is not None for p in learnt.values())
        assert any(p.grad.any() for n, p in learnt.items() if "level" in n)
        assert model.eval()(torch.randn(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
    """They start from the weights of their analogue siblings, fold and train, and take no images at all."""
    kwargs = {"cell": cell, "depths": (2, 1), "widths": (8, 8)}
    sibling = make("msnn_rnn12_tiny", **{**kwargs, "cell": cell.removeprefix("spiking_")})
    model = lively(make("msnn_rnn12_tiny", **kwargs), 8)
    assert sibling.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 3, 6, 6)
    expected = model(x)
    torch.testing.assert_close(model(x[:1]), expected[:1])
    torch.testing.assert_close(fold_batch_norm(model)(x), expected, rtol=1e-3, atol=1e-3)
    assert relu_baseline(model)(x).shape == (3, 10)
    assert model(x[:0]).shape == (0, 10)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def multiply_accumulates(model, size=32):
    """Dense multiply-accumulates of convolutions, linear layers and recurrent cells, by their shapes."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() // output.shape[1] * module.weight.numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, Recurrence):
            tokens = inputs[0].shape[0] * inputs[0].shape[1]
            total += tokens * sum(p.numel() for n, p in module.named_parameters() if "weight" in n)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    model.eval()(torch.rand(1, model.in_chans, size, size))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("name", "operations", "parameters", "tolerance"),
    [("msnn_resnet12", 247.4e6, 13.9e6, 0.02), ("msnn_rnn12", 250e6, 14.9e6, 0.05)],
)
def test_paper_preset_has_the_published_counts(name, operations, parameters, tolerance):
    """The counts that the authors print for 10 classes at 32x32 (arXiv 2401.10843)."""
    model = make(name, preset="paper")
    assert multiply_accumulates(model) == pytest.approx(operations, rel=tolerance)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=tolerance)


def test_the_paper_does_not_have_it():
    with pytest.raises(ConfigurationError, match="preset must be 'default' with msnn_resnet9_tiny, .* not 'paper'"):
        make("msnn_resnet9_tiny", preset="paper")


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_preset(name):
    model = make(name, **SMALL, preset="paper").train()
    modules = list(model.modules())
    assert not [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    assert not [n for n, _ in model.named_parameters() if "logit" in n]
    blocks = [m for m in modules if isinstance(m, Block)]
    assert all(b.mixer.isolated and isinstance(b.encoder1, BernoulliEncoder) for b in blocks)
    assert all(isinstance(b.mlp, AnalogueMLP) for b in blocks)
    assert {m.name for m in modules if isinstance(m, Spike)} == {"rectangular"}
    assert all(m.tau.item() == pytest.approx(0.4) for m in modules if isinstance(m, FixedDecay))
    x = torch.randn(4, 3, 16, 16)
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(model(x), first), "the coding is random"
    torch.manual_seed(3)
    assert torch.equal(model(x), first), "and seeded by torch's generator"
    first.square().sum().backward()
    # Other arguments go before those of the preset.
    assert make(name, **SMALL, preset="paper", norm=True).stem.norm.num_features == model.stem.conv.out_channels


def test_bernoulli_coding():
    encoder = BernoulliEncoder()
    x = torch.full((1, 1, 200, 200), 0.3, requires_grad=True)
    spikes = encoder(x)
    assert ((spikes == 0) | (spikes == 1)).all()
    assert spikes.mean().item() == pytest.approx(0.3, abs=0.02)
    spikes.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    outside = torch.tensor([[[[-1.0, -1e-3, 1.001, 2.0]]]], requires_grad=True)
    spikes = encoder(outside)
    assert spikes.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    spikes.sum().backward()
    assert not outside.grad.any(), "what is certain does not change with the stream"
