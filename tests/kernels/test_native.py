"""The kernels in C equal the equations in float64, are chosen where they can be, and leave the rest to those."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_msnn.functional import (
    PROJECTIONS,
    SURROGATES,
    WINDOWS,
    anneal,
    count,
    coupled_scan,
    heaviside,
    merge,
    recurrent_scan,
    scan,
    side,
    split,
)
from lightning_msnn.functional.spike import SOFT
from lightning_msnn.functional.windows import Corners
from lightning_msnn.kernels import geometry, native
from lightning_msnn.kernels.geometry import Layer, Parameters
from lightning_msnn.kernels.layer import covered, kernels_of, neurons
from lightning_msnn.models import ConvMixer
from lightning_msnn.nn import Neuron, Spike
from lightning_msnn.nn.layer import Cut, fire, normalise

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")
LAST = torch.channels_last
SIZES = [(8, 8), (7, 5), (4, 6), (2, 2), (1, 4), (1, 11)]


def operands(layer, size, channels=19, batch=3, dtype=torch.float32, by_channel=True, level=False, affine=True):
    """Random tensors for a layer, by name; those that are given gradients are leaves."""
    n = count(layer.kind, *size)
    window = split(torch.empty(1, 1, *size), layer.kind)[0].shape[2:]
    whole, apart = (batch, channels, *size), (n * batch, channels, *window)
    made = {"current": torch.randn(apart if layer.windows_in else whole)}
    if affine:
        made |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    if layer.form != "still":
        made["tau"] = torch.rand(channels, 1, 1) if by_channel else torch.rand(())
    if layer.form in ("coupled", "recurrent"):
        made["theta"] = torch.tensor(0.3)
        if layer.form == "recurrent" or n > 1:
            made["other"] = torch.randn(whole if layer.form == "recurrent" else ((n - 1) * batch, channels, *window))
    if not layer.surrogate:
        made["residual"] = torch.randn(apart if layer.windows_out else whole)
    if level:
        made["level"] = torch.rand(channels)
    maps = ("current", "other", "residual")
    for name in made:
        made[name] = made[name].to(dtype).contiguous(memory_format=LAST) if name in maps else made[name]
        made[name].requires_grad_()
    return made


def equations(layer, size, x, share=None):
    """What a layer returns, hands on and keeps merged, by the reference, in the type of its tensors."""
    n, current = count(layer.kind, *size), x["current"]
    if layer.training:
        current = F.batch_norm(current, None, None, x.get("weight"), x.get("bias"), True, 0.0, layer.eps)
    windows = list(current.chunk(n)) if layer.windows_in else split(current, layer.kind)
    if n > 1 and layer.form != "still":
        omega = lambda a, b: PROJECTIONS[layer.omega](a, b, x["theta"])  # noqa: E731
        if layer.form == "first":
            windows = scan(windows, x["tau"])
        elif layer.form == "coupled":
            windows = coupled_scan(windows, list(x["other"].chunk(n - 1)), x["tau"], omega)
        else:
            windows = recurrent_scan(windows, split(x["other"], layer.kind), x["tau"], omega)
    merged = torch.cat(windows) if layer.windows_out else merge(windows, layer.kind, *size)
    handed = torch.cat(windows[:-1])[:, -layer.handed :] if layer.handed and n > 1 else None
    if not layer.surrogate:
        return merged + x["residual"], handed, merged
    level = x["level"].view(-1, 1, 1) if "level" in x else layer.threshold
    spikes = heaviside(merged - level, SURROGATES[layer.surrogate])
    return (spikes if share is None else anneal(merged, spikes, level, share, layer.soft)), handed, merged


def compare(layer, size, x, share=None, tolerance=1e-5):
    """Compare a kernel with the equations in float64: outputs, spikes away from their thresholds, gradients."""
    given = {k: v for k, v in x.items() if k != "current"}
    got = neurons(x["current"], layer, size, anneal=share, **given)
    exact = {k: v.detach().double().requires_grad_() for k, v in x.items()}
    expected = equations(layer, size, exact, None if share is None else share.double())
    level = exact["level"].view(-1, 1, 1) if "level" in x else layer.threshold
    clear = ((expected[2] - level).abs() > 1e-5) | (not layer.surrogate)
    pairs = [(a, b) for a, b in zip(got[:3], expected, strict=True) if b is not None and a.numel()]
    for a, b in pairs:
        keep = clear if a is got[0] else torch.ones_like(b, dtype=torch.bool)
        exactly = layer.surrogate and share is None and a is got[0]
        bound = 0.0 if exactly else tolerance * max(1.0, float(b.detach().abs().max()))
        assert float(((a.double() - b).abs() * keep).max()) <= bound
    upstream = [torch.randn_like(a) for a, _ in pairs]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad([a for a, _ in pairs], list(x.values()), upstream, **options)
    wanted = torch.autograd.grad([b for _, b in pairs], list(exact.values()), [g.double() for g in upstream], **options)
    for name, a, b in zip(x, gradients, wanted, strict=True):
        assert a.shape == x[name].shape
        sums = name in ("tau", "theta", "weight", "bias", "level")  # over all places
        bound = (10 if sums else 1) * tolerance * max(1.0, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= bound, name


def layer_of(form, kind, windows_in, windows_out, **more):
    more.setdefault("omega", "sine" if form in ("coupled", "recurrent") else "none")
    defaults = {"keeps": True, "training": True, "threshold": 0.3, "handed": 7 if form == "first" else 0}
    return Layer(form, kind=kind, windows_in=windows_in, windows_out=windows_out, **{**defaults, **more})


@pytest.mark.parametrize("surrogate", ["triangular", ""])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("windows_in", "windows_out"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("kind", geometry.KINDS)
@pytest.mark.parametrize("form", geometry.FORMS)
def test_every_form_and_kind(form, kind, windows_in, windows_out, size, surrogate):
    layer = layer_of(form, kind, windows_in, windows_out, surrogate=surrogate)
    compare(layer, size, operands(layer, size))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("kind", ["non_dilated", "dilated", "grid"])
@pytest.mark.parametrize("form", ["coupled", "recurrent"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection(projection, form, kind, keeps):
    layer = layer_of(form, kind, False, False, omega=projection, surrogate="triangular", keeps=keeps)
    compare(layer, (8, 8), operands(layer, (8, 8), by_channel=keeps))


@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("soft", [None, *SOFT])
@pytest.mark.parametrize("kind", ["single", "dilated", "grid"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_threshold_and_annealing(surrogate, kind, soft, level):
    layer = layer_of("first", kind, False, False, surrogate=surrogate, soft=soft or "rectifier", keeps=False, handed=0)
    x = operands(layer, (8, 6), level=level)
    with torch.no_grad():  # no membrane at a corner of a rectangle or a ramp
        x["current"].mul_(3.0)
    compare(layer, (8, 6), x, None if soft is None else torch.tensor(0.3), 1e-4 if surrogate == "rectangular" else 1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 70, 70), (5, 600, 8), (40, 48, 12)])
@pytest.mark.parametrize("form", ["first", "coupled"])
def test_tasks(batch, channels, size, form, threads):
    """Blocks of channels which do not divide them, runs of places, groups of images, threads that have none."""
    layer = layer_of(form, "dilated", False, False, surrogate="triangular", handed=channels if form == "first" else 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(layer, (size, size), operands(layer, (size, size), channels, batch), tolerance=3e-5)
    finally:
        torch.set_num_threads(before)


def results(layer, size, x):
    made = neurons(x["current"], layer, size, **{k: v for k, v in x.items() if k != "current"})
    total = sum((o.float() * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in made[:3] if o.numel())
    return (*(o.detach() for o in made), *torch.autograd.grad(total, list(x.values())))


@pytest.mark.parametrize("form", ["still", "first", "coupled"])
def test_the_same_for_any_number_of_threads(form):
    layer = layer_of(form, "single" if form == "still" else "dilated", False, False, surrogate="triangular")
    x = operands(layer, (16, 16), 48, 9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = results(layer, (16, 16), x)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(results(layer, (16, 16), x), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["single", "dilated", "grid"])
@pytest.mark.parametrize("form", ["still", "first", "coupled", "recurrent"])
def test_bf16_is_rounded_once(form, kind):
    """Everything between is float32: what comes out is what float32 gives for the same input, rounded."""
    layer = layer_of(form, kind, False, False)
    narrow = operands(layer, (8, 8), 32, dtype=torch.bfloat16)
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    for a, b in zip(results(layer, (8, 8), narrow), results(layer, (8, 8), wide), strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        rtol = 2**-6 if a.dim() else 2**-4  # a sum over all places, which nearly cancels
        torch.testing.assert_close(a.float(), b, rtol=rtol, atol=2**-6 * max(1.0, largest / 4))
    spiking = layer._replace(surrogate="triangular", keeps=True)
    out, _, merged, _ = neurons(
        narrow["current"], spiking, (8, 8), **{k: v for k, v in narrow.items() if k not in ("current", "residual")}
    )
    near = (merged.float() - spiking.threshold).abs() < 2**-7
    assert torch.equal(out.float()[~near], (merged.float() >= spiking.threshold).float()[~near])


BYTES = list(zip(itertools.product(native.DTYPES, [5, 16, 70]), itertools.cycle(SIZES)))  # each pair, each size


@pytest.mark.parametrize(("of", "size"), BYTES)
@pytest.mark.parametrize(("windows_in", "windows_out"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("kind", geometry.KINDS)
@pytest.mark.parametrize("form", geometry.FORMS)
def test_bytes_are_the_spikes(form, kind, windows_in, windows_out, size, of):
    dtype, channels = of
    handed = channels if form == "first" else 0
    layer = layer_of(
        form, kind, windows_in, windows_out, surrogate="triangular", training=False, keeps=False, handed=handed
    )
    x = {k: v.detach() for k, v in operands(layer, size, channels, dtype=dtype).items() if k != "residual"}
    current = x.pop("current")
    with torch.no_grad():
        current[0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
        expected = neurons(current, layer, size, **x)
        found = neurons(current, layer._replace(bytes=True), size, **x)
    assert found[0].dtype == torch.uint8
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0].to(dtype), expected[0])
    assert 0 < int(found[0].sum()) < found[0].numel()
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def test_bytes_are_for_inference():
    x = torch.randn(2, 3, 4, 4)
    layer = Layer("first", kind="grid", surrogate="triangular", bytes=True)
    for wrong, given in ((layer, {"anneal": torch.tensor(0.5)}), (layer._replace(surrogate=""), {})):
        with torch.no_grad(), pytest.raises(ValueError, match="in inference alone"):
            neurons(x, wrong, (4, 4), tau=torch.tensor(0.1), **given)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_is_not_finite_stays_so(projection, dtype):
    """A loss must show it, and it does not fire; no finite membrane leaves the range of a bounded projection."""
    for kind in ("grid", "dilated"):
        layer = Layer("coupled", projection, kind, "triangular", keeps=True, threshold=0.5)
        x = torch.randn(4, 3, 8, 8).to(dtype).contiguous(memory_format=LAST)
        x[0, 0, 0, 0] = float("nan")
        h = side(kind, 8)
        given = {"tau": torch.tensor(0.5), "theta": torch.tensor(0.25)}
        other = torch.randn(12, 3, h, h).to(dtype).contiguous(memory_format=LAST)
        spikes, _, merged, _ = neurons(x, layer, (8, 8), other=other, **given)
        assert merged[0, 0].isnan().any()
        assert merged[1:].isfinite().all()
        assert not spikes[merged.isnan()].any()
        zero, huge = torch.zeros_like(x), torch.full_like(other, 1e30)
        carried = neurons(zero, layer, (8, 8), other=huge, **given)[2]
        assert carried.isfinite().all()
        if projection not in ("mean", "none"):
            assert carried.abs().max() <= 0.5 * 2.0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_running_statistics_are_those_of_torch(tracks, affine, momentum):
    ours = nn.BatchNorm2d(24, momentum=momentum, affine=affine, track_running_stats=tracks)
    theirs = copy.deepcopy(ours)
    for batch in (5, 3):
        x = (3.0 + 2.0 * torch.randn(batch, 24, 7, 5)).contiguous(memory_format=LAST)
        torch.testing.assert_close(normalise(x, ours), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    x = (3.0 + torch.randn(4, 24, 7, 5)).contiguous(memory_format=LAST).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours.eval(), theirs.eval()
    a, b, upstream = normalise(x, ours), theirs(y), torch.randn(4, 24, 7, 5)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(a, [x, *ours.parameters()], upstream)
    torch.testing.assert_close(got, torch.autograd.grad(b, [y, *theirs.parameters()], upstream), rtol=1e-4, atol=1e-4)


def test_statistics_of_numbers_far_from_zero():
    x = (1000.0 + torch.randn(8, 16, 20, 20)).contiguous(memory_format=LAST)
    norm = native.statistics(x, None, None, 1e-5)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm[1].double(), exact, rtol=1e-4, atol=0)


def test_one_value_for_each_channel_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fire(torch.randn(1, 3, 1, 1), nn.BatchNorm2d(3), Spike())


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 3, 4, 4, dtype=torch.float64),
        torch.empty(2, 3, 4, 4, dtype=torch.float16),
        torch.empty(2, 3, 4, 4, device="meta"),
        torch.empty(0, 3, 4, 4),
        nn.Parameter(torch.empty(2, 3, 4, 4)),
    ],
    ids=["float64", "float16", "meta", "empty", "another class"],
)
def test_what_is_left_to_the_equations(x):
    assert not covered(x)


def test_what_is_on_kernels():
    for dtype in native.DTYPES:
        assert kernels_of(torch.empty(1, dtype=dtype)) is native
        assert covered(torch.empty(2, 3, 4, 4, dtype=dtype), "sine")
    assert not covered(torch.empty(2, 3, 4, 4), "tanh")
    for known, table in ((geometry.OMEGAS, PROJECTIONS), (geometry.SURROGATES, SURROGATES), (geometry.SOFT, SOFT)):
        assert set(known) == set(table)
    assert set(geometry.KINDS) == set(WINDOWS)


class Halves(Corners):
    """A made-up kind, which no kernel knows: the right half of a map, then the left."""

    def __init__(self):
        super().__init__(lambda size: size)

    def count(self, height, width):
        return 2

    def split(self, x):
        return [x[..., x.shape[3] // 2 :], x[..., : x.shape[3] // 2]]

    def merge(self, windows, height, width):
        return torch.cat(windows[::-1], 3)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_kind_of_windows_runs_on_the_equations(monkeypatch, training):
    monkeypatch.setitem(WINDOWS, "halves", Halves())
    mixer = ConvMixer(6, "halves", neuron=Neuron(tau=0.4, threshold=0.1)).train(training)
    x = (torch.rand(4, 6, 8, 8) < 0.5).float()
    with torch.no_grad():
        got = copy.deepcopy(mixer)(x)
        u1 = scan(split(mixer.synapse1(x), "halves"), mixer.membrane1.decay())
        s1 = mixer.spike1(merge(u1, "halves", 8, 8))
        u2 = coupled_scan(split(mixer.synapse2(s1), "halves"), u1, mixer.membrane2.decay(), mixer.membrane2.projection)
        expected = mixer.project(mixer.spike2(merge(u2, "halves", 8, 8)))
    torch.testing.assert_close(got, expected)
    mixer(x).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_a_new_projection_runs_on_the_equations(monkeypatch):
    monkeypatch.setitem(PROJECTIONS, "first alone", lambda a, b, theta: a * 1.0)
    mixer = ConvMixer(6, "dilated", neuron=Neuron(tau=0.4, threshold=0.1, projection="first alone")).eval()
    x = (torch.rand(4, 6, 8, 8) < 0.5).float()
    u1 = scan(split(mixer.synapse1(x), "dilated"), mixer.membrane1.decay())
    s1 = mixer.spike1(merge(u1, "dilated", 8, 8))
    u2 = coupled_scan(split(mixer.synapse2(s1), "dilated"), u1, mixer.membrane2.decay(), lambda a, b: a)
    torch.testing.assert_close(mixer(x), mixer.project(mixer.spike2(merge(u2, "dilated", 8, 8))), rtol=1e-5, atol=1e-5)


def test_what_is_watched_runs_module_by_module():
    """Hooks on the parts of a layer see what they always saw; one on the threshold sees spikes on either path."""
    mixer = ConvMixer(6, "dilated").eval()
    x = (torch.rand(4, 6, 8, 8) < 0.5).float()
    seen = {}
    mixer.spike1.register_forward_hook(lambda m, a, out: seen.setdefault("spikes", out))
    out = mixer(x)
    assert set(seen["spikes"].unique().tolist()) <= {0.0, 1.0}
    mixer.membrane1.register_forward_hook(lambda m, a, out: seen.setdefault("membranes", out))
    mixer.synapse1.norm.register_forward_hook(lambda m, a, out: seen.setdefault("normalised", out))
    torch.testing.assert_close(mixer(x), out, rtol=1e-5, atol=1e-5)
    assert len(seen["membranes"]) == 4
    torch.testing.assert_close(seen["normalised"], mixer.synapse1(x))


def test_any_order_in_memory():
    layer = layer_of("first", "dilated", False, False, surrogate="triangular")
    x = operands(layer, (8, 8))
    other = {k: v.detach().contiguous().requires_grad_() for k, v in x.items()}
    for a, b in zip(results(layer, (8, 8), other), results(layer, (8, 8), x), strict=True):
        assert torch.equal(a, b)


def test_wrong_shapes_are_refused():
    """Before anything is read beyond its end."""
    x = torch.randn(4, 3, 8, 8)
    coupled = Layer("coupled", "sine", "dilated", "triangular")
    given = {"tau": torch.tensor(0.5), "theta": torch.tensor(0.25)}
    with pytest.raises(
        ValueError, match=r"membranes of layer 1 must have the shape \(12, 3, 6, 6\), not \(4, 3, 8, 8\)"
    ):
        neurons(x, coupled, (8, 8), other=x, **given)
    with pytest.raises(ValueError, match="a coupled layer needs the membranes"):
        neurons(x, coupled, (8, 8), **given)
    with pytest.raises(ValueError, match=r"the map that was received must have the shape \(4, 3, 8, 8\)"):
        neurons(x, coupled._replace(form="recurrent"), (8, 8), other=x[:2], **given)
    with pytest.raises(ValueError, match=r"the current must have the shape \(4, 3, 8, 9\)"):
        neurons(x, Layer(), (8, 9))
    with pytest.raises(ValueError, match=r"the residual stream must have the shape"):
        neurons(x, Layer(), (8, 8), residual=x[:1])
    with pytest.raises(ValueError, match="tau must have 1 or 3 numbers, not 2"):
        neurons(x, Layer("first", kind="grid"), (8, 8), tau=torch.rand(2, 1, 1))
    with pytest.raises(ValueError, match="weight must have 3 numbers, not 1"):
        neurons(x, Layer(training=True), (8, 8), weight=torch.rand(1))
    with pytest.raises(ValueError, match="only a first layer hands its membranes on"):
        neurons(x, Layer(handed=3), (8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="tensors to be on the CPU, but tau is on meta"):
        neurons(x, Layer("first", kind="grid"), (8, 8), tau=torch.tensor(0.5, device="meta"))


def test_other_defaults_of_torch():
    layer = layer_of("first", "dilated", False, False, surrogate="triangular")
    x = operands(layer, (6, 6))
    expected = results(layer, (6, 6), x)
    geometry.tables.cache_clear()
    native._plan.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = neurons(x["current"], layer, (6, 6), **{k: v for k, v in x.items() if k != "current"})
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, expected[:4], strict=True))


def test_a_cut_of_its_own():
    """Layers of neurons of two kinds of windows on one map."""
    norm, spike = nn.BatchNorm2d(5), Spike()
    x = torch.randn(4, 5, 8, 8)
    spikes, _, merged = fire(x, norm, spike, cut=Cut(), keeps=True)
    assert torch.equal(spikes, (merged >= 0.5).float())


def test_the_operators_keep_torchs_rules():
    layer = layer_of("first", "dilated", False, False, surrogate="triangular")
    x = operands(layer, (6, 6))
    args = [x.get(name) for name in ("current", "residual", "other", *Parameters.__annotations__)]
    torch.library.opcheck(
        torch.ops.lightning_msnn.neurons.default,
        (*args, layer.spec(), layer.threshold, layer.eps, 6, 6),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
