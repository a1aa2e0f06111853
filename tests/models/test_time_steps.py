"""More than one time step: an axis of the neurons' scan, and streams whose state is a value."""

import threading

import pytest
import timm
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import NEURONS, NeuronModel, heaviside
from lightning_msnn.models import ConvMixer
from lightning_msnn.nn import CONTEXTS, Neuron, Spike, fire
from lightning_msnn.nn.folding import fold_batch_norm
from tests.conftest import SHALLOW, TINY, rest_is_slow
from tests.models.plain import PlainNetwork
from tests.models.test_registry import lively, make


def uneven(model):
    """Give each channel its own decay, threshold and scale, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return lively(model).double()


def gradients(model, out, upstream):
    return torch.autograd.grad(out, list(model.parameters()), upstream, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("windows", "kwargs"),
    [
        *((windows, {}) for windows in ("alternate", "grid", "single")),
        ("alternate", {"neuron": "soft_reset"}),
        ("grid", {"tau_time": 0.8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_equals_a_plain_loop(name, context, windows, kwargs):
    """Outputs and gradients of images, of frames and of a stream, with each layer's own numbers."""
    model = uneven(
        make(
            name,
            context=context,
            windows=windows,
            tau=0.4,
            time_steps=3,
            learn_threshold="channel",
            depths=(2, 1, 1, 1),
            **kwargs,
        )
    )
    plain = PlainNetwork(
        model, 0.4, windows, context, soft=kwargs.get("neuron") == "soft_reset", tau_time=kwargs.get("tau_time")
    )
    image, frames = torch.randn(2, 3, 20, 16).double(), torch.randn(2, 3, 3, 20, 16).double()
    upstream = torch.randn(2, 10).double()
    for images, shown in ((image, [image] * 3), (frames, list(frames.unbind(1)))):
        out, expected = model(images), plain(shown)
        wanted = gradients(model, expected, upstream)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients(model, out, upstream), wanted, rtol=1e-7, atol=1e-9)
    state, logits = None, []
    for frame in shown:
        out, state = model.step(frame, state)
        logits.append(out)
    mean = torch.stack(logits).mean(0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(model, mean, upstream), wanted, rtol=1e-7, atol=1e-9)
    assert not torch.equal(logits[0], model.step(frames[:, 2])[0]), "the state must matter"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_one_step_equals_a_plain_loop(name, context):
    """The default networks, which kernels compute, in float32."""
    model = lively(make(name, context=context, tau=0.4))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), PlainNetwork(model, 0.4, context=context)([x]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_large_maps_equal_a_plain_loop(name, context):
    """The default networks in float64, on maps that the last stage cuts otherwise by each kind of windows."""
    model = uneven(make(name, context=context, tau=0.4))
    x = torch.randn(2, 3, 64, 64).double()
    torch.testing.assert_close(model(x), PlainNetwork(model, 0.4, context=context)([x]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("windows", ["dilated", "grid", "single"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TINY)
def test_blocks_without_gradients_equal_a_plain_loop(name, context, windows):
    """In float32, where kernels compute the steps one by one; a membrane next to its threshold may round across."""
    model = lively(make(name, context=context, windows=windows, depths=(1, 1), widths=(24, 24), tau=0.4, time_steps=3))
    plain, block = PlainNetwork(model, 0.4, windows, context), model.stages[1].blocks[0]
    x = torch.randn(3, 2, 24, 8, 6)
    received = torch.randn(3, 2, 48, 8, 6) if name.startswith("msnn_rnn") else None
    with torch.no_grad():
        slow = [plain.block(block, x[t], windows, None if received is None else received[t])[0] for t in range(3)]
        fast = block(x.flatten(0, 1)) if received is None else block(x.flatten(0, 1), received.flatten(0, 1))[0]
    close = torch.isclose(fast, torch.cat(slow), rtol=1e-4, atol=1e-4).reshape(3, -1).float().mean(1)
    assert close.min() > 0.98, close


@pytest.mark.parametrize("name", TINY)
def test_the_first_step_is_the_network_of_one_step(name):
    one = lively(make(name))
    four = make(name, time_steps=4).eval()
    four.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(four.step(x)[0], one(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.step(x)[0], one(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_states_are_values(name):
    """What is handed in is not changed, so that two futures can start from one past; networks keep nothing."""
    model = lively(make(name, time_steps=2))
    x, y = torch.randn(2, 2, 3, 32, 32)
    before = model(x)
    state = model.step(x)[1]
    kept = {layer: u.clone() for layer, u in state.membranes.items()}
    first = model.step(y, state)
    assert all(torch.equal(state.membranes[layer], u) for layer, u in kept.items())
    assert torch.equal(first[0], model.step(y, state)[0])
    assert torch.equal(model(x), before)
    assert state.membranes.keys() == {n for n, m in model.named_modules() if isinstance(m, Spike)}
    state = type(state)({layer: u.half().float() for layer, u in state.membranes.items()})  # stored, and read again
    assert model.step(y, state)[0].isfinite().all()


def test_streams_in_threads_do_not_mix():
    model = lively(make("msnn_resnet12_tiny", tau=0.4))
    clips = torch.randn(4, 3, 1, 3, 16, 16)

    def run(clip, logits):
        state = None
        for frame in clip:
            out, state = model.step(frame, state)
            logits.append(out.detach())

    expected, got = [[] for _ in clips], [[] for _ in clips]
    for clip, logits in zip(clips, expected, strict=True):
        run(clip, logits)
    threads = [threading.Thread(target=run, args=pair) for pair in zip(clips, got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_trains_over_time(name):
    model = make(name, time_steps=3).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model(torch.randn(4, 3, 3, 16, 16)).square().sum().backward()


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_over_time_and_in_streams(name):
    """What is computed once more resumes from the same membranes."""
    model = make(name, time_steps=2).train()
    frames, upstream = torch.randn(2, 4, 3, 16, 16), torch.randn(4, 10)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        first, state = model.step(frames[0])
        out = first + model.step(frames[1], state)[0] + model(frames[0])
        grads.append(gradients(model, out, upstream))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", TINY)
def test_features_over_time(name):
    model = lively(make(name, time_steps=3))
    x = torch.randn(2, 3, 32, 32)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(every) == 4
    pyramid = timm.create_model(name, features_only=True, time_steps=2, out_indices=(0, 1))
    assert len(pyramid(x)) == 2


@pytest.mark.parametrize("name", rest_is_slow(TINY, ["msnn_rnn12_tiny"]))  # a recurrence in space beside that in time
def test_exports_over_time(name):
    model = lively(make(name, depths=(2, 1), widths=(8, 8), time_steps=2))
    x, frames = torch.randn(2, 3, 6, 6), torch.randn(2, 2, 3, 6, 6)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    for inputs in (x, frames):
        exported = torch.export.export(model, (inputs,), dynamic_shapes=batch).module()
        more = torch.cat([inputs, inputs + 1, inputs])
        torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-4)


def test_compiles_over_time():
    torch._dynamo.reset()
    model = lively(make("msnn_resnet12_tiny", **SHALLOW, time_steps=2))
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def by_hand(neuron, currents):
    """Spikes and what is carried of a layer of one neuron and one channel, step by step."""
    spike = Spike(Neuron(model=neuron, threshold=0.5, tau_time=0.4, time_steps=len(currents)))
    return fire(torch.tensor(currents).view(-1, 1, 1, 1), None, spike)[0].flatten().tolist()


def test_leak_and_reset_by_hand():
    """u = I + tau u (1 - s), or I + tau (u - V s), of the step before."""
    # 0.42; 0.4 + 0.168 = 0.568 fires; 0.45 alone does not
    assert by_hand("lif", [0.42, 0.4, 0.45, 0.4]) == [0.0, 1.0, 0.0, 1.0]
    # 0.9 fires and leaves 0.16: 0.4 + 0.16 = 0.56 fires, where after a reset to zero 0.4 would not
    assert by_hand("soft_reset", [0.9, 0.4]) == [1.0, 1.0]
    assert by_hand("lif", [0.9, 0.4]) == [1.0, 0.0]


def test_a_neuron_model_of_ones_own(monkeypatch):
    """It is no kernel's: what it computes is what it says, in one step and in several, and it trains."""
    monkeypatch.setitem(
        NEURONS, "twice", NeuronModel(lambda u, h, v: 2.0 * heaviside(u, h, v), lambda u, s, v, tau: 0.0 * u)
    )
    mixer = ConvMixer(3, "dilated", norm=False, neuron=Neuron(model="twice", threshold=0.0))
    seen = []
    mixer.spike1.register_forward_hook(lambda m, args, out: seen.append(out))
    mixer((torch.rand(2, 3, 8, 8) < 0.5).float()).sum().backward()
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    assert all(p.grad is not None for p in mixer.parameters())
    once = make("msnn_resnet12_tiny", neuron="twice").eval()
    twice = make("msnn_resnet12_tiny", neuron="twice", time_steps=2).eval()
    twice.load_state_dict(once.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(twice(x), once(x))
    twice.train()(x).sum().backward()


def test_another_definition_under_a_known_name_is_not_the_kernels(monkeypatch):
    ours = make("msnn_resnet12_tiny").eval()
    monkeypatch.setitem(NEURONS, "lif", NeuronModel(lambda u, h, v: heaviside(u, h, v + 100.0), NEURONS["lif"].reset))
    other = make("msnn_resnet12_tiny").eval()
    other.load_state_dict(ours.state_dict())
    fired = []
    for module in other.modules():
        if isinstance(module, Spike):
            module.register_forward_hook(lambda m, args, out: fired.append(out.sum().item()))
    other(torch.randn(2, 3, 16, 16))
    assert fired
    assert not any(fired)


@pytest.mark.parametrize("name", TINY)
def test_bad_steps(name):
    with pytest.raises(ConfigurationError, match="time_steps.*at least 1, not 0"):
        make(name, time_steps=0)
    with pytest.raises(ConfigurationError, match="neuron model 'liff'.*did you mean 'lif'"):
        make(name, neuron="liff")
    with pytest.raises(ConfigurationError, match=r"tau_time must be in \[0, 1\], not 1.5"):
        make(name, tau_time=1.5)
    model = make(name, time_steps=2).eval()
    with pytest.raises(ConfigurationError, match="2 time steps takes 2 frames, not 3"):
        model(torch.randn(2, 3, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    state = model.step(x)[1]
    other = make(name, time_steps=2, depths=(1, 1, 1, 1)).eval()
    with pytest.raises(ConfigurationError, match=r"of another network: it has \d+ layers .*, this one has \d+"):
        other.step(x, state)
    wider = make(name, time_steps=2, widths=(48, 48, 48, 48)).eval()
    for network, images in ((model, x[:1]), (model, torch.randn(2, 3, 32, 32)), (wider, x)):
        with pytest.raises(ConfigurationError, match="of another network, batch or image size"):
            network.step(images, state)
    with pytest.raises(ConfigurationError, match="folded"):
        fold_batch_norm(make(name).eval()).step(x)
