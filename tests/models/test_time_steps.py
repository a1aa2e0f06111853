"""More than one time step: state in and out, none kept."""

import pytest
import timm
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import split
from lightning_msnn.nn import CONTEXTS, ConvMixer, Spike
from tests.conftest import TINY
from tests.models.test_registry import lively, make


@pytest.mark.parametrize("windows", ["alternate", "grid", "single"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_one_call_equals_steps_with_the_state_handed_in(name, context, windows):
    model = lively(make(name, context=context, windows=windows, tau=0.4, time_steps=4))
    x = torch.randn(2, 3, 32, 32)
    state, logits = None, []
    for _ in range(4):
        out, state = model.step(x, state)
        logits.append(out)
    torch.testing.assert_close(torch.stack(logits).mean(0), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits[0], logits[3]), "the state must matter"
    frames = torch.randn(2, 4, 3, 32, 32)
    state, logits = None, []
    for t in range(4):
        out, state = model.step(frames[:, t], state)
        logits.append(out)
    torch.testing.assert_close(torch.stack(logits).mean(0), model(frames), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[:, None].repeat(1, 4, 1, 1, 1)), model(x))


@pytest.mark.parametrize("name", TINY)
def test_the_first_step_is_the_network_of_one_step(name):
    one = lively(make(name))
    four = make(name, time_steps=4).eval()
    four.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(four.step(x)[0], one(x))
    torch.testing.assert_close(one.step(x)[0], one(x))


@pytest.mark.parametrize("name", TINY)
def test_states_are_values(name):
    """What is handed in is not changed, so that two futures can start from one past."""
    model = lively(make(name, time_steps=2))
    x, y = torch.randn(2, 2, 3, 32, 32)
    state = model.step(x)[1]
    kept = [entry.clone() for entry in state]
    first = model.step(y, state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    again = model.step(y, state)
    assert torch.equal(first[0], again[0])
    assert len(state) == model.neuron_layers == sum(isinstance(m, Spike) for m in model.modules())
    assert all(entry.dim() > 0 for entry in state), "every layer of neurons carries a membrane"


@pytest.mark.parametrize("name", TINY)
def test_trains_over_time(name):
    model = make(name, time_steps=3).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model(torch.randn(4, 3, 3, 16, 16)).square().sum().backward()


@pytest.mark.parametrize("name", TINY)
def test_features_over_time(name):
    model = lively(make(name, time_steps=3))
    x = torch.randn(2, 3, 32, 32)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(every) == 4
    pyramid = timm.create_model(name, features_only=True, time_steps=2, out_indices=(0, 1))
    assert len(pyramid(x)) == 2


def test_leak_and_reset_by_hand():
    """One neuron, one window: u = I + tau u (1 - s) from the step before."""
    spike = Spike(threshold=0.5, tau=0.4)
    state = [torch.zeros(())]
    current = torch.tensor([[0.3, 0.6, 0.4]])
    assert torch.equal(spike(current, state), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(state[0], torch.tensor([[0.12, 0.0, 0.16]]))
    # 0.42, 0.6, 0.56: the third reaches its threshold in the second step
    assert torch.equal(spike(current, state), torch.tensor([[0.0, 1.0, 1.0]]))
    torch.testing.assert_close(state[0], torch.tensor([[0.168, 0.0, 0.0]]))


@pytest.mark.parametrize("context", CONTEXTS)
def test_windows_leak_by_their_formula(context):
    """Layer 1 of a mixer: tau u_k (1 - s_k) of each window enters its current in the next step."""
    mixer = ConvMixer(3, "dilated", context, tau=0.4, learn_tau=False, norm=False)
    x = (torch.rand(2, 3, 8, 8) < 0.5).float()
    seen = {}
    for name in ("membrane1", "spike1"):
        getattr(mixer, name).register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, out))
    state = [torch.zeros(()), torch.zeros(())]
    mixer(x, state)
    fired = seen["spike1"].chunk(4) if context == "isolated" else split(seen["spike1"], "dilated")
    for k, s in enumerate(fired):
        torch.testing.assert_close(state[0][k], 0.4 * seen["membrane1"][k] * (1 - s))


@pytest.mark.parametrize("name", TINY)
def test_bad_steps(name):
    with pytest.raises(ConfigurationError, match="time_steps.*at least 1, not 0"):
        make(name, time_steps=0)
    model = make(name, time_steps=2)
    with pytest.raises(ConfigurationError, match="2 time steps takes 2 frames, not 3"):
        model(torch.randn(2, 3, 3, 16, 16))
    with pytest.raises(ConfigurationError, match=r"must have \d+ entries, .*, not 1"):
        model.step(torch.randn(2, 3, 16, 16), [torch.zeros(())])
