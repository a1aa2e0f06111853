"""The energy dial: targets in training, and a trained network that needs less; what a network costs to train."""

import gc
import time

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.data import Digits
from lightning_msnn.describe import describe
from lightning_msnn.dial import raise_thresholds
from lightning_msnn.energy.expected import EnergyLaw
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.tasks import SpikingClassifier
from lightning_msnn.tasks.dial import Dial

ENTRY = "msnn_resnet12_tiny.digits"
DIGITS = ["msnn_resnet12_tiny.digits", "msnn_vit12_tiny.digits", "msnn_rnn12_tiny.digits"]


def expected(network, what="joules", law=None):
    law = law or EnergyLaw(network, (1, 16, 16))
    with torch.no_grad():
        return float(getattr(law, what)(law.rates()))


@pytest.mark.parametrize(("name", "share"), zip(DIGITS, [0.9, 0.7, 0.5], strict=True))
def test_thresholds_rise_until_the_law_expects_the_energy(name, share):
    network = zoo.load(name)
    law = EnergyLaw(network)
    before = expected(network, law=law)
    silent = float(law.joules({n: torch.zeros(1) for n in law.rates.layers}))
    wanted = silent + share * (before - silent)
    weights = {n: p.clone() for n, p in network.named_parameters() if not n.endswith("bias")}
    deviations = raise_thresholds(network, law, wanted)
    assert deviations > 0.0
    assert expected(network, law=law) == pytest.approx(wanted, rel=1e-3)
    assert all(torch.equal(dict(network.named_parameters())[n], p) for n, p in weights.items())
    with pytest.raises(ConfigurationError, match="the energy must be between"):
        raise_thresholds(network, law, 0.5 * silent)
    assert expected(network, law=law) == pytest.approx(wanted, rel=1e-3), "a refusal leaves the network as it was"


def fit(folder, steps=40, ckpt_path=None, **task):
    pl.seed_everything(0, verbose=False)
    module = SpikingClassifier(ENTRY, in_chans=1, pretrained=True, lr=1e-2, warmup_epochs=0.1, **task)
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        enable_checkpointing=False, accelerator="cpu", default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=64, image_size=16, num_workers=0), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize(("target", "what"), [("target_energy", "joules"), ("target_rate", "rate")])
def test_training_goes_towards_a_target(tmp_path, target, what):
    before = expected(zoo.load(ENTRY), what)
    module, trainer = fit(tmp_path, **{target: 0.7 * before})
    law = module.dial.law
    after = expected(module.network, what, law) * module.dial.ratio
    assert after < 0.85 * before * module.dial.ratio
    free, _ = fit(tmp_path)
    assert free.dial is None
    assert after < expected(free.network, what)
    logged = trainer.callback_metrics
    assert float(logged["expected/rate"]) == pytest.approx(expected(module.network, "rate", law), rel=0.1)
    assert float(logged["expected/energy"]) == pytest.approx(expected(module.network, "joules", law), rel=0.1)


def test_the_loss_is_of_what_exceeds_the_target_and_grows_in():
    network = zoo.load(ENTRY)
    rate = expected(network, "rate")
    below, above = (
        Dial(network, (1, 16, 16), target_rate=1.1 * rate),
        Dial(network, (1, 16, 16), target_rate=0.9 * rate),
    )
    assert below(1.0)[0].item() == 0.0
    assert above(0.0)[0].item() == 0.0
    assert 0.0 < above(0.15)[0].item() == pytest.approx(above(0.3)[0].item() / 2)
    assert above(0.3)[0].item() == above(1.0)[0].item()
    below.ratio = 1.3
    assert below(1.0)[0].item() > 0.0, "what is measured counts"
    above(1.0)[0].backward()
    assert any(
        p.grad is not None and bool((p.grad > 0).any()) for n, p in network.named_parameters() if "norm.bias" in n
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_rate": 0.0}, "target_rate must be above 0"),
        ({"target_rate": 1.5}, "target_rate must be a number in"),
        ({"target_energy": -1.0}, "target_energy must be joules of an image, a number above 0, not -1.0"),
        ({"target_energy": float("nan")}, "target_energy must be joules"),
        ({"target_energy": 1e-6, "target_rate": 0.1}, "must not be given beside"),
    ],
)
def test_targets_that_are_none(given, message):
    with pytest.raises(ConfigurationError, match=message):
        SpikingClassifier(**given)


def test_targets_of_networks_that_the_law_does_not_know(tmp_path):
    with pytest.raises(ConfigurationError, match="of one time step, not of 2"):
        fit(tmp_path, target_rate=0.1, network_kwargs={"time_steps": 2})
    with pytest.raises(ConfigurationError, match="joules, which an image needs if no neuron fires"):
        fit(tmp_path, target_energy=1e-12)


def test_the_verb_dial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["dial", ENTRY, "--energy", "0.7", "--output", "less.ckpt"])
    said = capsys.readouterr().out
    assert "written to less.ckpt" in said
    content = read_checkpoint("less.ckpt")
    network = network_of(content, "less.ckpt").eval()
    before, after = expected(zoo.load(ENTRY)), expected(network)
    assert after == pytest.approx(0.7 * before, rel=0.1)
    original = zoo.load(ENTRY).state_dict()
    for name, value in network.state_dict().items():
        if ".conv." in name or name.startswith("head"):
            assert torch.equal(value, original[name]), "only norms learn"
    data = Digits(image_size=16, num_workers=0)
    data.prepare_data()
    data.setup("test")
    assert zoo.evaluate(network, data)["top1"] > 90.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--energy", "1.5"], "energy must be a share of what the network needs"),
        (["--energy", "0.5", "--epochs", "-1"], "epochs must be an integer of at least 0"),
        (["--energy", "0.5", "--output", "x.txt"], "output must be a .ckpt file that does not exist"),
    ],
)
def test_the_verb_dial_refuses(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["dial", ENTRY, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_describe_says_what_a_training_needs():
    found = describe("msnn_resnet12_tiny", "Digits", batch_size=64, image_size=16, steps=5)
    task = SpikingClassifier("msnn_resnet12_tiny", 10, 1).train()
    assert found["parameters"] == sum(p.numel() for p in task.network.parameters())
    assert found["operations"]["dense"] > found["operations"]["accumulates"] > 0
    assert found["energy"] == pytest.approx(expected(task.network), rel=0.05)
    assert found["images"] == pytest.approx(0.9 * 0.8 * 1797, rel=0.01)
    optimizer = torch.optim.AdamW(task.parameters(), fused=True)
    images, targets = torch.randn(64, 1, 16, 16), torch.randint(10, (64,))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        optimizer.zero_grad()
        task.loss(task(images), targets).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    assert found["step"] == pytest.approx(sorted(times[2:])[3], rel=1.0)  # machines that run tests are busy
    gc.collect()
    stream = 4 * 64 * 16 * 8 * 8  # bytes of the stream after the stem
    assert 10 * stream < found["activations"] < 200 * stream
    twice = describe("msnn_resnet12_tiny", "Digits", batch_size=128, image_size=16, steps=1)
    assert twice["activations"] == pytest.approx(2 * found["activations"], rel=0.1)


def test_the_verb_describe(capsys):
    main(["describe", "msnn_vit12_tiny", "--data", "Digits", "--batch_size", "8", "--steps", "1"])
    said = capsys.readouterr().out
    for what in ("parameters", "operations an image", "activations a step", "time an epoch", "energy an image"):
        assert what in said
    with pytest.raises(SystemExit) as stop:
        main(["describe", "msnn_vit12_tiny", "--data", "Digit"])
    assert stop.value.code == 2
    assert "did you mean 'Digits'?" in capsys.readouterr().err
