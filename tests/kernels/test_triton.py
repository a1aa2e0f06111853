"""The Triton kernels equal the equations in float64; by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_msnn.functional import (
    PROJECTIONS,
    count,
    coupled_scan,
    heaviside,
    merge,
    recurrent_scan,
    scan,
    split,
)
from lightning_msnn.functional import SURROGATES as DERIVATIVES
from lightning_msnn.kernels import layer as operator
from lightning_msnn.kernels.geometry import FORMS, KINDS, OMEGAS, SOFT, SURROGATES, Layer, Parameters

pytest.importorskip("triton", reason="Triton, which is there on Linux alone, is not installed")

from lightning_msnn.kernels import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(6, 4), (5, 7), (1, 9)]
LAYOUTS = [(False, True), (True, False), (True, True)]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    monkeypatch.setattr(operator, "kernels_of", lambda _: kernels)


def fire(m, v, layer, anneal):
    """Equation by equation, for autograd: the step and, in training, what is returned beside it."""
    step = heaviside(m - v, DERIVATIVES[layer.surrogate])
    if anneal is None:
        return step
    soft = {
        "rectifier": lambda: m.clamp(min=0.0),
        "ramp": lambda: (m - v + 0.5).clamp(0.0, 1.0),
        "graded": lambda: (m - v).clamp(min=0.0) + v * step,  # u H(u - V)
    }[layer.soft]()
    return anneal * step + (1.0 - anneal) * soft


def reference(layer, size, x, norm, anneal):
    """What a layer returns, hands on and merges, and how far its membranes are from their thresholds."""
    current, n = x["current"], count(layer.kind, *size)
    if norm is not None:
        mean, var = (None, None) if layer.training else norm
        current = F.batch_norm(current, mean, var, x.get("weight"), x.get("bias"), layer.training, 0.0, layer.eps)
    currents = list(current.chunk(n)) if layer.windows_in else split(current, layer.kind)

    def omega(a, b):
        return PROJECTIONS[layer.omega](a, b, x["theta"])

    if n == 1 or layer.form == "still":
        membranes = currents
    elif layer.form == "first":
        membranes = scan(currents, x["tau"])
    elif layer.form == "coupled":
        membranes = coupled_scan(currents, list(x["other"].chunk(n - 1)), x["tau"], omega)
    else:
        membranes = recurrent_scan(currents, split(x["other"], layer.kind), x["tau"], omega)
    m = torch.cat(membranes) if layer.windows_out else merge(membranes, layer.kind, *size)
    v = x["level"].view(-1, 1, 1) if "level" in x else layer.threshold
    out = fire(m, v, layer, anneal) if layer.surrogate else m + x.get("residual", 0.0)
    handed = torch.cat(membranes[:-1])[:, -layer.handed :] if layer.handed and n > 1 else None
    return out, handed, m if layer.keeps else None, (m - v).abs()


def leaves(layer, size, channels, images, dtype, by_channel, level, residual):
    """Everything that a layer is given and that has a gradient."""
    n = count(layer.kind, *size)
    window = split(torch.empty(1, 1, *size), layer.kind)[0].shape[2:]

    def a_map(batch, size, scale=1.0):
        return (scale * torch.randn(batch, channels, *size, device=DEVICE)).to(dtype)

    x = {
        "current": a_map(n * images if layer.windows_in else images, window if layer.windows_in else size),
        "weight": torch.rand(channels, device=DEVICE) + 0.5,
        "bias": torch.randn(channels, device=DEVICE) * 0.5,
        "tau": torch.rand((channels, 1, 1) if by_channel else (), device=DEVICE),
        "theta": torch.tensor(0.3, device=DEVICE),
    }
    if layer.form == "coupled" and n > 1:
        x["other"] = a_map((n - 1) * images, window)
    if layer.form == "recurrent":
        x["other"] = a_map(images, size)
    if level:
        x["level"] = torch.rand(channels if level == "channel" else 1, device=DEVICE)
    if residual:
        x["residual"] = a_map(n * images if layer.windows_out else images, window if layer.windows_out else size)
    return x


def close(got, expected, tolerance, what):
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert error < tolerance, f"{what}: {error:.1e}"


def check(
    layer,
    size,
    *,
    norm="batch",
    channels=19,
    images=2,
    dtype=torch.float32,
    by_channel=True,
    level=None,
    anneal=None,
    residual=False,
    tolerance=1e-5,
    tolerance_of_sums=1e-4,  # as for the kernels in C: sums of thousands of places, which nearly cancel
):
    """Compare outputs and gradients of one layer with the reference."""
    x = leaves(layer, size, channels, images, dtype, by_channel, level, residual)
    stats = (torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.5)
    if norm is None:
        del x["weight"], x["bias"]
    mean, var = stats if norm == "running" else (None, None)
    share = None if anneal is None else torch.tensor(anneal, device=DEVICE)
    x = {name: value.requires_grad_() for name, value in x.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    got = operator.neurons(
        x["current"], layer, size, running_mean=mean, running_var=var, anneal=share,
        **{name: value for name, value in x.items() if name != "current"},
    )  # fmt: skip
    *expected, distance = reference(
        layer, size, exact, None if norm is None else [stat.double() for stat in stats], anneal
    )
    clear = distance > 1e-5
    pairs = []
    for name, one, other in zip(("out", "handed", "merged"), got, expected, strict=False):
        assert other is not None or one.numel() == 0
        if other is None:
            continue
        assert one.shape == other.shape
        assert one.dtype == dtype
        pairs.append((one, other, torch.randn(one.shape, device=DEVICE).to(dtype)))
        if name == "out" and layer.surrogate:
            one, other = torch.where(clear, one, 0.0), torch.where(clear, other, 0.0)
            assert anneal is not None or torch.equal(one.double(), other)
        close(one, other, tolerance, name)
    grads = [
        torch.autograd.grad(
            [pair[i] for pair in pairs],
            list(values.values()),
            [pair[2].to(pair[i].dtype) for pair in pairs],
            materialize_grads=True,
            allow_unused=True,
        )
        for i, values in enumerate((x, exact))
    ]
    for name, one, other in zip(x, *grads, strict=True):
        assert one.shape == other.shape
        # From that of the current, what its statistics owe is taken off, which may nearly cancel.
        bound = tolerance_of_sums if other.dim() < 4 else 2.0 * tolerance if name == "current" else tolerance
        close(one, other, bound, f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_and_kind(kind, size, form):
    check(Layer(form, "sine", kind, "triangular", handed=5 if form == "first" else 0, keeps=True, training=True), size)


@pytest.mark.parametrize("form", FORMS)
def test_a_map_too_small_to_cut(form):
    check(Layer(form, "sine", "dilated", "triangular", handed=5 if form == "first" else 0, training=True), (1, 4))


@pytest.mark.parametrize(("windows_in", "windows_out"), LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dilated", "grid"])
def test_every_layout(kind, form, windows_in, windows_out):
    layouts = {"windows_in": windows_in, "windows_out": windows_out}
    check(
        Layer(form, "mean", kind, "arctan", handed=5 if form == "first" else 0, keeps=True, training=True, **layouts),
        (5, 7),
    )


@pytest.mark.parametrize("form", ["coupled", "recurrent"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection(projection, form):
    assert projection in OMEGAS
    check(Layer(form, projection, "grid", "triangular"), (4, 6), norm=None, by_channel=False)


@pytest.mark.parametrize("kind", ["single", "dilated"])
@pytest.mark.parametrize("level", [None, "one", "channel"])
@pytest.mark.parametrize("surrogate", DERIVATIVES)
def test_every_surrogate_and_threshold(surrogate, level, kind):
    assert surrogate in SURROGATES
    check(Layer("first", "none", kind, surrogate, threshold=0.3, keeps=True), (6, 4), norm="running", level=level)


@pytest.mark.parametrize(("kind", "level"), [("single", None), ("non_dilated", "channel"), ("dilated", "one")])
@pytest.mark.parametrize("soft", SOFT)
def test_annealed(soft, kind, level):
    check(Layer("first", "none", kind, "triangular", soft, training=True), (5, 7), level=level, anneal=0.3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "windows_out"), [("non_dilated", False), ("dilated", False), ("dilated", True)])
def test_membranes(kind, windows_out, form):
    layer = Layer(form, "tanh", kind, "", windows_out=windows_out, keeps=not windows_out, training=True)
    check(layer, (6, 4), residual=form != "first")


@pytest.mark.parametrize("norm", ["batch", "running", None])
@pytest.mark.parametrize("kind", ["single", "dilated"])
def test_every_norm(kind, norm):
    check(Layer("recurrent", "sine", kind, "sigmoid", training=norm == "batch"), (5, 7), norm=norm)


@pytest.mark.parametrize(
    ("kind", "form"), [("single", "still"), ("grid", "first"), ("grid", "coupled"), ("dilated", "recurrent")]
)
def test_several_tiles(kind, form):
    """More places and channels than a tile has, neither a multiple of it."""
    layer = Layer(form, "sine", kind, "triangular", handed=35 if form == "first" else 0, training=True)
    check(layer, (12, 12), channels=70, level="channel")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tolerance, form):
    """Inputs and outputs are rounded, and nothing between."""
    layer = Layer(form, "sine", "dilated", "triangular", handed=5 if form == "first" else 0, keeps=True, training=True)
    check(layer, (5, 7), dtype=dtype, tolerance=tolerance, tolerance_of_sums=tolerance)
    layer = Layer(form, "sine", "grid", "", keeps=True, training=True)
    check(layer, (5, 7), dtype=dtype, tolerance=tolerance, tolerance_of_sums=tolerance, residual=True)


@pytest.mark.parametrize("projection", [name for name in PROJECTIONS if name != "none"])
def test_nan_stays_and_does_not_fire(projection):
    current = torch.zeros(1, 2, 4, 4, device=DEVICE)
    current[0, 0, 0, 0] = torch.nan
    other = torch.zeros(3, 2, 2, 2, device=DEVICE)
    spikes, _, merged, _, _ = operator.neurons(
        current, Layer("coupled", projection, "non_dilated", "triangular", keeps=True), (4, 4),
        tau=torch.tensor(0.5, device=DEVICE), theta=torch.tensor(0.3, device=DEVICE), other=other + 1.0,
    )  # fmt: skip
    seen = [(0, 0), (0, 2), (2, 0), (2, 2)]  # the place of each window, to which the membrane travels
    assert merged.isnan().nonzero().tolist() == [[0, 0, *place] for place in seen]
    assert not spikes.isnan().any()
    assert all(spikes[0, 0, y, x] == 0.0 for y, x in seen)


@pytest.mark.parametrize("tiles", [2, 512])
def test_statistics_far_from_zero(tiles, monkeypatch):
    """A mean that is large beside the deviation costs no precision, however rows are shared out."""
    monkeypatch.setattr(kernels, "_TILES", tiles)
    x = (torch.randn(8, 5, 9, 9, device=DEVICE) + 1000.0).contiguous(memory_format=torch.channels_last)
    norm = kernels.statistics(x, None, None, 1e-5).double()
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    scale = 1.0 / (var + 1e-5).sqrt()
    torch.testing.assert_close(norm, torch.stack([mean, var, scale, -mean * scale]), rtol=1e-6, atol=0.0)


def test_statistics_that_processes_share():
    """Halves of a batch, of which each process has one, have the gradients of the batch."""
    layer, size = Layer("first", "none", "dilated", "triangular", training=True), (5, 7)
    current, grad = (
        torch.randn(4, 3, 5, 7, device=DEVICE).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    norm = kernels.statistics(current, None, None, layer.eps)
    rest = None, None, norm, Parameters(tau=torch.tensor(0.4, device=DEVICE))
    expected, _, _, totals = kernels.backward(layer, size, grad, None, None, None, current, *rest, True)
    halves = [
        kernels.backward(layer, size, grad[i], None, None, None, current[i], *rest, False)
        for i in (slice(0, 2), slice(2, 4))
    ]  # fmt: skip
    sums = halves[0][3] + halves[1][3]
    torch.testing.assert_close(sums[:5], totals[:5])
    rows = torch.tensor([4.0 * 5 * 7], dtype=torch.float64, device=DEVICE)
    for (half, *_), i in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):
        kernels.settle(half, current[i], norm, sums, rows, layer.eps)
        torch.testing.assert_close(half, expected[i])


@pytest.mark.parametrize("name", ["tau", "theta", "level"])
def test_a_parameter_of_another_size(name):
    with pytest.raises(ValueError, match="numbers, not 3"):
        operator.neurons(torch.zeros(1, 5, 4, 4, device=DEVICE), Layer(), (4, 4), **{name: torch.zeros(3)})


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_chosen_on_cuda(dtype, monkeypatch):
    monkeypatch.undo()
    assert operator.kernels_of(torch.empty(1, device=DEVICE, dtype=dtype)) is kernels
    assert operator.kernels_of(torch.empty(1, device=DEVICE, dtype=torch.float64)) is None


def test_not_chosen_on_the_cpu(monkeypatch):
    monkeypatch.undo()
    assert operator.kernels_of(torch.empty(2, 3, 4, 4)) is not kernels


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_compiles_for_a_device_that_is_not_there(tmp_path):
    """The interpreter does not check the types that Triton's compiler wants."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_cuda.py")
    done = subprocess.run(
        [sys.executable, str(script)], env={**env, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {
        "_backward", "_collect", "_forward", "_merge", "_normalise", "_owe", "_settle", "_statistics",
    }  # fmt: skip
