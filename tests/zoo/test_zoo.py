import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from inspect import signature

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.models import save_for_hf

import lightning_msnn
from lightning_msnn import zoo
from lightning_msnn.data import Digits
from lightning_msnn.entries import FACTS, entries, read_config, read_weights
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.models.msnn import MSNN
from lightning_msnn.models.msnn_rnn import SPIKING_CELLS
from lightning_msnn.zoo import verification
from lightning_msnn.zoo.__main__ import main as zoo_main
from lightning_msnn.zoo.card import write_card
from lightning_msnn.zoo.storing import synapses
from tests.conftest import ROOT
from tests.test_security import NETWORK, small_checkpoint

ENTRIES = list(entries())
DIGITS = "msnn_resnet12_tiny.digits"


def test_there_are_entries():
    assert DIGITS in ENTRIES


@pytest.mark.parametrize("name", ENTRIES)
def test_both_spellings_and_timm_give_the_same_network(name):
    a = zoo.load(name)
    b = lightning_msnn.zoo.load(name.replace(".", "_"))
    c = timm.create_model(name, pretrained=True).eval()
    d = timm.create_model(f"local-dir:{entries()[name]}", pretrained=True).eval()
    config = zoo.info(name)
    x = torch.randn(2, *config["input_size"])
    assert not a.training
    assert a(x).shape == (2, config["num_classes"])
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), c(x))
    assert torch.equal(a(x), d(x))
    assert "state_dict" not in c.pretrained_cfg
    assert a._model_args == b._model_args == c._model_args == d._model_args
    assert a.pretrained_cfg == c.pretrained_cfg == d.pretrained_cfg
    assert not torch.equal(zoo.load(name, pretrained=False)(x), a(x))
    assert name in timm.list_models(pretrained=True)
    assert name in zoo.list_models()


@pytest.mark.parametrize("name", ENTRIES)
def test_config_is_complete(name):
    config = zoo.info(name)
    assert len(config["class_names"]) == config["num_classes"]
    assert {"top1", "top1_images", "command", "hardware", "date", "versions", "epochs", "seed"} <= set(config)
    data = resolve_data_config(timm.create_model(name).pretrained_cfg)
    assert list(data["input_size"]) == config["input_size"]
    assert list(data["mean"]) == pytest.approx(config["mean"])


def test_digits_reach_the_accuracy_of_the_card():
    """On the digits that no training has seen."""
    data = Digits(batch_size=512, image_size=zoo.info(DIGITS)["input_size"][1])
    data.prepare_data()
    data.setup("test")
    model, config = zoo.load(DIGITS), zoo.info(DIGITS)
    hits = total = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, targets = data.on_after_batch_transfer(batch, 0)
            hits += (model(images).argmax(1) == targets).sum().item()
            total += len(targets)
    assert total == config["top1_images"]
    assert 100 * hits / total == pytest.approx(config["top1"], abs=0.05)


def test_transforms():
    preprocess = zoo.transforms(DIGITS)
    x = preprocess(Image.new("L", (16, 16), 255))
    config = zoo.info(DIGITS)
    assert x.shape == (1, 16, 16)
    assert x.mean().item() == pytest.approx((1 - config["mean"][0]) / config["std"][0], rel=1e-5)


def test_new_head_and_channels():
    model = zoo.load(DIGITS, num_classes=3, in_chans=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    trained = zoo.load(DIGITS)
    assert torch.equal(model.stages[0].blocks[0].mixer.synapse1.conv.weight,
                       trained.stages[0].blocks[0].mixer.synapse1.conv.weight)  # fmt: skip


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
    weights = read_weights(entries()[DIGITS])
    model = zoo.load(DIGITS, theta=0.3)
    assert all(torch.equal(v, weights[k]) for k, v in numbers(model, ".logit").items())
    assert {round(v.item(), 6) for v in numbers(model, ".theta").values()} == {0.3}


def test_importing_the_zoo_does_not_import_lightning():
    code = "import sys, lightning_msnn; lightning_msnn.zoo.list_models(); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A zoo of one's own, with a copy of the digits entry."""
    folder = tmp_path / "zoo" / DIGITS
    shutil.copytree(entries()[DIGITS], folder)
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    assert entries()[DIGITS] == folder
    return folder


def rehash(folder):
    """Let the entry vouch for the weights that it now has; return its ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    config[FACTS]["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    return zoo.info(folder.name)


def refused(folder, message):
    with pytest.raises(ConfigurationError, match=message):
        read_weights(folder)


def test_export(tmp_path, monkeypatch):
    import lightning.pytorch as pl

    from lightning_msnn.tasks import SpikingClassifier

    task = SpikingClassifier("msnn_resnet12_tiny", in_chans=1, network_kwargs={"theta": 0.3})
    t = pl.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, logger=False, accelerator="cpu",
                   enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
                   enable_checkpointing=False)  # fmt: skip
    t.fit(task, datamodule=Digits(batch_size=32))
    t.save_checkpoint(tmp_path / "x.ckpt")
    folder = zoo.export(tmp_path / "x.ckpt", "msnn_resnet12_tiny.mine", tmp_path / "zoo", top1=12.5)
    config = read_config(folder)
    assert config["top1"] == 12.5
    assert config["model_args"]["theta"] == 0.3
    assert config["model_args"]["windows"] == "alternate", "defaults are pinned"
    assert config["class_names"] == [str(i) for i in range(10)]
    network = timm.create_model("msnn_resnet12_tiny", num_classes=10, in_chans=1, theta=0.3).eval()
    network.to(memory_format=torch.channels_last)
    network.load_state_dict(read_weights(folder))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x), task.eval()(x))
    assert [p.name for p in (tmp_path / "zoo").iterdir()] == ["msnn_resnet12_tiny.mine"]
    with pytest.raises(ConfigurationError, match="exists"):
        zoo.export(tmp_path / "x.ckpt", "msnn_resnet12_tiny.mine", tmp_path / "zoo")
    with pytest.raises(ConfigurationError, match="is of network 'msnn_resnet12_tiny', not of 'msnn_resnet12'"):
        zoo.export(tmp_path / "x.ckpt", "msnn_resnet12.mine", tmp_path / "zoo")
    with pytest.raises(ConfigurationError, match="<architecture>.<tag>"):
        zoo.export(tmp_path / "x.ckpt", "mine", tmp_path / "zoo")

    # It can be loaded at once, though timm learns of entries when the package is imported.
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    loaded = zoo.load("msnn_resnet12_tiny_mine").to(memory_format=torch.channels_last)
    assert torch.equal(loaded(x), network(x))
    assert loaded.pretrained_cfg["tag"] == "mine"
    assert zoo.transforms("msnn_resnet12_tiny.mine")(Image.new("L", (20, 30))).shape == (1, 8, 8)
    assert torch.equal(timm.create_model("msnn_resnet12_tiny.mine", pretrained=True).eval()(x), network(x))


def test_an_entry_in_front_is_the_one_that_is_loaded(mine):
    state = load_file(mine / "model.safetensors")
    bias = state["head.fc.bias"].clone()
    state["head.fc.bias"] *= 2  # which is exact in 16 bits
    save_file(state, mine / "model.safetensors")
    with pytest.raises(ConfigurationError, match="is refused: its sha256 is"):
        zoo.load(DIGITS)
    config = rehash(mine)
    moved = zoo.load(DIGITS)(zoo.fixed_images(config)) - bias
    torch.testing.assert_close(moved, torch.tensor(config["logits_of_fixed_images"]), rtol=0, atol=1e-4)


@pytest.fixture
def run(capsys):
    """The command line of the zoo: what it prints, what it complains of, its status."""

    def call(*args):
        status = 0
        try:
            zoo_main(list(args))
        except SystemExit as stop:
            status = stop.code
        return *capsys.readouterr(), status

    return call


@pytest.mark.parametrize("name", ENTRIES)
def test_logits_of_fixed_images_are_those_of_the_card(name):
    config = zoo.info(name)
    with torch.no_grad():
        for fuse in (False, True):
            logits = zoo.load(name, fuse=fuse)(zoo.fixed_images(config))
            torch.testing.assert_close(logits, torch.tensor(config["logits_of_fixed_images"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ENTRIES)
def test_config_and_card_agree(name, tmp_path):
    folder = entries()[name]
    config, card = zoo.info(name), (folder / "README.md").read_text()
    spiking = "spike_rate" in config
    assert {"top5", "accumulates", "multiply_accumulates", "energy_joules"} <= set(config)
    assert {"spike_rate", "energy_joules_ann_twin"} & set(config) == (
        {"spike_rate", "energy_joules_ann_twin"} if spiking else set()
    )
    assert config["sha256"] in card
    speech = config["data"]["class_path"].endswith(".SpokenDigits")
    noun = "recordings" if speech else "images"
    assert f"{config['top1']} % of {config['top1_images']} {noun}" in card
    digits = config["data"]["class_path"].endswith(".Digits")
    assert f"verify {name}`" in card if digits else f"verify {name} --data <folder of " in card
    assert (folder / "energy.png").is_file()
    fed_back_spikes = config["model_args"].get("cell") in SPIKING_CELLS
    recurrent = config["architecture"].startswith("msnn_rnn") and spiking and not fed_back_spikes
    of_one = "a recording" if speech else "an image"
    assert (f"M for {of_one} (stem, patch merging, state of the recurrent cells, read-out)" in card) == recurrent
    shutil.copytree(folder, tmp_path / name)
    write_card(tmp_path / name)
    assert (tmp_path / name / "README.md").read_text() == card


def test_a_run_that_was_changed_by_hand_says_so():
    card = (entries()["msnn_resnet12.c100_relu"] / "README.md").read_text()
    assert "Its run was changed by hand." in card


def test_fused_entry_has_no_batch_norm_before_a_threshold():
    model = zoo.load(DIGITS, fuse=True)
    assert [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)] == ["norm"]


@pytest.mark.parametrize("name", [name for name in ENTRIES if ".digits" in name])
def test_verify(name):
    found = zoo.verify(name)
    assert found["top1_images"] == 359
    assert found["top1"] == pytest.approx(zoo.info(name)["top1"], abs=0.3)
    assert found["top5"] >= found["top1"]


MEASURED = {*zoo.TOLERANCES, "top1", "top5", "logits_of_fixed_images"}


@pytest.fixture(scope="module")
def measured():
    """Figures of an entry; what verify does with them is comparison."""
    return verification.figures(zoo.info(DIGITS), zoo.load(DIGITS), zoo.test_data(zoo.info(DIGITS), None, 250))


def card_with(folder, **changes):
    """Change facts of an entry, and take away those that are None."""
    config = json.loads((entries()[DIGITS] / "config.json").read_text())
    facts = {name: value for name, value in (config[FACTS] | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | {FACTS: facts}))


def test_every_number_of_a_card_is_measured():
    """But for what no test set can tell."""
    facts = json.loads((entries()[DIGITS] / "config.json").read_text())[FACTS]
    numbers = {k for k, v in facts.items() if isinstance(v, int | float | list)}
    assert numbers - {"epochs", "seed", "top1_ann_twin"} == MEASURED


@pytest.mark.parametrize("field", sorted(MEASURED))
def test_verify_refuses_a_figure_that_is_5_percent_off(mine, measured, monkeypatch, field):
    monkeypatch.setattr(verification, "figures", lambda *_: measured)
    for measures in ("load", "test_data"):
        monkeypatch.setattr(verification, measures, lambda *_, **__: None)
    assert zoo.verify(DIGITS) == measured[0]
    value = zoo.info(DIGITS)[field]
    for factor in (0.95, 1.05):
        off = [[factor * v for v in row] for row in value] if isinstance(value, list) else factor * value
        card_with(mine, **{field: off})
        with pytest.raises(ConfigurationError, match=f"is not what its card says: {field} "):
            zoo.verify(DIGITS)
    card_with(mine, **{field: None})
    with pytest.raises(ConfigurationError, match=f"{field} is .*, but the card says None|{field} are others"):
        zoo.verify(DIGITS)


def test_verify_refuses_half_a_percent_of_accuracy(mine, measured, monkeypatch):
    monkeypatch.setattr(verification, "figures", lambda *_: measured)
    card_with(mine, top1=zoo.info(DIGITS)["top1"] + 0.5)
    with pytest.raises(ConfigurationError, match="top1 is 98.33, but the card says 98.83"):
        zoo.verify(DIGITS)


def test_verify_refuses_spikes_of_a_network_that_has_none(mine, monkeypatch):
    found, record = verification.figures(zoo.info(DIGITS), zoo.load(DIGITS), zoo.test_data(zoo.info(DIGITS), None, 250))
    silent = {k: v for k, v in found.items() if k != "spike_rate" and not k.endswith("_ann_twin")}
    monkeypatch.setattr(verification, "figures", lambda *_: (silent, record))
    with pytest.raises(ConfigurationError, match="spike_rate is None, but the card says 0.3"):
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

    monkeypatch.setattr(verification, "calibrate", calibrate)
    network = timm.create_model("msnn_resnet12_tiny", in_chans=1, num_classes=4, depths=(1, 1, 1, 1)).eval()
    seen["network"] = []
    network.register_forward_pre_hook(lambda _, args: seen["network"].append(args[0]))
    config = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0]}
    found, _ = verification.figures(config, network, Sorted())
    assert found["energy_images"] == 512
    counted = torch.cat(seen["network"][12:-1])  # after the evaluation in 12 batches, and before the fixed images
    for images in (counted, seen["calibration"]):
        assert images[:, 0, 0, 0].long().bincount().tolist() == [len(images) // 4] * 4


def test_measure_mends_a_card(mine):
    config = zoo.info(DIGITS)
    content = json.loads((mine / "config.json").read_text())
    content[FACTS] |= {"top1": 99.0, "energy_joules": 1.0}
    (mine / "config.json").write_text(json.dumps(content))
    zoo.measure(DIGITS)
    measured = zoo.info(DIGITS)
    assert measured["top1"] == config["top1"]
    assert measured["energy_joules"] == pytest.approx(config["energy_joules"], rel=1e-3)
    assert measured["command"] == config["command"]
    assert "98.33 % of 359 images" in (mine / "README.md").read_text()


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
        folder = tmp_path / str(number)
        save_for_hf(network, folder, safe_serialization=True)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = torch.randn(2, 1, 16, 16)
        assert torch.equal(again(x), network(x))
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in network.arguments.items()}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in again.arguments.items()} == plain
    other = timm.create_model(f"local-dir:{tmp_path / '0'}", pretrained=True, tau=0.5)
    assert {round(torch.sigmoid(v).mean().item(), 5) for v in numbers(other, ".logit").values()} == {0.5}
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in numbers(other, ".theta").items())


def test_local_dir_checks_the_hash_too(mine, tmp_path):
    other = mine.rename(tmp_path / "under another name")
    x = torch.randn(2, 1, 16, 16)
    network = timm.create_model(f"local-dir:{other}", pretrained=True).eval()
    assert network(x).shape == (2, 10)
    state = load_file(other / "model.safetensors")
    state["head.fc.bias"] += 1
    save_file(state, other / "model.safetensors")
    with pytest.raises(ConfigurationError, match="is refused: its sha256 is"):
        timm.create_model(f"local-dir:{other}", pretrained=True)


def test_later_defaults_leave_an_entry_as_it_is(monkeypatch):
    """Every argument that decides what a network computes is in its config.json."""
    arguments = set(signature(MSNN).parameters) - {"mixer_kwargs", "drop_rate", "drop_path_rate"}
    for name in zoo.list_models("msnn*"):
        assert arguments <= zoo.info(name)["model_args"].keys()


def test_command_line(mine, run):
    out, err, status = run("list")
    assert (err, status) == ("", 0)
    assert DIGITS in out
    assert "msnn_vit12" in run("list", "--all")[0].splitlines()
    assert json.loads(run("info", DIGITS)[0])["architecture"] == "msnn_resnet12_tiny"
    (mine / "README.md").unlink()
    assert run("card", DIGITS)[2] == 0
    assert f"---\n\n# {DIGITS}\n" in (mine / "README.md").read_text()
    table = run("table")[0].splitlines()
    assert table[0].startswith("| entry | test top-1")
    assert any(f"`{DIGITS}`" in line for line in table)
    out, err, status = run("verify", "msnn_resnet12_tiny_digit")
    assert (out, status) == ("", 2)
    assert err.startswith("lightning-msnn: error: unknown zoo entry 'msnn_resnet12_tiny_digit'")
    assert len(err.splitlines()) == 1


TRAIN_ON = """
import json, sys
import lightning.pytorch as pl, timm, torch
from safetensors.torch import load_file
from lightning_msnn import zoo
from lightning_msnn.data import Digits
from lightning_msnn.entries import read_config
from lightning_msnn.tasks import SpikingClassifier
task = SpikingClassifier("msnn_resnet12_tiny.digits", in_chans=1, pretrained=True, network_kwargs={"theta": 0.3})
pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu", logger=False,
           enable_progress_bar=False, default_root_dir=sys.argv[1]).fit(task, datamodule=Digits(batch_size=32))
task.trainer.save_checkpoint(sys.argv[1] + "/x.ckpt")
folder = zoo.export(sys.argv[1] + "/x.ckpt", "msnn_resnet12_tiny.mine", sys.argv[1] + "/zoo")
config = read_config(folder)
assert config["init_from"] == "msnn_resnet12_tiny.digits"
network = timm.create_model("msnn_resnet12_tiny", **config["model_args"]).eval()
network.load_state_dict(load_file(folder / "model.safetensors"))
images = torch.randn(2, 1, 16, 16)
trained = task.network.eval().to(memory_format=torch.contiguous_format)  # the same kernels, the same bits
assert torch.equal(network(images), trained(images))
"""


def test_export_of_what_was_trained_on_from_an_entry(tmp_path, mine):
    """Also where that entry was not made by the defaults. timm learns of entries on import: a process of its own."""
    config = json.loads((mine / "config.json").read_text())
    config["model_args"]["projection"] = "tanh"
    (mine / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", TRAIN_ON, str(tmp_path)], check=True, timeout=300)
    made = read_config(tmp_path / "zoo" / "msnn_resnet12_tiny.mine")["model_args"]
    assert (made["projection"], made["theta"], made["windows"]) == ("tanh", 0.3, "alternate")


def test_an_entry_says_all_arguments_and_no_folder_of_the_machine(tmp_path):
    content = small_checkpoint() | {"started_from": "/home/somebody/runs/twin/best.ckpt"}
    content["hyper_parameters"] |= {"teacher": "/home/somebody/teacher.ckpt"}
    torch.save(content, tmp_path / "x.ckpt")
    folder = zoo.export(tmp_path / "x.ckpt", f"{NETWORK}.mine", tmp_path / "zoo")
    config = read_config(folder)
    assert config["init_from"] == config["teacher"] == "a checkpoint"
    card = (folder / "README.md").read_text()
    assert "| started from | a checkpoint |" in card
    assert "| learnt also from | a checkpoint |" in card
    assert "somebody" not in (folder / "config.json").read_text() + card
    assert (
        set(signature(MSNN).parameters) - {"mixer_kwargs", "drop_rate", "drop_path_rate"} <= config["model_args"].keys()
    )


def test_the_entry_that_is_named_is_found_before_others(tmp_path, monkeypatch):
    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    for name in ("v1_0", "v1.0"):
        zoo.export(tmp_path / "x.ckpt", f"{NETWORK}.{name}", tmp_path / "zoo")
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    for name in ("v1_0", "v1.0"):
        assert zoo.info(f"{NETWORK}.{name}")["tag"] == name
    several = f"{NETWORK}.v1.0, {NETWORK}.v1_0"
    with pytest.raises(ConfigurationError, match=f"several entries '{NETWORK}_v1_0': give one of {several}"):
        zoo.info(f"{NETWORK}_v1_0")


@pytest.mark.parametrize("tag", ["a/b", "/../../x", "my tag"])
def test_a_tag_that_is_no_name_is_refused(tmp_path, tag):
    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=f"the tag of an entry must be of letters.*, not '{tag}'"):
        zoo.export(tmp_path / "x.ckpt", f"{NETWORK}.{tag}", tmp_path / "zoo")
    assert os.listdir(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("folder", ["x.ckpt", "x.ckpt/sub"])
def test_an_export_needs_a_folder(tmp_path, folder):
    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=f"cannot write to the folder '.*{folder}'"):
        zoo.export(tmp_path / "x.ckpt", f"{NETWORK}.x", tmp_path / folder)


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    monkeypatch.setattr("lightning_msnn.zoo.__main__.measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        zoo_main(["export", str(tmp_path / "x.ckpt"), f"{NETWORK}.x", "--folder", str(tmp_path / "zoo")])
    assert os.listdir(tmp_path / "zoo") == []


def test_an_entry_that_draws_its_spikes_is_measured_alike(tmp_path):
    images = torch.rand(20, 1, 16, 16)
    data = Digits()
    network = timm.create_model("msnn_vit12_tiny", num_classes=10, in_chans=1, preset="paper").eval()
    with torch.no_grad():
        assert not torch.equal(network(images), network(images))
    config = zoo.info(DIGITS)
    data.prepare_data()
    data.setup("test")
    first, second = (verification.figures(config, network, data)[0] for _ in range(2))
    for field in ("top1", "top5", "logits_of_fixed_images"):
        assert first[field] == second[field]


def test_export_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Any tag, a card of what the run knows, and figures of the weights that are in the file."""
    import lightning.pytorch as pl

    from lightning_msnn.tasks import SpikingClassifier

    kwargs = {"preset": "default", "windows": "grid", "depths": [1, 1, 1, 1]}
    task = SpikingClassifier("msnn_resnet12_tiny", in_chans=1, network_kwargs=kwargs, lr=0.003)
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, logger=False, accelerator="cpu",
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
                         enable_checkpointing=False)  # fmt: skip
    trainer.fit(task, datamodule=Digits(batch_size=32))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "fields.json").write_text('{"command": "fit", "hardware": "a CPU"}')
    name = "msnn_resnet12_tiny.my-own_tag.2"
    arguments = ["export", str(tmp_path / "x.ckpt"), name, "--folder"]
    zoo_main([*arguments, str(tmp_path / "z"), "--fields", str(tmp_path / "fields.json")])
    out = capsys.readouterr().out
    config, card = read_config(tmp_path / "z" / name), (tmp_path / "z" / name / "README.md").read_text()
    assert out.startswith(f"{tmp_path / 'z' / name} made (float32 weights): top-1")
    assert config["data"] == {"class_path": "lightning_msnn.data.Digits"}
    assert config["top1_images"] == 359
    assert config["model_args"]["windows"] == "grid"
    assert config["energy_joules"] < config["energy_joules_ann_twin"]
    assert (tmp_path / "z" / name / "energy.png").stat().st_size > 1000
    assert (config["epochs"], config["steps"]) == (1, 2)
    assert (config["settings"]["lr"], config["settings"]["batch_size"]) == (0.003, 32)
    assert "init_from" not in config
    assert "| recipe | weights after 1 epoch and 2 steps, seed" in card
    assert "lr 0.003" in card
    assert "| made by | `fit`" in card
    assert "None" not in card
    assert "started from" not in card
    whole = load_file(tmp_path / "z" / name / "model.safetensors")

    for field in ("dtype", "sha256"):
        (tmp_path / "wrong.json").write_text(json.dumps({field: "float16"}))
        with pytest.raises(SystemExit, match="2"):
            zoo_main([*arguments, str(tmp_path / "w"), "--fields", str(tmp_path / "wrong.json")])
        assert f"{field}" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()

    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "h"))
    zoo_main([*arguments, str(tmp_path / "h"), "--dtype", "float16"])
    half = load_file(tmp_path / "h" / name / "model.safetensors")
    assert {v.dtype for v in half.values()} == {torch.float16, torch.int64}
    assert all(torch.equal(half[k], whole[k].to(half[k].dtype)) for k in whole)
    assert any(not torch.equal(half[k].float(), whole[k].float()) for k in whole)
    assert "(float16 weights)" in capsys.readouterr().out
    assert "| weights | float16, sha256" in (tmp_path / "h" / name / "README.md").read_text()
    loaded = zoo.load(name)
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    zoo.verify(name)

    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "i"))
    zoo_main([*arguments, str(tmp_path / "i"), "--dtype", "int8"])
    eighth = load_file(tmp_path / "i" / name / "model.safetensors")
    named = synapses(loaded)
    assert {k for k, v in eighth.items() if v.dtype == torch.int8} == named
    assert "| weights | int8, sha256" in (tmp_path / "i" / name / "README.md").read_text()
    for key, value in zoo.load(name).state_dict().items():
        assert value.dtype == whole[key].dtype
        rows = whole[key].flatten(1) if key in named else whole[key]
        step = rows.abs().amax(1).view(-1, *[1] * (value.dim() - 1)) / 127 if key in named else 2**-9 * rows.abs()
        assert ((value - whole[key]).abs() <= 0.5 * step + 1e-7).all(), "the nearest integer, or float16"
    integers = {k: v for k, v in zoo.load(name, integer=True).state_dict().items() if v.dtype == torch.int8}
    assert len(integers) == len(named)
    for key, value in integers.items():  # those of the file; a norm that is folded in may turn signs
        of_file = eighth[key] if key in eighth else eighth[key.replace(".weight", ".conv.weight")]
        assert torch.equal(value.abs(), of_file.abs())
    zoo.verify(name)
    file, other = tmp_path / "i" / name / "model.safetensors", zoo.load(name)
    other.apply(lambda module: [torch.nn.init.zeros_(p) for p in module.parameters()])
    timm.models.load_checkpoint(other, str(file), strict=False)
    kept = zoo.load(name).state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in other.state_dict().items())
    with pytest.raises(ConfigurationError, match="has 8 bits, and a finite scale above 0 is needed"):
        other.load_state_dict({key: value for key, value in eighth.items() if key in kept})

    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["preprocessing"]["data"] = "CIFAR100"
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(SystemExit, match="2"):
        zoo_main([*arguments, str(tmp_path / "n")])
    assert "root is not given: CIFAR100 needs a folder" in capsys.readouterr().err
    assert list((tmp_path / "n").iterdir()) == [], "what cannot be measured is not left behind"
    content["state_dict"]["network.stem.conv.weight"][0, 0, 0, 0] = 1e6
    content["preprocessing"]["data"] = "my_package.MyData"
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match="stem.conv.weight of .* has values beyond float16"):
        zoo.export(tmp_path / "x.ckpt", name, tmp_path / "n", dtype="float16")
    content["state_dict"][f"network.{min(named)}"].view(-1)[0] = torch.finfo(torch.float32).max
    torch.save(content, tmp_path / "y.ckpt")
    with pytest.raises(ConfigurationError, match=f"{min(named)} of .* has values beyond 8 bits"):
        zoo.export(tmp_path / "y.ckpt", name, tmp_path / "n", dtype="int8")
    # Data of one's own is measured by the data module itself: a file does not say what is imported.
    folder = zoo.export(tmp_path / "x.ckpt", name, tmp_path / "n")
    with pytest.raises(ConfigurationError, match="is my_package.MyData, which is not one of lightning_msnn.data"):
        zoo.measure(folder)
    assert zoo.measure(folder, Digits(batch_size=250))["top1_images"] == 359
    with pytest.raises(ConfigurationError, match=r"Digits has mean \[0.3053\], but the entry has \[0.5\]"):
        zoo.test_data(read_config(folder) | {"mean": [0.5]}, Digits(), 250)


def test_all_entries_fit_into_a_wheel_of_100_mb():
    """As a wheel packs them; the rest of the package is below 1 MB."""
    packed = sum(len(zlib.compress(file.read_bytes())) for file in (ROOT / "zoo").rglob("*") if file.is_file())
    assert packed < 99e6
