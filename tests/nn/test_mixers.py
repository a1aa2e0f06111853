import pytest
import torch
from safetensors.torch import load_file

from benchmarks.published import PublishedMixer
from lightning_msnn.energy import count_operations
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import WINDOWS, merge
from lightning_msnn.models import CELLS, SPIKING_CELLS, AttentionMixer, ConvMixer, RecurrentMixer, SpikingRecurrence
from lightning_msnn.nn import Neuron, set_annealing
from tests.conftest import GOLDEN

SOME = ["sine", "tanh"]
"""A projection that kernels compute, and one that they leave to the equations; tests/functional has all of them."""
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


TORCH_CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
LEARNT = Neuron(learn_threshold="channel", threshold=0.1)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_recurrence_equals_torch(cell):
    """Parameters have the names and shapes of torch's own module, which computes the same."""
    recurrent = RecurrentMixer(6, cell=cell).recurrence
    theirs = TORCH_CELLS[cell](6, 6, batch_first=True, bidirectional=True)
    theirs.load_state_dict(recurrent.state_dict())
    tokens = (torch.rand(3, 7, 6) < 0.5).float()
    assert torch.equal(recurrent(tokens), theirs(tokens)[0])


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


def test_heads_must_fit():
    with pytest.raises(ConfigurationError, match="multiples of 24, the channels of a head, not 40"):
        AttentionMixer(40)


@pytest.mark.parametrize("projection", SOME)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 15)])
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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"windows": "dilatd"}, r"windows 'dilatd'.*did you mean 'dilated'"),
        ({"context": "both"}, "context 'both'.*isolated, shared"),
        ({"projection": "cosine"}, "projection 'cosine'.*mean, .*did you mean 'sine'"),
        ({"theta": float("nan")}, "theta .*nan"),
        ({"theta": 1.5}, "theta .*1.5"),
        ({"tau": 1.5, "learn_tau": False}, r"tau .*\[0, 1\].*1.5"),
        ({"tau": 0.0}, r"learnt tau .*\(0, 1\).*0.0"),
        ({"threshold": float("nan")}, "threshold .*nan"),
        ({"surrogate": "trianglar"}, "surrogate gradient 'trianglar'.*did you mean 'triangular'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        ConvMixer(4, **kwargs) if kwargs.keys() & {"windows", "context"} else ConvMixer(4, neuron=Neuron(**kwargs))
