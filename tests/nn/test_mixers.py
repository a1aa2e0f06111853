import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.published import PublishedMixer
from lightning_msnn.energy import count_operations
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import PROJECTIONS, WINDOWS, merge, split
from lightning_msnn.functional.projection import WITHOUT_THETA
from lightning_msnn.models import CELLS, SPIKING_CELLS, AttentionMixer, ConvMixer, RecurrentMixer, SpikingRecurrence
from lightning_msnn.nn import CONTEXTS, Neuron, set_annealing
from tests.conftest import GOLDEN

UNUSED = {"allow_unused": True, "materialize_grads": True}  # on a map that is one window


def golden_mixer(kind):
    """A mixer with the weights of the authors' program, and that program's tensors."""
    golden = load_file(GOLDEN / f"conv_mixer_{kind}.safetensors")
    mixer = ConvMixer(
        6, kind, "isolated", norm=False, neuron=Neuron(theta=0.25, tau=0.4, learn_tau=False, surrogate="rectangular")
    ).eval()
    with torch.no_grad():
        for synapse, name in ((mixer.synapse1, "conv1"), (mixer.synapse2, "conv2"), (mixer.project, "fc")):
            weight = golden[f"{name}.weight"]
            synapse.conv.weight.copy_(weight.view(synapse.conv.weight.shape))
            synapse.conv.bias.copy_(golden[f"{name}.bias"])
    return mixer, golden


@torch.no_grad()
def observed(mixer, names, *inputs):
    """What modules of a mixer return on the way, equation by equation, and what it returns itself."""
    seen = {}
    handles = [getattr(mixer, n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: out})) for n in names]
    output = mixer(*inputs)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names], output


@pytest.mark.parametrize("kind", ["non_dilated", "dilated"])
def test_golden_by_the_kernels(kind):
    mixer, golden = golden_mixer(kind)
    with torch.no_grad():
        torch.testing.assert_close(mixer(golden["input"]), golden["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["non_dilated", "dilated"])
def test_golden(kind):
    mixer, golden = golden_mixer(kind)
    (u1, u2), output = observed(mixer, ["membrane1", "membrane2"], golden["input"])
    spikes = [mixer.spike2(u) for u in u2]
    assert len(u1) == len(u2) == 4
    for k in range(4):
        torch.testing.assert_close(u1[k], golden[f"window{k + 1}.membrane1"], rtol=0, atol=1e-5)
        torch.testing.assert_close(u2[k], golden[f"window{k + 1}.membrane2"], rtol=0, atol=1e-5)
        assert torch.equal(spikes[k], golden[f"window{k + 1}.spikes"])
    assert torch.equal(merge(spikes, kind, 8, 8), golden["merged_spikes"])
    torch.testing.assert_close(output, golden["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["non_dilated", "dilated"])
def test_golden_recurrent(kind):
    golden = load_file(GOLDEN / f"recurrent_mixer_{kind}.safetensors")
    mixer = RecurrentMixer(
        5, kind, "isolated", norm=False, neuron=Neuron(theta=0.25, tau=0.4, learn_tau=False, surrogate="rectangular")
    ).eval()
    weights = {name.removeprefix("lstm."): w for name, w in golden.items() if name.startswith("lstm.")}
    mixer.recurrence.load_state_dict(weights)
    (spikes, _), (_, membrane) = observed(mixer, ["spike", "membrane"], golden["input"], golden["membrane"])
    torch.testing.assert_close(mixer(golden["input"], golden["membrane"])[1], membrane)
    torch.testing.assert_close(membrane, golden["new_membrane"], rtol=0, atol=1e-5)
    assert torch.equal(merge(list(spikes.chunk(4)), kind, 8, 8), golden["merged_spikes"])
    assert 0 < spikes.mean() < 1


TORCH_CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
LEARNT = Neuron(learn_threshold="channel", threshold=0.1)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_recurrence_equals_torch(cell):
    """Parameters have the names and shapes of torch's own module, which computes the same."""
    recurrent = RecurrentMixer(6, cell=cell).recurrence
    theirs = TORCH_CELLS[cell](6, 6, batch_first=True, bidirectional=True)
    theirs.load_state_dict(recurrent.state_dict())
    tokens = (torch.rand(3, 7, 6) < 0.5).float()
    assert torch.equal(recurrent(tokens), theirs(tokens)[0])


def test_every_cell_is_one_of_torch_or_fires():
    assert CELLS.keys() == {*TORCH_CELLS, *SPIKING_CELLS}


@pytest.mark.parametrize("neuron", [Neuron(threshold=0.1), LEARNT, Neuron(threshold=-0.05)], ids=str)
@pytest.mark.parametrize("cell", SPIKING_CELLS)
def test_a_spiking_recurrence_is_torch_with_a_state_that_fires(cell, neuron):
    """Token by token, by torch's own cells: an LSTM or a GRU whose output is replaced by its spikes in between."""
    torch.manual_seed(0)
    ours = SpikingRecurrence(6, 5, cell, neuron)
    if ours.spike.level is not None:
        ours.spike.level.data += 0.1 * torch.rand(10)
    tokens = (torch.rand(3, 7, 6) < 0.5).float()
    ways = []
    for way, sequence in enumerate((tokens, tokens.flip(1))):
        lstm = cell == "spiking_lstm"
        step = (torch.nn.LSTMCell if lstm else torch.nn.GRUCell)(6, 5)
        suffix = "_l0_reverse" if way else "_l0"
        step.load_state_dict({name: ours.state_dict()[name + suffix] for name in step.state_dict()})
        level = neuron.threshold if ours.spike.level is None else ours.spike.level.view(2, 5)[way]
        h = state = torch.zeros(3, 5)
        read = []
        for token in sequence.unbind(1):
            fired = (h >= level).float()
            if lstm:
                h, state = step(token, (fired, state))
            else:  # the update keeps what the cell was fed: put back the state in its place
                update = torch.sigmoid(
                    step.weight_ih[5:10] @ token.T
                    + (step.weight_hh[5:10] @ fired.T)
                    + (step.bias_ih + step.bias_hh)[5:10, None]
                ).T
                h = step(token, fired) + update * (h - fired)
            read.append(h)
        ways.append(torch.stack(read, 1))
    expected = torch.cat((ways[0], ways[1].flip(1)), 2)
    torch.testing.assert_close(ours(tokens), expected)
    assert 0 < (expected >= 0.1).float().mean() < 1


@pytest.mark.parametrize("cell", SPIKING_CELLS)
def test_a_spiking_recurrence_anneals_from_torch(cell):
    """With rectified outputs that were positive throughout it would be torch's cell; its gradient reaches all."""
    torch.manual_seed(0)
    ours = SpikingRecurrence(6, 5, cell, LEARNT).train()
    tokens = (torch.rand(3, 7, 6) < 0.5).float()
    set_annealing(ours, 0.0)
    assert not torch.equal(ours(tokens), ours.eval()(tokens))
    ours.train()
    for share in (0.0, 0.5, 1.0):
        set_annealing(ours, share)
        ours.zero_grad()
        ours(tokens).square().sum().backward()
        for name, parameter in ours.named_parameters():
            if not (share == 0.0 and name == "spike.level"):
                assert parameter.grad is not None, (share, name)
                assert parameter.grad.any(), (share, name)


@pytest.mark.parametrize(
    ("cell", "torch_cell", "fewer"),
    [("spiking_lstm", torch.nn.LSTM, 0), ("spiking_gru", torch.nn.GRU, 1)],  # n + z (h - n) is (1 - z) n + z h
)
def test_all_products_of_a_spiking_recurrence_are_accumulates(cell, torch_cell, fewer):
    torch.manual_seed(0)
    ours = SpikingRecurrence(6, 5, cell, Neuron(threshold=0.05)).eval()
    fired = []
    handle = ours.spike.register_forward_hook(lambda module, inputs, output: fired.append(output.sum().item()))
    tokens = (torch.rand(4, 7, 6) < 0.5).float()
    record = count_operations(ours, tokens)
    handle.remove()
    gates = CELLS[cell]
    assert record.total("multiply_accumulates") == 0
    assert record.total("accumulates") == (2 * tokens.sum() + sum(fired)) * gates * 5
    assert 0 < sum(fired) < 4 * 7 * 10
    assert not record.uncounted
    analogue = count_operations(torch_cell(6, 5, batch_first=True, bidirectional=True).eval(), tokens)
    before_the_first = 4 * 10 * gates * 5  # what is fed back there is a constant
    assert record.total("dense") == analogue.total("dense") - before_the_first
    assert record.total("multiplications") == analogue.total("multiplications") - 4 * 7 * 10 * fewer
    assert record.total("weights_read") == analogue.total("weights_read")


def test_unknown_cell():
    with pytest.raises(ConfigurationError, match="unknown recurrent cell 'lstn'.*did you mean 'lstm'"):
        RecurrentMixer(4, cell="lstn")


def recurrent_loop(mixer, spikes, before):
    """The recurrent method as it is written, window by window."""
    height, width = spikes.shape[2:]
    m = split(before, mixer.windows)
    omega, tau = mixer.membrane.projection, mixer.membrane.decay()
    new = []
    for k, window in enumerate(split(spikes, mixer.windows)):
        tokens = torch.stack([window[:, :, i, j] for i in range(window.shape[2]) for j in range(window.shape[3])], 1)
        read = mixer.recurrence(tokens)
        current = torch.stack(list(read.unbind(1)), 2).view(len(spikes), -1, *window.shape[2:])
        if k == 0:
            new.append(tau * omega(m[0], m[1]) + current)
        elif k == 1:
            new.append(tau * omega(new[0], m[1]) + current)
        else:
            new.append(tau * omega(m[k], new[k - 1]) + current)
    after = merge(new, mixer.windows, height, width)
    if mixer.isolated:
        return merge([mixer.project(mixer.spike(u)) for u in new], mixer.windows, height, width), after
    return mixer.project(mixer.spike(after)), after


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("windows", sorted(set(WINDOWS) - {"single"}))
def test_recurrent_mixer_equals_its_formula(windows, context, projection):
    mixer = RecurrentMixer(
        4, windows, context, norm=False, neuron=Neuron(projection=projection, tau=0.4, threshold=0.0)
    )
    for size in [(8, 8), (5, 6)]:
        spikes = (torch.rand(2, 4, *size) < 0.5).float()
        before = torch.randn(2, 8, *size, requires_grad=True)
        out, expected = mixer(spikes, before), recurrent_loop(mixer, spikes, before)
        upstream = [torch.randn_like(o) for o in out]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(
            expected, [before, *mixer.parameters()], upstream, allow_unused=True, materialize_grads=True
        )
        got = torch.autograd.grad(
            out, [before, *mixer.parameters()], upstream, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def attention_loop(mixer, spikes):
    """Spiking attention as it is written, head by head and window by window."""
    height, width = spikes.shape[2:]
    dim, d = spikes.shape[1], mixer.head_dim
    tau1, tau2 = mixer.membrane1.decay(), mixer.membrane2.decay()
    source = split(spikes, mixer.windows) if mixer.isolated else split(mixer.qkv(spikes), mixer.windows)
    u1, u2 = [], []
    for k, window in enumerate(source):
        current = mixer.qkv(window) if mixer.isolated else window
        u1.append(current if k == 0 else tau1 * u1[-1] + current)
    merged = split(mixer.spike1(merge(u1, mixer.windows, height, width)), mixer.windows)
    for k, u in enumerate(u1):
        s = (mixer.spike1(u) if mixer.isolated else merged[k]).flatten(2).transpose(1, 2)
        heads = []
        for h in range(dim // d):
            q, key, v = (s[:, :, part * dim + h * d : part * dim + (h + 1) * d] for part in range(3))
            heads.append((q @ key.transpose(1, 2)) @ v * mixer.scale)
        current = mixer.norm(torch.cat(heads, 2).transpose(1, 2).reshape(len(spikes), dim, *u.shape[2:]))
        if k:
            current = current + tau2 * mixer.membrane2.projection(u1[k - 1][:, 2 * dim :], u2[-1])
        u2.append(current)
    if mixer.isolated:
        return merge([mixer.project(mixer.spike2(u)) for u in u2], mixer.windows, height, width)
    return mixer.project(mixer.spike2(merge(u2, mixer.windows, height, width)))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_attention_mixer_equals_its_formula(windows, context, projection):
    mixer = AttentionMixer(
        8, windows, context, head_dim=4, neuron=Neuron(projection=projection, tau=0.4, threshold=0.1)
    ).eval()
    for size in [(8, 8), (3, 4)]:  # more tokens in a window than channels in a head, and fewer
        spikes = (torch.rand(2, 8, *size) < 0.5).float()
        out, expected = mixer(spikes), attention_loop(mixer, spikes)
        upstream = torch.randn_like(out)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(
            expected, list(mixer.parameters()), upstream, allow_unused=True, materialize_grads=True
        )
        got = torch.autograd.grad(out, list(mixer.parameters()), upstream, **UNUSED)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_heads_must_fit():
    with pytest.raises(ConfigurationError, match="multiples of 24, the channels of a head, not 40"):
        AttentionMixer(40)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 2), (1, 4), (1, 15)])
def test_batched_windows_equal_the_published_loop(windows, size, projection):
    mixer = ConvMixer(5, windows, "isolated", neuron=Neuron(projection=projection, tau=0.4, threshold=0.0)).eval()
    x = (torch.rand(2, 5, *size) < 0.5).float()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = mixer(a), PublishedMixer(mixer)(b)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = [p for p in mixer.parameters() if p.requires_grad]
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, [a, *weights], upstream, **UNUSED)
    wanted = torch.autograd.grad(expected, [b, *weights], upstream, **UNUSED)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def shared_loop(mixer, spikes):
    """Shared context from the formulas of the method, pixel by pixel of each window."""
    height, width = spikes.shape[2:]
    u1 = []
    for k, current in enumerate(split(mixer.synapse1(spikes), mixer.windows)):
        u1.append(current if k == 0 else current + mixer.membrane1.decay() * u1[k - 1])
    s1 = mixer.spike1(merge(u1, mixer.windows, height, width))
    u2 = []
    for k, current in enumerate(split(mixer.synapse2(s1), mixer.windows)):
        omega = mixer.membrane2.projection
        u2.append(current if k == 0 else current + mixer.membrane2.decay() * omega(u1[k - 1], u2[k - 1]))
    return mixer.project(mixer.spike2(merge(u2, mixer.windows, height, width)))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 2), (1, 4), (1, 15)])
def test_shared_context_equals_its_formula(windows, size, projection):
    mixer = ConvMixer(5, windows, "shared", neuron=Neuron(projection=projection, tau=0.4, threshold=0.0))
    x = (torch.rand(2, 5, *size) < 0.5).float()
    out, expected = mixer.eval()(x), shared_loop(mixer, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    weights = list(mixer.parameters())
    got = torch.autograd.grad(out, weights, upstream, **UNUSED)
    wanted = torch.autograd.grad(expected, weights, upstream, **UNUSED)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_one_window_is_the_same_shared_or_isolated():
    shared = ConvMixer(4, "single", "shared", neuron=Neuron(threshold=0.0)).eval()
    isolated = ConvMixer(4, "single", "isolated", neuron=Neuron(threshold=0.0)).eval()
    isolated.load_state_dict(shared.state_dict())
    x = (torch.rand(2, 4, 6, 6) < 0.5).float()
    assert torch.equal(shared(x), isolated(x))


def test_isolated_windows_do_not_see_each_other():
    """With no memory from window to window, a change in one quarter leaves the others as they were."""
    mixer = ConvMixer(4, "non_dilated", "isolated", neuron=Neuron(tau=0.0, learn_tau=False, threshold=0.0)).eval()
    x = (torch.rand(1, 4, 8, 8) < 0.5).float()
    y = x.clone()
    y[..., 4:, 4:] = 1 - y[..., 4:, 4:]
    same = (mixer(x) == mixer(y)).all(1)[0]
    assert same[:4].all()
    assert same[4:, :4].all()
    assert not same[4:, 4:].all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_membranes_carry_from_window_to_window(context):
    """A change in the first window reaches the last, where no kernel does."""
    mixer = ConvMixer(4, "non_dilated", context, neuron=Neuron(tau=0.4)).eval()
    x = (torch.rand(1, 4, 16, 16) < 0.5).float()
    y = x.clone()
    y[..., :2, :2] = 1 - y[..., :2, :2]
    ((u,), _), ((v,), _) = (observed(mixer, ["membrane1"], image) for image in (x, y))
    difference = (u[3] - v[3]).abs().amax(1)[0]
    assert difference[:2, :2].max() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"windows": "dilatd"}, r"windows 'dilatd'.*did you mean 'dilated'"),
        ({"context": "both"}, "context 'both'.*isolated, shared"),
        ({"projection": "cosine"}, "projection 'cosine'.*mean, .*did you mean 'sine'"),
        ({"theta": float("nan")}, "theta .*nan"),
        ({"theta": float("inf")}, "theta .*inf"),
        ({"theta": 1.5}, "theta .*1.5"),
        ({"tau": 1.5, "learn_tau": False}, r"tau .*\[0, 1\].*1.5"),
        ({"tau": 0.0}, r"learnt tau .*\(0, 1\).*0.0"),
        ({"tau": float("nan"), "learn_tau": False}, "tau .*nan"),
        ({"threshold": float("nan")}, "threshold .*nan"),
        ({"surrogate": "trianglar"}, "surrogate gradient 'trianglar'.*did you mean 'triangular'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        ConvMixer(4, **kwargs) if kwargs.keys() & {"windows", "context"} else ConvMixer(4, neuron=Neuron(**kwargs))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("learn_theta", [False, True])
@pytest.mark.parametrize("kind", [ConvMixer, partial(AttentionMixer, head_dim=3)])
def test_fused_scans_equal_plain_ones_in_a_mixer(kind, windows, context, projection, learn_theta):
    """Outputs to 1e-5 and spikes exactly, gradients of weights, tau and theta; what is watched is the reference."""
    if learn_theta and projection in WITHOUT_THETA:
        pytest.skip("no theta to learn")
    kwargs = {"projection": projection, "tau": 0.4, "threshold": 0.1, "learn_theta": learn_theta}
    fused = kind(6, windows, context, neuron=Neuron(**kwargs)).eval()
    plain = copy.deepcopy(fused)
    for module in plain.modules():
        module.register_forward_pre_hook(lambda m, args: None)  # what is watched runs equation by equation
    fired = []
    for mixer in (fused, plain):
        for spike in (mixer.spike1, mixer.spike2):
            spike.register_forward_hook(lambda m, args, out: fired.append(out))
    for size in [(8, 8), (7, 10), (1, 15), (4, 1)]:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            spikes = (torch.rand(3, 6, *size) < 0.5).to(dtype).to(memory_format=torch.channels_last)
            a, b = fused.to(dtype)(spikes), plain.to(dtype)(spikes)
            for one, other in zip(fired[-4:-2], fired[-2:], strict=True):
                assert torch.equal(one, other)
                assert 0 < one.mean() < 1
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            # Sums of thousands, which float32 rounds beyond 1e-5 where they nearly cancel.
            tolerance *= 10
            upstream = torch.randn_like(a)
            got = torch.autograd.grad(a, list(fused.parameters()), upstream, **UNUSED)
            wanted = torch.autograd.grad(
                b, list(plain.parameters()), upstream, allow_unused=True, materialize_grads=True
            )
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
