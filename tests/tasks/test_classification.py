import copy
import math
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.tuner import Tuner
from timm.optim import muon
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_msnn.callbacks import Mixing, TrainingCurves
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier, TrainingStepCallback, named_groups
from lightning_msnn.tasks.optimization import Muon
from tests.callbacks.training import quiet


def loader(n=24, batch_size=8, classes=10):
    g = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(n, 3, 8, 8, generator=g), torch.randint(classes, (n,), generator=g)), batch_size
    )


def trainer(folder, callbacks=(), **kwargs):
    return quiet(folder, *callbacks, **{"max_epochs": 2, **kwargs})


SMALL = {"network_kwargs": {"depths": (1, 1), "widths": (8, 8)}}


class Rates(pl.Callback):
    """Write down the learning rates of each step, by group."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize(
    ("warmup", "limits"),
    [(0, {"max_epochs": 10}), (2.5, {"max_steps": 30, "max_epochs": 1000})],
)
def test_cosine_after_a_warm_up_by_its_formula(tmp_path, warmup, limits):
    """Three batches an epoch, whatever says where training ends; a warm-up takes at most 30 % of it."""
    rates, total = Rates(), 30
    trainer(tmp_path, **{"max_epochs": None, **limits}, callbacks=[rates]).fit(
        SpikingClassifier(schedule="cosine", lr=0.01, warmup_epochs=warmup, **SMALL), loader()
    )
    rise = round(3 * warmup)
    expected = [
        (step + 1) / (rise + 1) if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))
        for step in range(total)
    ]
    assert [step[0] for step in rates.seen] == pytest.approx([0.01 * factor for factor in expected], abs=1e-9)


@pytest.mark.parametrize(("warmup", "rise"), [(1, 0.25), (100, 0.3)])
def test_one_cycle_by_its_formula(tmp_path, warmup, rise):
    """Half a cosine up to the peak, at ``rise`` of the steps, and half a cosine down; three batches an epoch."""
    rates, total = Rates(), 12
    trainer(tmp_path, max_epochs=4, callbacks=[rates]).fit(
        SpikingClassifier(schedule="one_cycle", lr=0.01, warmup_epochs=warmup, **SMALL), loader()
    )
    peak = rise * (total + 1) - 1
    first, last = 1 / 25, 1 / 25 / 1e4

    def between(a, b, share):
        return b + (a - b) * 0.5 * (1 + math.cos(math.pi * share))

    expected = [
        between(first, 1.0, step / peak) if step <= peak else between(1.0, last, (step - peak) / (total - peak))
        for step in range(total)
    ]
    assert [step[0] for step in rates.seen] == pytest.approx([0.01 * factor for factor in expected], rel=1e-6)


def test_the_triangle_by_its_corners(tmp_path):
    """Up from a fifth over 23 % of the steps, down in a line to 7 %; three batches an epoch."""
    rates, total = Rates(), 99
    trainer(tmp_path, max_epochs=33, limit_val_batches=0, callbacks=[rates]).fit(
        SpikingClassifier(schedule="triangle", lr=0.01, **SMALL), loader()
    )
    top = 0.23 * total
    expected = [0.2 + 0.8 * s / top if s <= top else 0.07 + 0.93 * (total - s) / (total - top) for s in range(total)]
    assert [step[0] for step in rates.seen] == pytest.approx([0.01 * factor for factor in expected])
    assert max(step[0] for step in rates.seen) == rates.seen[23][0]


class Gradients(pl.Callback):
    """Keep parameters and gradients as the optimizer finds them."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen = {n: (p.detach().clone(), p.grad.clone()) for n, p in module.network.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_first_step_of_the_optimizer_by_its_formula(tmp_path, optimizer):
    """Weights shrink by their own share, decoupled from the gradient with AdamW; vectors do not."""
    lr, decay, kept = 0.01, 0.3, Gradients()
    task = SpikingClassifier(lr=lr, weight_decay=decay, schedule="constant", optimizer=optimizer, **SMALL)
    trainer(tmp_path, max_steps=1, callbacks=[kept]).fit(task, loader())
    for name, after in task.network.named_parameters():
        p, g = kept.seen[name]
        weight_decay = decay if p.ndim > 1 else 0.0
        if optimizer == "sgd":  # Nesterov: the first step is by 1 + momentum
            expected = p - lr * 1.9 * (g + weight_decay * p)
        else:
            expected = p - lr * weight_decay * p - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_is_timms_in_float32(tmp_path, monkeypatch):
    """Filters and matrices but for the read-out's go as timm's Muon takes them, all else as AdamW; two steps."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    network = timm.create_model("msnn_rnn12_tiny", num_classes=10, depths=(1, 1), widths=(8, 16))
    twin = copy.deepcopy(network)
    groups = named_groups(network, 0.1, "muon")
    turned = {name for group in groups if group["orthogonal"] for name in group["params"]}
    assert all(p.ndim > 1 for n, p in network.named_parameters() if n in turned)
    assert {"stem.conv.weight", "stages.1.blocks.0.mlp.fc1.conv.weight"} <= turned
    assert not {n for n in turned if n.startswith("head") or n.endswith(("bias", "logit"))}
    ours, theirs = (
        [
            {**g, "params": [each.get_parameter(n) for n in g["params"]], "use_fallback": not g["orthogonal"]}
            for g in groups
        ]
        for each in (network, twin)
    )
    own, other = Muon(ours, 0.02), timm.optim.create_optimizer_v2(theirs, "muon", lr=0.02)
    exact = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", exact)
    for seed in range(2):
        for each, optimizer in ((network, own), (twin, other)):

            def closure(each: nn.Module = each, optimizer: torch.optim.Optimizer = optimizer, seed: int = seed) -> None:
                """Zero the gradients of the last step, as Lightning does, and add new ones."""
                torch.manual_seed(seed)
                optimizer.zero_grad(set_to_none=False)
                for p in each.parameters():
                    p.grad = torch.randn_like(p) + (0.0 if p.grad is None else p.grad)

            optimizer.step(closure)
    torch.testing.assert_close(network.state_dict(), twin.state_dict())
    momenta = [state["momentum_buffer"].dtype for state in own.state.values() if "momentum_buffer" in state]
    assert momenta == [torch.float32] * len(turned)


def test_classes_have_weights():
    weights = [1.0, 2.0, 0.5, 0.0]
    task = SpikingClassifier(num_classes=4, label_smoothing=0.0, class_weights=weights)
    assert "class_weights" not in task.state_dict()
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    log = logits.log_softmax(1)
    each = [weights[t] * -log[i, t].item() for i, t in enumerate(targets.tolist())]
    expected = sum(each) / sum(weights[t] for t in targets.tolist())
    assert task.loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    mixed = nn.functional.one_hot(targets, 4).float()
    assert task.loss(logits, mixed).item() == pytest.approx(expected, rel=1e-5), "labels that Mixing mixes too"
    plain = -log[range(6), targets].mean().item()
    assert task.losses(logits, targets).mean().item() == pytest.approx(plain, rel=1e-5), "evaluation is unweighted"


class Step(pl.Callback):
    """Keep what a training step saw and returned."""

    def on_fit_start(self, trainer, module):
        module.network.register_forward_hook(self.keep)

    def keep(self, module, args, logits):
        self.images, self.logits = args[0].detach(), logits.detach()

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.loss = outputs["loss"].item()


@pytest.mark.parametrize("kwargs", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=str)
def test_a_step_learns_from_mixed_images_with_both_labels(tmp_path, kwargs):
    """In the same shares; what is measured is of the labels as they were."""
    step, data = Step(), loader(n=8, batch_size=8, classes=4)
    t = trainer(tmp_path, max_steps=1, callbacks=[step, Mixing(**{"cutmix": 0.0, **kwargs}, share=1.0)])
    t.fit(SpikingClassifier(num_classes=4, label_smoothing=0.0), data)
    images, targets = data.dataset.tensors
    other = images.roll(1, 0)
    own = (step.images - other) / (images - other)  # share of each pixel that is the image's own
    share = own.mean().item()
    assert 0.05 < share < 0.95, "else the test says nothing"
    expected = torch.full_like(own, share) if "mixup" in kwargs else own.round()
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-3)
    log, rows = step.logits.log_softmax(1), range(8)
    loss = -(share * log[rows, targets] + (1 - share) * log[rows, targets.roll(1)]).mean().item()
    assert step.loss == pytest.approx(loss, rel=1e-4)
    top1 = (step.logits.argmax(1) == targets).float().mean().item()
    assert t.callback_metrics["train/top1"].item() == pytest.approx(top1)


def test_fits_tests_and_predicts(tmp_path):
    task = SpikingClassifier(num_classes=4, **SMALL)
    t = trainer(tmp_path, max_epochs=1, callbacks=[Mixing(mixup=0.8)])
    t.validate(task, loader(classes=4), verbose=False)  # in inference mode, whose tensors no training may change
    t.fit(task, loader(classes=4), loader(classes=4))
    assert {"train/top1", "train/top5", "train/loss", "val/top1", "val/top5", "val/loss"} <= set(t.callback_metrics)
    result = t.test(task, loader(classes=4), verbose=False)[0]
    assert result["test/top5"] == 1.0, "of four classes, the right one is always among five"
    predictions = t.predict(task, DataLoader(torch.randn(10, 3, 8, 8), 4))
    assert [len(p["class"]) for p in predictions] == [4, 4, 2]
    p = predictions[0]
    torch.testing.assert_close(p["logits"].softmax(1).max(1).values, p["probability"])
    assert torch.equal(p["logits"].argmax(1), p["index"])
    assert p["class"] == [str(i) for i in p["index"].tolist()]


def test_the_loss_smooths_labels():
    task = SpikingClassifier(label_smoothing=0.2)
    logits, targets = torch.randn(6, 10), torch.randint(10, (6,))
    log = logits.log_softmax(1)
    expected = -(0.8 * log[range(6), targets] + 0.2 * log.mean(1)).mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)


def test_share_of_mixed_batches_by_epoch():
    task, images, targets = SpikingClassifier(**SMALL), torch.randn(4, 3, 8, 8), torch.arange(4)
    for share, expected in ((1.0, [1, 1, 1, 1]), ({3: 0.0, 1: 1.0}, [0, 1, 1, 0]), ({}, [0, 0, 0, 0])):
        mixed = []
        for epoch in range(4):
            task.trainer = SimpleNamespace(current_epoch=epoch, global_step=0)
            mixed.append(Mixing(share=share).change_batch(task, images, targets)[1].ndim - 1)
        assert mixed == expected


def test_no_batch_is_mixed_at_the_end(tmp_path):
    mixed = []

    class Watch(TrainingStepCallback):
        def change_batch(self, task, inputs, targets):
            mixed.append(targets.ndim == 2)
            return inputs, targets

    t = trainer(tmp_path, max_epochs=4, callbacks=[Mixing(share=1.0, until=0.75), Watch()])
    t.fit(SpikingClassifier(**SMALL), loader())
    assert mixed == [True] * (len(mixed) * 3 // 4) + [False] * (len(mixed) // 4)


def test_share_of_mixed_batches_is_drawn():
    torch.manual_seed(0)
    task, mixing = SpikingClassifier(**SMALL), Mixing(mixup=0.5, cutmix=0.0, share=0.25)
    task.trainer = SimpleNamespace(current_epoch=0, global_step=0)
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed = sum(mixing.change_batch(task, images, targets)[1].ndim == 2 for _ in range(400))
    assert 70 <= mixed <= 130, "four standard deviations around 100"


def test_metrics_are_exact_with_an_uneven_last_batch(tmp_path):
    task = SpikingClassifier(**SMALL).eval()
    data = loader(n=21, batch_size=8)
    result = trainer(tmp_path).test(task, data, verbose=False)[0]
    images, targets = data.dataset.tensors
    with torch.no_grad():
        logits = task(images)
    assert result["test/top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    top5 = (logits.topk(5).indices == targets[:, None]).any(1).float().mean().item()
    assert result["test/top5"] == pytest.approx(top5)
    assert result["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)


def test_training_curves_resume(tmp_path):
    curves = TrainingCurves()
    t = trainer(tmp_path, max_epochs=2, callbacks=[curves], logger=pl.loggers.CSVLogger(tmp_path))
    t.fit(SpikingClassifier(**SMALL), loader(), loader())
    assert [e for e, _ in curves.history["val/top1"]] == [1, 2]
    assert [e for e, _ in curves.history["train/loss"]] == [1, 2]
    assert all(math.isfinite(v) for points in curves.history.values() for _, v in points)
    other = TrainingCurves()
    other.load_state_dict(curves.state_dict())
    assert other.history == curves.history
    assert (tmp_path / "lightning_logs" / "version_0" / "curves.png").stat().st_size > 5_000
    best, picture = max((value, epoch) for epoch, value in curves.history["val/top1"])[1], curves.draw()
    assert picture.get_suptitle().startswith("msnn_resnet12_tiny: best validation")
    assert all(list(axes.lines[-1].get_xdata()) == [best, best] for axes in picture.axes), "the best epoch is marked"
    drawn = {axes.get_ylabel(): [list(line.get_ydata()) for line in axes.lines[:-1]] for axes in picture.axes}
    losses = {name: [v for _, v in curves.history[f"{name}/loss"]] for name in ("train", "val")}
    assert drawn["training loss"] == [losses["train"]]
    assert drawn["validation loss"] == [losses["val"]], "smoothed labels are not compared with others"
    assert [len(line) for line in drawn["top-1 accuracy (%)"]] == [2, 2]


class FakeData(pl.LightningDataModule):
    num_classes = 7
    in_chans = 3


def test_data_that_does_not_fit():
    with pytest.raises(ConfigurationError, match="num_classes is 10, but FakeData has 7: set model.num_classes to 7"):
        SpikingClassifier().check_data(FakeData())
    with pytest.raises(ConfigurationError, match="in_chans is 1, but FakeData has 3"):
        SpikingClassifier(num_classes=7, in_chans=1).check_data(FakeData())
    FakeData.image_size = [8, 8]
    SpikingClassifier(num_classes=7).check_data(FakeData())


def test_weights_of_classes_in_any_precision():
    task = SpikingClassifier(num_classes=2, class_weights=[1.0, 3.0], label_smoothing=0.0, **SMALL).bfloat16()
    loss = task.loss(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((1.3132617 + 3 * 2.1269281) / 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"network": "msnn_resnet21"}, "'msnn_resnet21'.*did you mean"),
        ({"network_kwargs": {"theta": math.inf}}, "theta.*inf"),
        ({"label_smoothing": -0.1}, "label_smoothing.*-0.1"),
        ({"lr": math.nan}, "lr.*nan"),
        ({"pretrained": "msnn_resnet12_tiny.digit"}, "'msnn_resnet12_tiny.digit'.*did you mean"),
        (
            {"network": "msnn_resnet12", "num_classes": 7, "pretrained": "msnn_resnet12_tiny.digits"},
            "no parameter of .* fits MSNNResNet",
        ),
        ({"class_weights": [-1.0] * 10}, "class_weights must be 10 numbers"),
        ({"optimizer": "leon"}, "'leon'.*adamw, sgd.*did you mean 'lion'"),
        ({"schedule": "step"}, "'step'.*constant, cosine, one_cycle, triangle"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixup": -1.0}, "mixup and cutmix must be at least 0.*-1"),
        ({"cutmix": 0.0}, "one of them above 0"),
        ({"share": {-1: 0.5}}, "epoch of share.*-1"),
        ({"share": {0: 0.5, 3: 2}}, "share.*2"),
    ],
)
def test_bad_mixing(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        Mixing(**kwargs)


def test_starts_from_an_entry_and_needs_it_no_longer(tmp_path):
    task = SpikingClassifier("msnn_vit12_tiny", 7, 1, pretrained="msnn_vit12_tiny.digits")
    trained = timm.create_model("msnn_vit12_tiny.digits", pretrained=True)
    assert torch.equal(task.network.stem.conv.weight, trained.stem.conv.weight)
    for name, pretrained in (("msnn_vit12_tiny.digits", True), ("msnn_vit12_tiny", "msnn_vit12_tiny.digits")):
        task = SpikingClassifier(name, 10, 3, pretrained=pretrained, schedule="constant")
        t = trainer(tmp_path, max_steps=1)
        t.fit(task, loader(8))
        t.save_checkpoint(tmp_path / "x.ckpt")
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert content["started_from"] == "msnn_vit12_tiny.digits"
        hparams = content["hyper_parameters"]
        assert (hparams["network"], hparams["pretrained"]) == ("msnn_vit12_tiny", False)
        assert content["network_arguments"] == {**task.network.arguments, "num_classes": 10, "in_chans": 3}


def test_a_network_of_one_size():
    kwargs = {"patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 1, "img_size": 16}
    task = SpikingClassifier("vit_tiny_patch16_224", 7, 3, kwargs)
    data = FakeData()
    data.image_size = 16
    task.check_data(data)
    data.train_sizes = {0: 8}
    with pytest.raises(ConfigurationError, match="takes images of 16x16 pixels alone, but FakeData has 8"):
        task.check_data(data)


class Named(pl.LightningDataModule):
    """Images of three classes, which it names."""

    def __init__(self, *class_names):
        super().__init__()
        self.class_names = class_names

    def train_dataloader(self):
        return loader(8, classes=3)

    test_dataloader = train_dataloader


def test_other_classes_of_the_same_number_are_refused(tmp_path):
    """By a task that was trained, and by its checkpoint; a training on its own takes any."""
    task, own, others = SpikingClassifier(num_classes=3, **SMALL), trainer(tmp_path), Named("dog", "emu", "fox")
    own.fit(task, datamodule=Named("cat", "dog", "emu"))
    own.save_checkpoint(path := tmp_path / "x.ckpt")
    new = SpikingClassifier(num_classes=3, **SMALL)
    for verb, module, resumed in ((own.test, task, None), (own.test, new, path), (trainer(tmp_path).fit, new, path)):
        with pytest.raises(ConfigurationError, match=r"has the classes \['(cat|dog)', .*, but known are \['(dog|cat)'"):
            verb(module, datamodule=others, ckpt_path=resumed)
    trainer(tmp_path).fit(task, datamodule=others)
    assert task.class_names == ["dog", "emu", "fox"]


class Added(SpikingClassifier):
    """A subclass with parameters and a training step of its own, and a second validation loader."""

    def __init__(self, asks=True):
        super().__init__(**SMALL)
        self.temperature = nn.Parameter(torch.ones(()))
        self.asks = asks

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) if self.asks else self(batch[0]).mean()
        return loss * self.temperature

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx) if dataloader_idx == 0 else None


def test_what_a_subclass_adds_is_trained_and_its_first_loader_validated(tmp_path):
    task, t = Added(), trainer(tmp_path, max_epochs=1)
    t.fit(task, loader(), [loader(), loader(8)])
    assert task.temperature.item() != 1.0
    assert "val/top1" in t.callback_metrics


def test_a_training_step_that_asks_no_callbacks_is_refused_beside_one(tmp_path):
    with pytest.raises(ConfigurationError, match="Mixing must be left out, or training_step of Added call super"):
        trainer(tmp_path, max_epochs=1, callbacks=[Mixing()]).fit(Added(asks=False), loader())


def test_finders_of_the_rate(tmp_path):
    task, t = SpikingClassifier(**SMALL), trainer(tmp_path, max_epochs=1)
    Tuner(t).lr_find(task, loader(), num_training=4, early_stop_threshold=None)
    with pytest.raises(ConfigurationError, match="LearningRateFinder changes what the schedule was built of"):
        trainer(tmp_path, callbacks=[pl.callbacks.LearningRateFinder()]).fit(task, loader())
