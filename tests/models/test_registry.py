"""The contract of timm's models, for every registered network."""

import copy
import math
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor
from torch import nn

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels.layer import kernels_of
from lightning_msnn.models.baselines import relu_baseline
from lightning_msnn.models.msnn import WINDOW_SCHEDULES
from lightning_msnn.models.registry import create
from lightning_msnn.nn import (
    CONTEXTS,
)
from tests.conftest import COMPILED, DISTINCT, NETWORKS, PUBLISHED, SHALLOW, TINY, rest_is_slow

KINDS = ("non_dilated", "dilated", "grid", "single")
STEMS = rest_is_slow(NETWORKS, [*TINY, "msnn_resnet20_224"])
"""Those of either stride of the stem: for what is about sizes."""
SMALL = {"depths": (2, 1, 1), "widths": (24, 24, 24)}
"""Arguments of a network with each kind of windows and, of 8 by 8 pixels, a map that is too small to cut."""


def make(name, **kwargs):
    return timm.create_model(name, **{"num_classes": 10, **kwargs})


def lively(model, side=24):
    """Give batch norm running statistics, so that the network fires in eval mode as it does in training."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, model.in_chans, side, side))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def test_sizes_of_networks():
    with torch.device("meta"):
        made = {name: timm.create_model(name, num_classes=100) for name in NETWORKS}
    assert {f"msnn_{name}12{size}" for name in ("resnet", "rnn", "vit") for size in ("", "_tiny")} <= made.keys()
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}
    assert all(size < 300_000 for name, size in sizes.items() if name in TINY)
    assert 13e6 < sizes["msnn_resnet12"] < 15e6
    kinds = [[b.mixer.windows for b in stage.blocks] for stage in made["msnn_resnet12"].stages]
    pair = ["non_dilated", "dilated"]
    assert kinds == [pair, pair, pair * 3, ["non_dilated"] * 2]
    large = made["msnn_resnet20_224"]
    assert large.stem.conv.stride == (4, 4)
    assert [info["reduction"] for info in large.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["msnn_resnet20_224", "msnn_resnet12_tiny.fsdd", "msnn_vit12_tiny.digits"])
def test_device_and_last_map_are_as_timm_is_told(name):
    """timm's own tests make networks by ``device=`` and ``dtype=``, and compare ``pool_size`` with the last map."""
    model = timm.create_model(name, device="meta", dtype=torch.float64).eval()
    cfg = model.pretrained_cfg
    x = torch.empty(1, *cfg["input_size"], device="meta", dtype=torch.float64)
    assert model.forward_features(x).shape[2:] == cfg["pool_size"]
    model.reset_classifier(0)
    model.reset_classifier(3)
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {("meta", torch.float64)}


@pytest.mark.parametrize("name", STEMS)
def test_any_size(name):
    model = make(name).eval()
    for size in [(8, 8), (31, 17), (8, 50)]:
        out = model(torch.randn(2, 3, *size))
        assert out.shape == (2, 10)
        assert out.isfinite().all()


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"windows": windows, "context": context} for windows in (*WINDOW_SCHEDULES, *KINDS) for context in CONTEXTS),
        *({"learn_tau": False}, {"preset": "paper"}),
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
@pytest.mark.parametrize("name", TINY)
def test_each_parameter_has_a_gradient(name, kwargs):
    """Without exception, or data-parallel training would stop: also on maps that are too small to cut."""
    if "preset" in kwargs and name not in PUBLISHED:
        pytest.skip(f"{name} is not in the paper")
    model = make(name, **SMALL, **kwargs).train()
    for size, dtype in ((17, torch.float32), (8, torch.float32), (8, torch.float64)):  # kernels, and the equations
        model.to(dtype).zero_grad()
        model(torch.randn(4, 3, size, size, dtype=dtype)).square().sum().backward()
        learnt = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learnt)


@pytest.mark.parametrize("name", STEMS)
def test_channels_and_classes(name):
    model = make(name, in_chans=1, num_classes=7).eval()
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    assert model.num_classes == 7
    assert make(name, num_classes=0).eval()(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features)
    side = 64 // model.feature_info[-1]["reduction"]
    assert make(name, num_classes=0, global_pool="").eval()(torch.randn(2, 3, 64, 64)).shape[2:] == (side, side)


@pytest.mark.parametrize("name", DISTINCT)
def test_head(name):
    model = lively(make(name))
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    side = 32 // model.feature_info[-1]["reduction"]
    assert features.shape == (2, model.num_features, side, side)
    pre = model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre), model(x))
    model.reset_classifier(4)
    assert model.get_classifier().out_features == 4
    assert model.num_classes == 4
    assert model(x).shape == (2, 4)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head_hidden_size == 2 * model.num_features
    assert relu_baseline(model)(x).shape == (2, 5)  # and so is what is built after it


@pytest.mark.parametrize("name", STEMS)
def test_features_only(name):
    model = timm.create_model(name, features_only=True)
    outs = model(torch.randn(2, 3, 64, 48))
    assert len(outs) == len(make(name).stages)
    for out, channels, reduction in zip(
        outs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert out.shape == (2, channels, 64 // reduction, math.ceil(48 / reduction))
    three = create(type(make(name)), name, False, {"depths": (1, 1, 1), "widths": (24, 24, 24)}, features_only=True)
    assert three.feature_info.channels() == [24, 24, 24]
    some = timm.create_model(name, features_only=True, out_indices=(0, 1))
    assert [o.shape[1] for o in some(torch.randn(2, 3, 32, 32))] == some.feature_info.channels()
    assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", DISTINCT)
def test_forward_intermediates(name):
    model = lively(make(name))
    x = torch.randn(2, 3, 32, 32)
    final, every = model.forward_intermediates(x)
    stages = len(model.stages)
    assert len(every) == stages
    torch.testing.assert_close(final, model.forward_features(x))
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    for a, b in zip(last_two, every[-2:], strict=True):
        torch.testing.assert_close(a, b)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], every[1])
    normed = model.forward_intermediates(x, indices=[stages - 1], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], final)
    with pytest.raises(ConfigurationError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", DISTINCT)
def test_prune_intermediate_layers(name):
    model = lively(make(name))
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_parameters(name):
    """Groups by depth have every parameter, and weight decay spares decays."""
    with torch.device("meta"):
        model = make(name)
    named = {n for n, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == named
    (first, *_) = (n for n in named if n.startswith("stages.0.blocks.0.") and n.endswith("conv.weight"))
    assert groups["stem.conv.weight"] < groups[first] < groups["head.fc.weight"]
    assert {n for n in named if "decay" in n} <= model.no_weight_decay() <= named


@pytest.mark.parametrize(
    ("dtype", "synchronised"),
    [(torch.float32, False), (torch.float64, False), (torch.float64, True)],
    ids=["kernels", "reference", "synchronised"],
)
@pytest.mark.parametrize("name", TINY)
def test_grad_checkpointing_changes_nothing(name, dtype, synchronised):
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    model = make(name, **SMALL).train().to(dtype)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    grads, states = [], []
    for enable in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(enable)
        twin(x).square().sum().backward()
        grads.append([p.grad for p in twin.parameters()])
        states.append(twin.state_dict())
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(*states, rtol=0, atol=0, msg="statistics of batch norm follow a step once")
    assert all(m.momentum for m in twin.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm))


@pytest.mark.parametrize("native", [True, False])
def test_a_second_derivative(native, monkeypatch):
    if not native:
        monkeypatch.setattr("lightning_msnn.nn.layer.kernels_of", lambda _: None)
    model, x = make("msnn_resnet12_tiny").train(), torch.randn(2, 3, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    if native and kernels_of(x.detach()):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()
    else:
        slope.square().sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hooks_on_neurons(dtype):
    """Those on what they return, on what they receive and on gradients, also where a kernel could run."""
    model, x = make("msnn_resnet12_tiny").train().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    spike, calls = model.stages[0].blocks[0].mixer.spike1, []
    spike.register_forward_hook(lambda *_: calls.append("out"))
    spike.register_full_backward_hook(lambda *_: calls.append("back"))
    model(x).sum().backward()
    assert calls == ["out", "back"]
    before = model.eval()(x)
    handle = model.stages[-1].blocks[-1].mixer.spike2.register_forward_pre_hook(lambda _, args: (args[0] * 0 + 1.0,))
    assert not torch.equal(model(x), before)
    handle.remove()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", COMPILED)
def test_export(name):
    model = lively(make(name, **SHALLOW))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}}).module()
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.slow
def test_a_network_compiled_for_any_batch_trains():
    """A compiler gives empty gradients of what a layer does not hand on, and keeps numbers open."""
    torch._dynamo.reset()
    model, x = make("msnn_resnet12_tiny", depths=(1,), widths=(24,)).train(), torch.randn(6, 3, 8, 8)
    twin = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)(x).sum().backward()
    twin(x).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name):
    torch._dynamo.reset()  # its limit of recompilations counts those of all networks
    model = lively(make(name, **SHALLOW))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)  # a recurrence is unrolled, token by token
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.train()
    compiled(x).square().sum().backward()
    assert model.stem.conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTINCT)
def test_fx_features(name):
    model = lively(make(name))
    x = torch.randn(2, 3, 32, 32)
    mixer = "stages.2.blocks.1.mixer" if hasattr(model.stages[0].blocks[0], "mixer") else "stages.2.blocks.1"
    extractor = create_feature_extractor(model, ["stages.0", mixer, "head.fc"])
    out = extractor(x)
    torch.testing.assert_close(out["head.fc"], model(x))
    mixed = out[mixer]  # recurrent mixers return a membrane map beside it
    assert (mixed[0] if isinstance(mixed, tuple) else mixed).shape[1] == model.feature_info[2]["num_chs"]
    graph = timm.create_model(name, features_only=True, feature_cls="fx")
    assert isinstance(graph, FeatureGraphNet)
    assert [o.shape[1] for o in graph(x)] == graph.feature_info.channels()


@pytest.mark.parametrize("kwargs", [{}, {"context": "isolated", "windows": "grid"}], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_fx_features_train(name, kwargs):
    """Every parameter of a traced network has the gradient that it has in the network itself."""
    model = make(name, **SMALL, **kwargs).train()
    twin = copy.deepcopy(model)
    traced = create_feature_extractor(twin, ["head.fc"]).train()
    x, upstream = torch.randn(4, 3, 16, 16), torch.randn(4, 10)
    model(x).backward(upstream)
    traced(x)["head.fc"].backward(upstream)
    theirs = dict(traced.named_parameters())
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(theirs[parameter].grad, p.grad)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"thetta": 0.3}, "'thetta'.*did you mean 'theta'"),
        ({"windows": "alternating"}, "windows 'alternating'.*did you mean 'alternate'"),
        ({"num_classes": -1}, "num_classes.*-1"),
        ({"drop_rate": 1.0}, "drop_rate.*1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio.*0.0"),
        ({"norm": "none"}, "norm must be true or false, not 'none'"),
        ({"depths": (1, 0), "widths": (8, 8)}, "depths and widths.*0"),
        ({"depths": 2}, "depths and widths must be lists of integers, one for each stage, not 2"),
        ({"stem_stride": 3}, "stem_stride must be 2 or 4, not 3"),
        ({"preset": "papre"}, "preset.*papre"),
        ({"mlp": "relu"}, "mlp.*relu"),
        ({"coding": "rate"}, "coding.*rate"),
        ({"learn_tau": "all"}, "learn_tau must be true, false, 'layer' or 'channel', not 'all'"),
        ({"time_steps": 2}, "unknown argument 'time_steps' of msnn_resnet12_tiny: allowed are"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        make("msnn_resnet12_tiny", **kwargs)


def test_what_files_of_before_say_loads():
    before = {"time_steps": 1, "tau_time": None, "neuron": "lif"}
    assert not make("msnn_resnet12_tiny", **before).arguments.keys() & before.keys()


@pytest.mark.parametrize("name", DISTINCT)
def test_pretrained_without_a_tag_takes_the_entry_with_the_most_classes(name):
    entries = timm.list_pretrained(f"{name}.*")
    if entries:
        network = timm.create_model(name, pretrained=True)
        assert network.num_classes == max(timm.get_pretrained_cfg(entry).num_classes for entry in entries)
        assert f"{name}.{network.pretrained_cfg['tag']}" in entries
    else:
        with pytest.raises(ConfigurationError, match=f"no weights for {name}"):
            timm.create_model(name, pretrained=True)
    with pytest.raises(ConfigurationError, match=f"no weights for {name}.untrained"):
        timm.create_model(f"{name}.untrained", pretrained=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler of torch.compile needs g++")
def test_compile_with_the_default_compiler():
    """The one test of generated code: minutes for each network, so it takes the smallest."""
    model = lively(make("msnn_resnet12_tiny", **SHALLOW))
    x = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()  # what it learnt from other sizes makes sizes symbols, over which it never ends
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False)(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-3, atol=1e-3)


def test_weights_as_timm_gives_and_takes_them(tmp_path):
    """A configuration without a tag as timm's scripts give it, any file of weights, and no weights twice."""
    untagged = timm.get_pretrained_cfg("msnn_resnet12_tiny").to_dict()
    scripts = timm.create_model("msnn_resnet12_tiny", pretrained=True, pretrained_cfg=untagged, in_chans=1)
    pyramid = timm.create_model("msnn_resnet12_tiny", pretrained=True, in_chans=1, features_only=True)
    assert all("state_dict" not in (getattr(m, "pretrained_cfg", None) or {}) for m in pyramid.modules())
    save_file(scripts.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10}
    given = {"num_classes": 10, "in_chans": 1, "pretrained_cfg_overlay": overlay}
    assert torch.equal(make("msnn_resnet12_tiny", pretrained=True, **given).head.fc.weight, scripts.head.fc.weight)
