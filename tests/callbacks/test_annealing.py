"""Spikes that sharpen over a training, and the statistics of batch norm meanwhile."""

import copy
import math

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric, MetricCollection

from lightning_msnn.callbacks import ANNEALING_SHAPES, EnergyMonitor, SpikeAnnealing, SpikeRateMonitor
from lightning_msnn.data import Digits
from lightning_msnn.energy import count_operations, spike_rate
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional.spike import SOFT
from lightning_msnn.nn import Spike, set_annealing
from lightning_msnn.tasks import SpikingClassifier

NETWORK = {"depths": (1, 1), "widths": (8, 8)}


class Watch(pl.Callback):
    """Write down the share of every step, and the running statistics after it."""

    def __init__(self):
        self.shares, self.means = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # after the step's forward pass
        spikes = [m for m in pl_module.modules() if isinstance(m, Spike)]
        assert len({m.soft for m in spikes}) == 1
        (share,) = {1.0 if m.annealing is None else round(m.annealing.item(), 6) for m in spikes}
        self.shares.append(share)
        self.means.append(pl_module.network.stages[1].blocks[0].mlp.fc1.norm.running_mean.clone())


def fit(tmp_path, *callbacks, epochs=4, ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, dict(NETWORK), schedule="constant")
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_val_batches=1,
        callbacks=[*callbacks, watch, ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **{"limit_train_batches": 5, "logger": False, **options},
    )
    trainer.fit(task, datamodule=Digits(batch_size=16, num_workers=0), ckpt_path=ckpt_path)
    return watch, task, trainer


def test_shapes_by_hand():
    at = {shape: SpikeAnnealing(until=0.5, shape=shape).share_at for shape in ANNEALING_SHAPES}
    assert [at["linear"](i, 8) for i in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [at["cosine"](i, 4) for i in range(4)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert at["cosine"](1, 8) == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))
    assert [at["square"](i, 4) for i in range(3)] == [0.0, 0.25, 1.0]
    assert [at["root"](i, 8) for i in (0, 1, 4, 8)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("batches", "first", "later"),
    [(1, 1, 1), (19, 1, 1), (20, 1, 2), (40, 2, 4), (352, 17, 32), (10_000, 32, 32), (math.inf, 32, 32)],
)
def test_how_often_statistics_are_taken(batches, first, later):
    for epoch, every in enumerate((first, later, later)):
        assert SpikeAnnealing.every(epoch, batches) == every
        assert sum(SpikeAnnealing.turn(epoch, i, batches) for i in range(16 * every)) == 16
    turns = [[SpikeAnnealing.turn(epoch, i, batches) for i in range(16 * later)] for epoch in (1, 2)]
    assert (turns[0] == turns[1]) == (later == 1)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "limit_train_batches": 10}, {"max_steps": 20}])
@pytest.mark.parametrize("kind", SOFT)
def test_the_share_rises_with_the_optimizers_steps(tmp_path, kind, options):
    watch, task, trainer = fit(tmp_path, SpikeAnnealing(kind, 0.5), **options)
    assert trainer.global_step == 20
    assert watch.shares == pytest.approx([min(1.0, i / 10) for i in range(20)], abs=1e-6)
    assert all(m.annealing is None for m in task.modules() if isinstance(m, Spike)), "left with exact spikes"
    norms = [m for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)
    assert trainer.callback_metrics["annealing"] == 1.0


def test_statistics_are_those_of_exact_spikes(tmp_path):
    """With annealed ones, what comes after a rectifier would have another mean by a multiple."""
    _, task, _ = fit(tmp_path, SpikeAnnealing(until=1.0), epochs=1, limit_train_batches=20)
    data = Digits(batch_size=64, num_workers=0)
    data.setup("fit")
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader()])

    def means(share):
        """Of the inputs of batch norms in a pass of the training mode."""
        found = []
        set_annealing(task, share)
        hooks = [
            norm.register_forward_pre_hook(
                lambda m, args: found.append((args[0].mean((0, 2, 3)), m.running_mean.clone()))
            )
            for norm in task.modules()
            if isinstance(norm, nn.BatchNorm2d)
        ]
        with torch.no_grad():
            task.train()(images)
        for hook in hooks:
            hook.remove()
        set_annealing(task, None)
        return torch.cat([(a - b).abs() for a, b in found]).mean()

    state = {k: v.clone() for k, v in task.state_dict().items()}
    exact = means(None)
    task.load_state_dict(state)
    assert exact < 0.5 * means(0.3)


def test_after_its_end_it_does_nothing(tmp_path):
    """The last steps are those of a training without it."""
    fit(tmp_path / "a", SpikeAnnealing(until=0.5), epochs=4)
    fit(tmp_path / "b", SpikeAnnealing(until=1.0), epochs=2)
    last = tmp_path / "b" / "last.ckpt"
    _, with_it, _ = fit(tmp_path / "c", SpikeAnnealing(until=0.5), ckpt_path=last)
    _, without, _ = fit(tmp_path / "d", ckpt_path=last)
    for (name, a), b in zip(with_it.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("first", [True, False])
def test_monitors_see_exact_spikes(tmp_path, first):
    """Whichever callback comes first, and whether or not a step takes statistics."""

    class Log(Logger):
        name, version, said = "log", 0, ()

        def log_metrics(self, metrics, step=None):
            self.said = [*self.said, {k: v for k, v in metrics.items() if k.startswith(("spike_rate", "energy"))}]

        def log_hyperparams(self, *_):
            pass

    class Compare(pl.Callback):
        """Count by hand what the network does in evaluation."""

        expected = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            twin = copy.deepcopy(pl_module.network).eval()
            record = count_operations(twin, batch[0].to(memory_format=torch.channels_last))
            self.expected = [*self.expected, (spike_rate(record).item(), record.total("accumulates") / len(batch[0]))]

    log, compare = Log(), Compare()
    callbacks = [SpikeAnnealing(until=0.9), compare, SpikeRateMonitor(1), EnergyMonitor(every_n_steps=1)]
    fit(tmp_path, *(callbacks if first else [compare, *callbacks[:1:-1], callbacks[0]]), epochs=2, logger=log)
    rates = [m["spike_rate/all"] for m in log.said if "spike_rate/all" in m]
    accumulates = [m["energy/accumulates_per_image"] for m in log.said if "energy/all" in m]
    annealed = slice(0, 9)  # of the steps after that, what is counted is the training itself
    assert rates[annealed] == pytest.approx([rate for rate, _ in compare.expected][annealed])
    assert accumulates[annealed] == pytest.approx([count for _, count in compare.expected][annealed])
    assert len(rates) == len(accumulates) == 10


class Own(pl.LightningModule):
    """A module that prepares its images in the step, and calls its network by ``logits``."""

    def __init__(self):
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.net = timm.create_model("msnn_resnet12_tiny", num_classes=3, **NETWORK)

    def forward(self, images):
        return self.net(images)

    def logits(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        self.batch = batch_idx
        return nn.functional.cross_entropy(self.logits((batch["images"] - 100.0) / 50.0), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # so that all passes are of the same weights


class Forward(Own):
    def logits(self, images):
        return self(images)


class Keywords(Own):
    def logits(self, images):
        return self.net(x=images)


class Manual(Own):
    """Two networks, each with a step of its own, which are called one after the other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = timm.create_model("msnn_resnet12_tiny", num_classes=3, **NETWORK)

    def training_step(self, batch, batch_idx):
        optimizer, images = self.optimizers(), (batch["images"] - 100.0) / 50.0
        optimizer.zero_grad()
        for network in (self.net, self.other):
            self.manual_backward(nn.functional.cross_entropy(network(images), batch["labels"]))
        optimizer.step()


class ByTurns(Own):
    """Networks, of which each batch is for one."""

    def __init__(self, number=2):
        super().__init__()
        self.all = nn.ModuleList([self.net])
        self.all += [timm.create_model("msnn_resnet12_tiny", num_classes=3, **NETWORK) for _ in range(number - 1)]

    def logits(self, images):
        return self.all[self.batch % len(self.all)](images)


class Head(Own):
    """What follows a part with neurons gets what that makes with exact spikes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(3), Spike(), nn.Linear(3, 3), nn.BatchNorm1d(3))

    def logits(self, images):
        return self.head(self.net(images))


class Detached(Head):
    def logits(self, images):
        logits = self.net(images)
        return logits + self.head(logits.detach())


class Encoded(Own):
    """What comes before the neurons is none of theirs, whatever is done with its output."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def logits(self, images):
        return self.net(2.0 * self.encoder(images))


class Measured(Own):
    """A metric sees each batch once."""

    class Seen(Metric):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.add_state("number", torch.tensor(0.0), "sum", persistent=True)

        def update(self, logits):
            self.number += len(self.norm(logits))

        def compute(self):
            return self.number

    def __init__(self):
        super().__init__()
        self.seen = self.Seen()

    def logits(self, images):
        logits = self.net(images)
        self.seen.train(False).update(logits.detach())
        return logits


class Views(Own):
    """Two calls with what another part has made of the images."""

    def __init__(self):
        super().__init__()
        self.pre = nn.Conv2d(3, 3, 1)

    def logits(self, images):
        return self.net(self.pre(images)) + self.net(self.pre(images.flip(-1)))


class Checkpointed(Views):
    def logits(self, images):
        return torch.utils.checkpoint.checkpoint(self.net, self.pre(images), use_reentrant=False)


class Hooked(Own):
    """A forward pre-hook of the network's own, which changes what it is called with, and in place."""

    def __init__(self):
        super().__init__()
        self.net.register_forward_pre_hook(lambda module, args: (args[0].sub_(1.0).mul_(3.0),))


class Recursive(Own):
    """A module that calls itself for each of several crops."""

    def forward(self, images):
        return sum(self(part) for part in images) if isinstance(images, list) else self.net(images)

    def logits(self, images):
        return self([images, images.flip(-1)]) + self(images)


class Writes(Head):
    """A part that returns nothing, but leaves its result where it is told."""

    class Into(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images, results):
            results["logits"] = self.net(images)

    def __init__(self):
        super().__init__()
        self.net = self.Into(self.net)
        self.head = nn.Identity()

    def logits(self, images):
        self.net(images, results := {})
        return results["logits"]


class Setup(Own):
    """Networks that are made when the training begins."""

    def setup(self, stage):
        self.net = timm.create_model("msnn_resnet12_tiny", num_classes=3, **NETWORK)

    def __init__(self):
        super().__init__()
        del self.net


class Autocast(Own):
    """Mixed precision by hand."""

    def logits(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            images = nn.functional.conv2d(images, torch.ones(3, 1, 1, 1), groups=3)  # bfloat16 now
            return self.net(images)


class Indexed(Own):
    """Parts of a container that is never called itself, without batch norms before one."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Module()
        self.parts.first = nn.Sequential(nn.Conv2d(3, 3, 1), Spike())
        self.parts.second = nn.BatchNorm2d(3)

    def logits(self, images):
        return self.net(self.parts.second(self.parts.first(images)))


class Inference(Own):
    """What is called beside in inference mode."""

    def logits(self, images):
        with torch.inference_mode():
            self.net(images)
        return self.net(images)


class Sparse(Own):
    """A part that is also given a tensor that has no memory of its own."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, edges):
            return self.norm(torch.sparse.mm(edges, x))

    def __init__(self):
        super().__init__()
        self.graph = self.Graph()

    def logits(self, images):
        return self.graph(self.net(images), torch.eye(len(images)).to_sparse())


class Catches(Own):
    """A call that fails is none."""

    def logits(self, images):
        with pytest.raises(RuntimeError):
            self.net(images.double())
        return self.net(images)


def fit_own(module, *callbacks, batches=4, **options):
    torch.manual_seed(0)
    images = 100.0 + 50.0 * torch.randn(8, 3, 8, 8)
    given = [{"images": images, "labels": torch.arange(8) % 3}] * batches
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", **options}
    trainer = pl.Trainer(callbacks=[*callbacks], enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(given, batch_size=None))
    return module


def same_statistics(plain, annealed):
    for (name, a), b in zip(plain.state_dict().items(), annealed.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize(
    "kind",
    [
        *(Own, Forward, Keywords, Manual, ByTurns, Head, Detached, Encoded, Measured, Views, Hooked, Catches),
        *(Recursive, Writes, Setup, Autocast, Indexed, Inference, Sparse),
    ],
)
def test_statistics_are_of_what_the_step_has_called(kind):
    """As they are without annealing, where the spikes of each step are exact."""
    plain, annealed = fit_own(kind()), fit_own(kind(), SpikeAnnealing(until=1.0))
    same_statistics(plain, annealed)
    stem = annealed.get_submodule("net.net.stem" if kind is Writes else "net.stem")
    assert stem.norm.num_batches_tracked >= 2
    hooks = [m for m in annealed.modules() if m._forward_hooks or (m._forward_pre_hooks and kind is not Hooked)]
    assert not hooks, "none is left"


def test_calls_that_a_backward_repeats_are_none():
    plain, annealed = fit_own(Views()), fit_own(Checkpointed(), SpikeAnnealing(until=1.0))
    assert annealed.net.stem.norm.num_batches_tracked == 4 == plain.net.stem.norm.num_batches_tracked / 2


@pytest.mark.parametrize(("parts", "batches"), [(2, 40), (3, 60), (5, 100)])
def test_parts_by_turns_are_all_reached(parts, batches):
    """Also where turns are as many as the steps of which one takes statistics."""
    annealed = fit_own(ByTurns(parts), SpikeAnnealing(until=1.0), batches=batches)
    tracked = [int(part.stem.norm.num_batches_tracked) for part in annealed.all]
    assert sum(tracked) == 20
    assert min(tracked) > 0


class Endless(torch.utils.data.IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        for _ in range(4):
            yield {"images": 100.0 + 50.0 * torch.randn(8, 3, 8, 8), "labels": torch.arange(8) % 3}


def test_epochs_without_a_length_have_their_share_of_a_training():
    """A pass in 32 steps would be one in eight of these epochs."""
    tracked = []

    class After(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            tracked.append(int(pl_module.net.stem.norm.num_batches_tracked))

    trainer = pl.Trainer(
        callbacks=[SpikeAnnealing(until=1.0), After()], max_steps=40, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Own(), DataLoader(Endless(), batch_size=None))
    assert tracked == list(range(2, 21, 2))


def test_a_training_below_an_epoch_has_its_passes():
    module = fit_own(Own(), SpikeAnnealing(until=1.0), batches=5000, max_epochs=-1, max_steps=20)
    assert module.net.stem.norm.num_batches_tracked == 20


class Often(Own):
    """Steps by hand, several in a batch or one in several."""

    def __init__(self, steps):
        super().__init__()
        self.automatic_optimization = False
        self.steps, self.shares = steps, []

    def training_step(self, batch, batch_idx):
        self.shares.append(next(m.annealing for m in self.modules() if isinstance(m, Spike)))
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for _ in range(int(self.steps) if self.steps >= 1 else (batch_idx + 1) % round(1 / self.steps) == 0):
            self.optimizers().step()


@pytest.mark.parametrize("steps", [0.25, 2])
def test_steps_by_hand_are_annealed_by_batches(steps):
    module = fit_own(Often(steps), SpikeAnnealing(until=0.5), batches=8)
    assert [1.0 if share is None else float(share) for share in module.shares] == [0.0, 0.25, 0.5, 0.75] + 4 * [1.0]


def test_parts_that_are_scripted_or_measure_are_left_alone():
    class Other(Own):
        def __init__(self):
            super().__init__()
            with pytest.warns(DeprecationWarning, match="script"):
                self.pool = torch.jit.script(nn.AvgPool2d(1))
            self.measures = MetricCollection([Measured.Seen()])

        def logits(self, images):
            logits = self.net(self.pool(images))
            self.measures.train(False).update(logits.detach())
            return logits

    same_statistics(fit_own(Other()), fit_own(Other(), SpikeAnnealing(until=1.0)))


def test_between_steps_spikes_are_exact():
    """So that statistics that are renewed after an epoch are those of exact spikes."""

    class Renews(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            images = [torch.ones(4, 3, 8, 8) * i for i in range(1, 4)]
            torch.optim.swa_utils.update_bn(images, pl_module.net)

    plain, annealed = fit_own(Own(), Renews()), fit_own(Own(), Renews(), SpikeAnnealing(until=1.0))
    same_statistics(plain, annealed)


def test_without_running_statistics_nothing_is_called_once_more():
    class Counts(Own):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 3, 8), nn.Flatten(), Spike(), nn.BatchNorm1d(3, track_running_stats=False)
            )
            self.head, self.calls = nn.Linear(3, 3), 0
            self.net.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

        def logits(self, images):
            return self.head(2.0 * self.net(images))  # which is refused where there are statistics to take

    assert fit_own(Counts(), SpikeAnnealing(until=1.0)).calls == 4


def test_copies_within_a_step_have_no_hooks_that_work():
    class Copies(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            self.twin = copy.deepcopy(pl_module.net)
            self.twin(torch.zeros(2, 3, 8, 8))

    copies = Copies()
    plain, annealed = fit_own(Own(), SpikeAnnealing(until=1.0)), fit_own(Own(), SpikeAnnealing(until=1.0), copies)
    same_statistics(plain, annealed)


def test_statistics_are_of_what_the_step_has_called_in_ddp():
    """Whose wrapper calls the training step in the place of the forward."""
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    same_statistics(fit_own(Forward()), fit_own(Forward(), SpikeAnnealing(until=1.0), **options))


def test_a_network_that_is_compiled_whole_has_the_same_statistics():
    plain, annealed = fit_own(Own()), Own()
    annealed.net.compile(backend="eager", fullgraph=True)
    same_statistics(plain, fit_own(annealed, SpikeAnnealing(until=1.0)))


def test_a_compiled_module_calls_itself():
    torch._dynamo.reset()
    annealed = Forward()
    fit_own(torch.compile(annealed, backend="eager"), SpikeAnnealing(until=1.0))
    same_statistics(fit_own(Forward()), annealed)


def test_a_compiled_module_is_compiled_twice_at_most():
    """For steps that are annealed, with and without statistics, and for exact ones."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    numbers = []
    for until in (0.2, 0.9):
        graphs.clear()
        torch._dynamo.reset()
        module = Own()
        module.net = timm.create_model("msnn_resnet12_tiny", num_classes=3, depths=(1,), widths=(8,))
        fit_own(torch.compile(module, backend=count), SpikeAnnealing(until=until), batches=40)
        numbers.append(len(graphs))
    assert numbers[0] == numbers[1], "however many steps are annealed"


def test_calls_in_evaluation_are_none_of_the_step():
    """Such as those of what counts a network before the step."""

    class Counts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net.eval()
            pl_module.net(batch["images"][:1])
            pl_module.net.train()

    plain, annealed = (fit_own(Own(), SpikeAnnealing(until=1.0), *callbacks) for callbacks in ((), (Counts(),)))
    for (name, a), b in zip(plain.state_dict().items(), annealed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_calls_between_steps_are_tracked_as_ever():
    """Such as those that renew statistics at the end of an epoch."""

    class Renews(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net(torch.full((2, 3, 8, 8), 50.0))

    annealed = fit_own(Own(), SpikeAnnealing(until=1.0), Renews())
    assert annealed.net.stem.norm.num_batches_tracked == 5
    assert annealed.net.stem.norm.running_mean.abs().max() > 1.0


def test_a_step_that_calls_a_method_of_a_part_is_told():
    class Method(Own):
        def logits(self, images):
            return self.net.forward_head(self.net.forward_features(images))

    class OfOne(Manual):
        def training_step(self, batch, batch_idx):
            self.net(batch["images"])
            self.other.forward_features(batch["images"])

    for module, norm in ((Method(), "net.stem.norm"), (OfOne(), "other.stem.norm")):
        with pytest.warns(UserWarning, match=f"no statistics of exact spikes for [0-9]+ batch norms, such as '{norm}"):
            fit_own(module, SpikeAnnealing(until=1.0), batches=1)


def test_what_cannot_be_called_once_more_is_refused():
    class Computes(Head):
        def logits(self, images):
            return self.head(2.0 * self.net(images))

    class InPlace(Head):
        def logits(self, images):
            logits = self.net(images)
            logits += 5.0
            return self.head(logits)

    class Stale(Head):
        def logits(self, images):
            logits = self.net(images)
            twice = 2.0 * logits
            logits.add_(1.0)
            return self.head(twice)

    class Frames(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, frames):
            return sum(self.net(frame) for frame in frames)

    class Iterates(Own):
        def __init__(self):
            super().__init__()
            self.net = Frames(self.net)

        def logits(self, images):
            return self.net(iter((images, images)))

    class Result:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return Result(self.net(images))

    class Objects(Head):
        def __init__(self):
            super().__init__()
            self.net = Wrapped(self.net)

        def logits(self, images):
            return self.head(self.net(images).logits)

    class Generates(Own):
        class Each(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, images):
                yield self.net(images)

        def __init__(self):
            super().__init__()
            self.net = self.Each(self.net)

        def logits(self, images):
            return sum(self.net(images))

    for module, said in (
        *(
            (kind(), "cannot call Sequential once more .* with what the step computes from the output of MSNNResNet")
            for kind in (Computes, InPlace, Stale)
        ),
        (Objects(), "cannot call Sequential once more .* what the step computes from the output of Wrapped"),
        (Generates(), "cannot call Each once more .* returns an iterator: make that in the forward"),
        (Iterates(), "cannot call Frames once more .* with an iterator: make that in the forward"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            fit_own(module, SpikeAnnealing())


def test_what_breaks_a_training_leaves_the_network_as_it_was(tmp_path):
    class Break(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            self.task = pl_module
            raise RuntimeError("broken")

    broken = Break()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, SpikeAnnealing(), broken)
    assert all(m.annealing is None for m in broken.task.modules() if isinstance(m, Spike))
    assert all(m.track_running_stats for m in broken.task.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "rectifer"}, "unknown kind of annealing 'rectifer'.*did you mean 'rectifier'"),
        ({"shape": "line"}, "unknown shape of annealing 'line'.*did you mean 'linear'"),
        ({"until": 0.0}, "until.*above 0, not 0"),
        ({"until": 1.5}, r"until.*in \[0, 1\], not 1.5"),
        ({"until": float("nan")}, "not nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikeAnnealing(**arguments)


def test_it_needs_an_end_and_neurons(tmp_path):
    with pytest.raises(ConfigurationError, match="must know where training ends: set max_epochs, not -1"):
        fit(tmp_path, SpikeAnnealing(), epochs=-1)
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, dict(NETWORK), twin="relu")
    trainer = pl.Trainer(max_epochs=1, logger=False, callbacks=SpikeAnnealing(), accelerator="cpu")
    with pytest.raises(ConfigurationError, match="no spiking neurons to anneal: leave out SpikeAnnealing"):
        trainer.fit(task, datamodule=Digits(batch_size=16, num_workers=0))


def test_it_needs_an_end_of_data_without_a_length(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(1, 8, 8), 0

    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1, dict(NETWORK), schedule="constant")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pytest.raises(ConfigurationError, match="the data has no length: set max_steps, not -1"):
        pl.Trainer(max_epochs=1, callbacks=SpikeAnnealing(), **options).fit(task, DataLoader(Endless(), 4))
    watch = Watch()
    pl.Trainer(max_steps=4, callbacks=[SpikeAnnealing(until=0.5), watch], **options).fit(task, DataLoader(Endless(), 4))
    assert watch.shares == [0.0, 0.5, 1.0, 1.0]
