"""Entries: loaded by any name, with the figures of their cards."""

import csv
import json
import shutil
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf

from lightning_msnn import zoo
from lightning_msnn.entries import FACTS, entries, read_weights
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.msnn_rnn import SPIKING_CELLS
from lightning_msnn.models.registry import own_arguments
from lightning_msnn.nn.folding import fold_batch_norm
from lightning_msnn.zoo import verification
from lightning_msnn.zoo.card import write_card
from lightning_msnn_cli import main
from tests.conftest import ROOT, rest_is_slow

DIGITS = "msnn_resnet12_tiny.digits"
TINY = rest_is_slow(entries(), [name for name in entries() if name.endswith("_tiny.digits")])


# Loading


@pytest.mark.parametrize("name", TINY)
def test_both_spellings_and_timm_give_the_same_network(name):
    networks = [
        zoo.load(name),
        zoo.load(name.replace(".", "_")),
        timm.create_model(name, pretrained=True).eval(),
        timm.create_model(f"local-dir:{entries()[name]}", pretrained=True).eval(),
    ]
    first, config = networks[0], zoo.info(name)
    x = torch.randn(2, *config["input_size"])
    assert not first.training
    assert first(x).shape == (2, config["num_classes"])
    for other in networks[1:]:
        assert torch.equal(first(x), other(x))
        assert getattr(first, "arguments", None) == getattr(other, "arguments", None)
    assert first.pretrained_cfg == networks[2].pretrained_cfg == networks[3].pretrained_cfg
    assert "state_dict" not in first.pretrained_cfg
    assert not torch.equal(zoo.load(name, pretrained=False)(x), first(x))
    assert name in timm.list_models(pretrained=True)
    assert name in zoo.list_models()


@pytest.mark.parametrize("name", TINY)
def test_logits_of_fixed_images_are_those_of_the_card(name):
    images, card = zoo.fixed_images(zoo.info(name)), torch.tensor(zoo.info(name)["logits_of_fixed_images"])
    with torch.no_grad():
        for fuse in (False, True):
            exact = zoo.load(name).double()
            logits = (fold_batch_norm(exact) if fuse else exact)(images.double())
            torch.testing.assert_close(logits.float(), card, rtol=0, atol=1e-4)
            close = torch.isclose(zoo.load(name, fuse=fuse)(images), card, rtol=0, atol=1e-4).all(1)
            assert close.any()  # in float32 a membrane of the other image may cross its threshold


@pytest.mark.parametrize("name", entries())
def test_config_is_complete(name):
    config = zoo.info(name)
    assert {"top1", "top1_images", "command", "hardware", "date", "versions", "epochs", "seed"} <= set(config)
    data = resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    assert list(data["input_size"]) == config["input_size"]
    assert list(data["mean"]) == pytest.approx(config["mean"])
    if name.startswith("msnn"):  # every argument that decides what it computes
        arguments = own_arguments(name.partition(".")[0]) - {"preset", "drop_rate", "drop_path_rate"}
        assert {"depths", "widths", "windows", "threshold"} <= arguments
        assert arguments <= config["model_args"].keys()


def test_new_head_and_channels():
    model, trained = zoo.load(DIGITS, num_classes=3, in_chans=3), zoo.load(DIGITS)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    kept = (network.stages[0].blocks[0].mixer.synapse1.conv.weight for network in (model, trained))
    assert torch.equal(*kept)


def numbers(model, name):
    return {k: v for k, v in model.state_dict().items() if k.endswith(name)}


@pytest.mark.parametrize("pretrained", [True, False])
def test_theta_and_tau_beside_pretrained_are_those_that_are_given(pretrained):
    model = zoo.load(DIGITS, pretrained, theta=[0.1, 0.2, 0.3, 0.4], tau=0.7)
    plain = timm.create_model("msnn_resnet12_tiny", in_chans=1, theta=[0.1, 0.2, 0.3, 0.4], tau=0.7)
    for name in (".theta", ".logit"):
        given, expected = numbers(model, name), numbers(plain, name)
        assert expected
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    weights = read_weights(entries()[DIGITS])
    assert torch.equal(model.stem.conv.weight, weights["stem.conv.weight"]) is pretrained


def test_an_entry_keeps_its_tau_where_theta_alone_is_given():
    weights, model = read_weights(entries()[DIGITS]), zoo.load(DIGITS, theta=0.3)
    assert all(torch.equal(v, weights[k]) for k, v in numbers(model, ".logit").items())
    assert {round(v.item(), 6) for v in numbers(model, ".theta").values()} == {0.3}
    for name, logit in numbers(zoo.load(DIGITS, learn_theta=True), ".theta_logit").items():
        torch.testing.assert_close(logit.sigmoid(), weights[name.removesuffix("_logit")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"integer": True, "fuse": False}, "integer folds batch norm"),
        ({"integer": True, "device": "cuda"}, "integer is for CPUs"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        zoo.load(DIGITS, **arguments)


@pytest.mark.slow
def test_importing_the_zoo_does_not_import_lightning():
    code = "import sys, lightning_msnn; lightning_msnn.zoo.load(sys.argv[1]); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, DIGITS], timeout=300).returncode == 0


def test_save_for_hf_keeps_every_argument(tmp_path):
    """timm's own writer and reader, of a network with other arguments than the defaults, and of an entry."""
    made = timm.create_model("msnn_resnet12_tiny", num_classes=3, in_chans=1, depths=(1, 1, 1, 1), tau=0.3,
                             widths=(4, 4, 8, 8), projection="tanh", theta=[0.1, 0.2, 0.3, 0.4],
                             windows="grid")  # fmt: skip
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith(("logit", "theta")):
                value.add_(0.01)  # trained, so that it is not what the arguments say
    for number, network in enumerate((made.eval(), zoo.load(DIGITS))):
        save_for_hf(network, tmp_path / str(number), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / str(number)}", pretrained=True).eval()
        x = torch.randn(2, 1, 16, 16)
        assert torch.equal(again(x), network(x))
        assert json.dumps(again.arguments, sort_keys=True) == json.dumps(network.arguments, sort_keys=True)
    other = timm.create_model(f"local-dir:{tmp_path / '0'}", pretrained=True, tau=0.5)
    assert {round(torch.sigmoid(v).mean().item(), 5) for v in numbers(other, ".logit").values()} == {0.5}
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in numbers(other, ".theta").items())


# Cards and figures


@pytest.mark.parametrize("name", entries())
def test_config_and_card_agree(name, tmp_path):
    folder = entries()[name]
    config, card = zoo.info(name), (folder / "README.md").read_text(encoding="utf-8")
    spiking = "spike_rate" in config
    assert {"top5", "accumulates", "multiply_accumulates", "energy_joules"} <= set(config)
    assert ("energy_joules_ann_twin" in config) == spiking
    kind = config["data"]["class_path"].rpartition(".")[2]
    noun = "recordings" if kind == "SpokenDigits" else "images"
    assert f"| {config['top1']} % of {config['top1_images']} {noun} " in card
    assert f"| {config['parameters']:,} |" in card
    assert f"| {config['accumulates'] / 1e6:.2f} M for " in card
    levels = config["model_args"].get("levels", 1)
    assert (f"| levels | 0 to {levels}, {config.get('mean_level')} in the mean" in card) == (levels > 1)
    assert (" M in the place of the accumulates, on hardware that sends levels |" in card) == (levels > 1)
    assert config["sha256"] in card
    for field in ("energy_joules", "energy_joules_ann_twin", "energy_joules_memory"):
        assert field not in config or f"| {float(f'{config[field] * 1e6:.3g}'):g} µJ |" in card
    assert (f"verify {name}`" if kind == "Digits" else f"verify {name} --root <folder of {kind}>`") in card
    analogue_state = name.startswith("msnn_rnn") and spiking and config["model_args"].get("cell") not in SPIKING_CELLS
    assert ("(stem, patch merging, state of the recurrent cells, read-out)" in card) == analogue_state
    assert ("Its run was changed by hand." in card) == (name == "msnn_resnet12.c100_relu")
    shutil.copytree(folder, tmp_path / name)
    write_card(tmp_path / name)
    assert (tmp_path / name / "README.md").read_text(encoding="utf-8") == card


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A zoo of one's own, with a copy of the digits entry."""
    folder = tmp_path / "zoo" / DIGITS
    shutil.copytree(entries()[DIGITS], folder)
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    return folder


MEASURED = {*zoo.TOLERANCES, "top1", "top5", "logits_of_fixed_images"} - {"mean_level", "graded_products"}  # of levels


@pytest.fixture(scope="module")
def measured():
    """Figures of an entry; what verify does with them is comparison."""
    return verification.figures(zoo.info(DIGITS), zoo.load(DIGITS), zoo.test_data(DIGITS))


def change(folder, **changes):
    """Change facts of an entry, and take away those that are None."""
    config = json.loads((ROOT / "zoo" / DIGITS / "config.json").read_text())
    facts = {name: value for name, value in (config[FACTS] | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | {FACTS: facts}))


def test_figures_are_those_of_the_card(measured):
    config, (found, _) = zoo.info(DIGITS), measured
    assert {field for field in found if verification._differs(field, config[field], found)} == set()
    numbers = {k for k, v in config.items() if isinstance(v, int | float) and k != "num_classes"}
    assert numbers - {"epochs", "seed", "time_steps", "top1_ann_twin"} == MEASURED - {"logits_of_fixed_images"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in entries() if name.endswith("_tiny.digits")])
def test_verify(name):
    assert zoo.verify(name)["top1_images"] == 359


def test_verify_refuses_figures_that_are_5_percent_off_or_missing(mine, measured, monkeypatch):
    monkeypatch.setattr(verification, "figures", lambda *_: measured)
    for measures in ("load", "test_data"):
        monkeypatch.setattr(verification, measures, lambda *_, **__: None)
    assert zoo.verify(DIGITS) == measured[0]
    config = zoo.info(DIGITS)
    for field in sorted(MEASURED):
        value = config[field]
        for factor in (0.95, 1.05):
            off = [[factor * v for v in row] for row in value] if isinstance(value, list) else factor * value
            change(mine, **{field: off})
            with pytest.raises(ConfigurationError, match=f"is not what its card says: {field} "):
                zoo.verify(DIGITS)
        change(mine, **{field: None})
        with pytest.raises(ConfigurationError, match=f"{field} is .*, but the card says None|{field} differ"):
            zoo.verify(DIGITS)


class Sorted(torch.utils.data.TensorDataset):
    """A test set whose images are their own classes, in the order of class folders; also its own data module."""

    def __init__(self):
        self.targets = torch.arange(4).repeat_interleave(300)
        super().__init__(self.targets.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), self.targets)

    def test_dataloader(self):
        return torch.utils.data.DataLoader(self, 100)

    def on_after_batch_transfer(self, batch, _):
        return batch


def test_figures_see_images_of_all_classes(monkeypatch):
    seen = {}

    def calibrate(twin, images):
        seen["calibration"] = images
        return twin

    monkeypatch.setattr("lightning_msnn.models.baselines.calibrate", calibrate)
    network = timm.create_model("msnn_resnet12_tiny", in_chans=1, num_classes=4, depths=(1, 1, 1, 1)).eval()
    seen["network"] = []
    network.register_forward_pre_hook(lambda _, args: seen["network"].append(args[0]))
    config = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0]}
    found, _ = verification.figures(config, network, Sorted())
    assert found["energy_images"] == 512
    counted = torch.cat(seen["network"][12:-1])  # after the evaluation in 12 batches, and before the fixed images
    for images in (counted, seen["calibration"]):
        assert images[:, 0, 0, 0].long().bincount().tolist() == [len(images) // 4] * 4


def test_measure_mends_a_card(mine, measured, monkeypatch):
    config = zoo.info(DIGITS)
    change(mine, top1=99.0, energy_joules=1.0)
    monkeypatch.setattr("lightning_msnn.zoo.exporting.figures", lambda *_: measured)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "replace", lambda *_: sys.exit("interrupted"))
        with pytest.raises(SystemExit, match="interrupted"):
            zoo.measure(DIGITS)
    assert zoo.info(DIGITS)["top1"] == 99.0, "a file is replaced whole"
    zoo.measure(DIGITS)
    again = zoo.info(DIGITS)
    assert (again["top1"], again["command"]) == (config["top1"], config["command"])
    assert again["energy_joules"] == pytest.approx(config["energy_joules"], rel=1e-3)
    assert "98.33 % of 359 images" in (mine / "README.md").read_text(encoding="utf-8")


# The command line, and the wheel


@pytest.fixture
def run(capsys):
    """The command line of the zoo: what it prints, what it complains of, its status."""

    def call(*args):
        status = 0
        try:
            main(["zoo", *args])
        except SystemExit as stop:
            status = stop.code
        return *capsys.readouterr(), status

    return call


def test_command_line(mine, run):
    out, err, status = run("list")
    assert (err, status) == ("", 0)
    assert DIGITS in out
    listed = [line.split() for line in out.splitlines()]
    assert listed == sorted(listed, key=lambda words: (words[1], -float(words[2]))), "by data set, the best first"
    assert json.loads(run("info", DIGITS)[0])["architecture"] == "msnn_resnet12_tiny"
    (mine / "README.md").unlink()
    assert run("card", DIGITS)[2] == 0
    assert f"---\n\n# {DIGITS}\n" in (mine / "README.md").read_text(encoding="utf-8")
    table = run("table")[0].splitlines()
    assert table[0].startswith("| entry | data | parameters |")
    assert any(f"`{DIGITS}`" in line for line in table)
    out, err, status = run("verify", "msnn_resnet12_tiny_digit")
    assert (out, status) == ("", 2)
    assert err.startswith("lightning-msnn: error: unknown zoo entry 'msnn_resnet12_tiny_digit'")
    assert len(err.splitlines()) == 1


def test_results_are_those_of_the_cards(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(ROOT / "zoo"))
    assert run("table", "--out", str(tmp_path / "results.csv"))[2] == 0
    made = (tmp_path / "results.csv").read_text()
    assert made == (ROOT / "zoo" / "results.csv").read_text(), "lightning-msnn zoo table --out zoo/results.csv"
    assert made.startswith("model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,")
    (row,) = (row for row in csv.DictReader(made.splitlines()) if row["model"] == "msnn_resnet12.c100")
    assert (row["top1_err"], row["baseline_top1"], row["param_count"]) == ("34.61", "69.48", "13.95")


def test_entries_fit_into_a_wheel_of_100_mb_but_those_that_it_leaves_out(mine):
    """As a wheel packs them; the rest of the package is below 1 MB."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = {file for file in (ROOT / "zoo").rglob("*") if file.is_file()}
    left_out = {file for pattern in wheel["exclude"] for file in ROOT.glob(pattern[1:])}
    assert left_out < files
    assert sum(len(zlib.compress(file.read_bytes(), 1)) for file in files - left_out) < 99e6
    (mine / "model.safetensors").unlink()
    said = "a wheel leaves out those of .*: set LIGHTNING_MSNN_ZOO to the folder zoo of a checkout"
    with pytest.raises(ConfigurationError, match=said) as stopped:
        zoo.load(DIGITS)
    assert all(file.parent.name in str(stopped.value) for file in left_out)
