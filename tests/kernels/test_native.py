"""Kernels equal the equations in float64, are chosen where they can be, and leave the rest to torch."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from lightning_msnn.functional import PROJECTIONS, SURROGATES
from lightning_msnn.kernels import fused, geometry, native
from lightning_msnn.kernels.geometry import Layer
from lightning_msnn.kernels.layer import kernels_of, neurons
from lightning_msnn.models import ConvMixer
from lightning_msnn.nn import Neuron, Spike
from lightning_msnn.nn.layer import covered, fire, normalise

pytestmark = pytest.mark.skipif(not native.library(), reason="no C compiler")
LAST = torch.channels_last
SIZES = [(8, 8), (7, 5), (4, 6), (2, 2), (1, 4), (1, 11)]
PLACES = list(itertools.product([False, True], repeat=2))
EVERY = [(*of, SIZES[i % len(SIZES)]) for i, of in enumerate(itertools.product(geometry.FORMS, geometry.KINDS, PLACES))]
"""Every form, kind of windows and place of them, each with one size of maps, so that each size meets many."""


def operands(layer, size, channels=19, batch=3, dtype=torch.float32, by_channel=True, level=False):
    """Random tensors for a layer, by name; those that are given gradients are leaves."""
    at = geometry.shapes(layer, size, (batch, channels))
    n = geometry.tables(layer.kind, layer.windows_in, layer.windows_out, *size).windows or 1
    at = geometry.shapes(layer, size, (n * batch if layer.windows_in else batch, channels))
    made = {"current": torch.randn(at.current)}
    if layer.training:
        made |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    if layer.form != "still":
        made["tau"] = torch.rand(channels, 1, 1) if by_channel else torch.rand(())
    if layer.form in ("coupled", "recurrent"):
        made["theta"] = torch.tensor(0.3)
        if layer.form == "recurrent" or n > 1:
            made["other"] = torch.randn(at.other or (batch, channels, *size))
    if not layer.fires:
        made["residual"] = torch.randn(at.out)
    if level:
        made["level"] = torch.rand(channels)
    for name in made:
        maps = name in ("current", "other", "residual")
        made[name] = made[name].to(dtype).contiguous(memory_format=LAST) if maps else made[name]
        made[name].requires_grad_()
    return made


def equations(layer, size, x, share=None):
    """What a layer returns, hands on and keeps merged, by the equations, in the type of its tensors."""
    return fused.equations(layer, size, x["current"], x | {"anneal": share})


def compare(layer, size, x, share=None, tolerance=2e-5):
    """Compare a kernel with the equations in float64: outputs, spikes away from their thresholds, gradients."""
    got = neurons(x["current"], layer, size, anneal=share, **{k: v for k, v in x.items() if k != "current"})
    exact = {k: v.detach().double().requires_grad_() for k, v in x.items()}
    wanted = equations(layer._replace(keeps=True), size, exact, None if share is None else share.double())
    level = exact["level"].view(-1, 1, 1) if "level" in x else layer.threshold
    nearest = level * (wanted[2].detach() / level).round().clamp(1, layer.levels)
    clear = ((wanted[2] - nearest).abs() > 1e-5) | (not layer.fires)
    pairs = [(a, b) for a, b in zip(got[:3], wanted, strict=False) if a is not None]
    assert len(pairs) == 1 + bool(wanted[1] is not None) + layer.keeps
    for a, b in pairs:
        keep = clear if a is got[0] else torch.ones_like(b, dtype=torch.bool)
        bound = (
            0.0
            if layer.fires and share is None and a is got[0]
            else tolerance * max(1.0, float(b.detach().abs().max()))
        )
        assert float(((a.double() - b).abs() * keep).detach().max()) <= bound
    upstream = [torch.randn_like(a) for a, _ in pairs]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad([a for a, _ in pairs], list(x.values()), upstream, **options)
    expected = torch.autograd.grad(
        [b for _, b in pairs], list(exact.values()), [g.double() for g in upstream], **options
    )
    for name, a, b in zip(x, gradients, expected, strict=True):
        assert a.shape == x[name].shape
        sums = name in ("tau", "theta", "weight", "bias", "level")  # over all places
        bound = (10 if sums else 1) * tolerance * max(1.0, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= bound, name


def layer_of(form, kind, windows_in, windows_out, **more):
    more.setdefault("omega", "sine" if form in ("coupled", "recurrent") else "none")
    defaults = {"fires": True, "keeps": True, "training": True, "threshold": 0.3, "handed": 7 if form == "first" else 0}
    return Layer(form, kind=kind, windows_in=windows_in, windows_out=windows_out, **{**defaults, **more})


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize(("form", "kind", "places", "size"), EVERY)
def test_every_form_and_kind(form, kind, places, size, fires):
    layer = layer_of(form, kind, *places, fires=fires)
    compare(layer, size, operands(layer, size))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["non_dilated", "dilated", "grid"])
@pytest.mark.parametrize("form", ["coupled", "recurrent"])
@pytest.mark.parametrize("projection", geometry.OMEGAS)
def test_every_projection(projection, form, kind, training):
    layer = layer_of(form, kind, False, False, omega=projection, keeps=False, training=training)
    compare(layer, (8, 8), operands(layer, (8, 8), by_channel=training))


@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("form", ["still", "first"])
@pytest.mark.parametrize("kind", ["single", "non_dilated", "dilated", "grid"])
@pytest.mark.parametrize("levels", [1, 4])
def test_every_threshold_and_annealing(levels, kind, form, share, level):
    layer = layer_of(form, kind, False, False, keeps=False, handed=0, levels=levels)
    x = operands(layer, (8, 6), level=level)
    with torch.no_grad():  # few membranes at a corner of the triangle
        x["current"].mul_(3.0)
    compare(layer, (8, 6), x, None if share is None else torch.tensor(share))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 70, 70), (5, 600, 8), (40, 48, 12)])
@pytest.mark.parametrize("form", ["first", "coupled"])
def test_tasks(batch, channels, size, form, threads):
    """Blocks of channels which do not divide them, runs of places, groups of images, threads that have none."""
    layer = layer_of(form, "dilated", False, False, handed=channels if form == "first" else 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(layer, (size, size), operands(layer, (size, size), channels, batch), tolerance=3e-5)
    finally:
        torch.set_num_threads(before)


def results(layer, size, x):
    made = neurons(x["current"], layer, size, **{k: v for k, v in x.items() if k != "current"})
    outs = [o for o in made[:3] if o is not None]
    total = sum((o.float() * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outs)
    return (*(o.detach() for o in outs), *torch.autograd.grad(total, list(x.values())))


@pytest.mark.parametrize("form", ["still", "first", "coupled"])
def test_the_same_for_any_number_of_threads_and_order_in_memory(form):
    layer = layer_of(form, "single" if form == "still" else "dilated", False, False)
    x = operands(layer, (16, 16), 48, 9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = results(layer, (16, 16), x)
        torch.set_num_threads(2)
        other = {k: v.detach().contiguous().requires_grad_() for k, v in x.items()}
        for given in (x, other):
            assert all(torch.equal(a, b) for a, b in zip(results(layer, (16, 16), given), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["single", "dilated", "grid"])
@pytest.mark.parametrize("form", geometry.FORMS)
def test_bf16_is_rounded_once(form, kind):
    """Everything between is float32: what comes out is what float32 gives for the same input, rounded."""
    layer = layer_of(form, kind, False, False, fires=False)
    narrow = operands(layer, (8, 8), 32, dtype=torch.bfloat16)
    wide = {k: v.detach().float().requires_grad_() for k, v in narrow.items()}
    for a, b in zip(results(layer, (8, 8), narrow), results(layer, (8, 8), wide), strict=True):
        rtol = 2**-6 if a.dim() else 2**-4  # a sum over all places, which nearly cancels
        torch.testing.assert_close(a.float(), b, rtol=rtol, atol=2**-6 * max(1.0, float(b.abs().max()) / 4))
    spiking = layer._replace(fires=True)
    given = {k: v for k, v in narrow.items() if k not in ("current", "residual")}
    out, _, merged, _ = neurons(narrow["current"], spiking, (8, 8), **given)
    near = (merged.float() - spiking.threshold).abs() < 2**-7
    assert torch.equal(out.float()[~near], (merged.float() >= spiking.threshold).float()[~near])


WIDTHS = itertools.cycle(itertools.product(native.DTYPES, [5, 16, 70]))


@pytest.mark.parametrize(("of", "dtype", "channels"), [(of, *width) for of, width in zip(EVERY, WIDTHS, strict=False)])
def test_bytes_are_the_spikes(of, dtype, channels):
    form, kind, places, size = of
    handed = channels if form == "first" else 0
    layer = layer_of(form, kind, *places, training=False, keeps=False, handed=handed, levels=1 + channels % 3)
    x = {k: v.detach() for k, v in operands(layer, size, channels, dtype=dtype).items()}
    current = x.pop("current")
    with torch.no_grad():
        current[0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
        expected = neurons(current, layer, size, **x)
        found = neurons(current, layer._replace(bytes=True), size, **x)
        with pytest.raises(ValueError, match="in inference alone"):
            neurons(current, layer._replace(bytes=True), size, anneal=torch.tensor(0.5), **x)
    assert found[0].dtype == torch.uint8
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0].to(dtype), expected[0])
    assert 0 < int(found[0].count_nonzero()) < found[0].numel()
    assert int(found[0].max()) <= layer.levels
    assert (found[1] is None) == (expected[1] is None)
    assert found[1] is None or torch.equal(torch.nan_to_num(found[1]), torch.nan_to_num(expected[1]))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("kind", ["grid", "dilated"])
def test_what_is_not_finite_stays_so(kind, dtype):
    """A loss must show it, and it does not fire; no finite membrane leaves the range of the sine."""
    layer = Layer("coupled", "sine", kind, fires=True, keeps=True)
    at = geometry.shapes(layer, (8, 8), (4, 3))
    x = torch.randn(4, 3, 8, 8).to(dtype).contiguous(memory_format=LAST)
    x[0, 0, 0, 0] = float("nan")
    given = {"tau": torch.tensor(0.5), "theta": torch.tensor(0.25)}
    spikes, _, merged, _ = neurons(x, layer, (8, 8), other=torch.randn(at.other).to(dtype), **given)
    assert merged[0, 0].isnan().any()
    assert merged[1:].isfinite().all()
    assert not spikes[merged.isnan()].any()
    carried = neurons(torch.zeros_like(x), layer, (8, 8), other=torch.full(at.other, 1e30, dtype=dtype), **given)[2]
    assert carried.abs().max() <= 1.0


def test_what_they_cover():
    """An allow-list: another definition, another type or a gradient of a gradient is left to torch."""
    x = torch.randn(4, 6, 8, 8)
    parts, cut = (nn.BatchNorm2d(6), Spike(Neuron()), ConvMixer(6, "dilated").membrane2), Layer(kind="dilated")
    assert covered(x, cut, *parts)
    assert not covered(x.double(), cut, *parts)
    assert not covered(x[:0], cut, *parts)
    assert not covered(x, cut, nn.InstanceNorm2d(6), *parts[1:])
    assert not covered(x, cut, nn.BatchNorm2d(7), *parts[1:])
    assert not covered(x, cut, parts[0], nn.ReLU(), parts[2])
    for surrogate in set(SURROGATES) - {"triangular"}:
        assert not covered(x, cut, parts[0], Spike(Neuron(surrogate=surrogate)), parts[2])
    for projection in set(PROJECTIONS) - set(geometry.OMEGAS):
        membrane = ConvMixer(6, "dilated", neuron=Neuron(projection=projection)).membrane2
        assert not covered(x, cut, *parts[:2], membrane)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_torch_moves_them(momentum):
    ours, theirs = (nn.BatchNorm2d(6, momentum=momentum) for _ in range(2))
    for scale in (1.0, 3.0):
        x = scale * torch.randn(4, 6, 5, 5)
        torch.testing.assert_close(normalise(x, ours), theirs(x), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_refused():
    """Before anything is read beyond its end."""
    x = torch.randn(4, 3, 8, 8)
    given = {"tau": torch.tensor(0.5), "theta": torch.tensor(0.25)}
    coupled = partial(neurons, x, Layer("coupled", "sine", "dilated", fires=True), (8, 8), **given)
    for call, message in (
        (partial(coupled, other=x), r"the other membranes must have the shape \(12, 3, 6, 6\), not \(4, 3, 8, 8\)"),
        (partial(neurons, x, Layer(), (8, 9)), r"the current must have the shape \(4, 3, 8, 9\)"),
        (partial(neurons, x, Layer(training=True), (8, 8), weight=torch.rand(1)), "weight must have 3 numbers, not 1"),
        (partial(neurons, x, Layer(handed=3), (8, 8)), "only a first layer hands its membranes on"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="tensors to be on the CPU, but tau is on meta"):
        neurons(x, Layer("first", kind="grid"), (8, 8), tau=torch.tensor(0.5, device="meta"))


def test_other_defaults_of_torch():
    layer = layer_of("first", "dilated", False, False)
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
    assert all(torch.equal(a, b) for a, b in zip(again[:3], expected[:3], strict=True))


def test_which_kernels(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    assert kernels_of(x) is native
    assert kernels_of(x.to("meta")) is None
    monkeypatch.setattr(fused, "devices", lambda: ("cpu",))
    assert kernels_of(x) is fused
    monkeypatch.setattr(fused, "devices", lambda: ())
    monkeypatch.setattr(native, "library", lambda: None)
    assert kernels_of(x) is None
    spikes, _, merged = fire(x, nn.BatchNorm2d(3), Spike(), cut=Layer(keeps=True))
    assert torch.equal(spikes, (merged >= 0.5).float())
