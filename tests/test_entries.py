"""Entries on disk: found by the names of their folders, read when they are asked for, refused if they are damaged."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch

from lightning_msnn import zoo
from lightning_msnn.entries import FACTS, dequantised, entries, find, read_config, read_weights, warm_start
from lightning_msnn.errors import ConfigurationError

DIGITS = "msnn_resnet12_tiny.digits"

OPENED = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import timm
import lightning_msnn
names = timm.list_pretrained("msnn*")
zoo = [name for name in opened if name.endswith(("/config.json", "/model.safetensors"))]
assert not zoo, zoo
timm.get_pretrained_cfg("msnn_resnet12_tiny.digits")
assert len([name for name in opened if name.endswith("/config.json")]) == 1
assert "msnn_resnet12_tiny.digits" in names and "msnn_resnet12" not in names, names
"""


def test_importing_opens_no_file_of_the_zoo():
    """Nor does listing: a config.json is read once its entry is asked for."""
    subprocess.run([sys.executable, "-c", OPENED], check=True, timeout=300)


def test_timm_knows_what_an_entry_says():
    for name, folder in entries().items():
        said, cfg = read_config(folder), timm.get_pretrained_cfg(name)
        assert (cfg.architecture, cfg.tag) == (said["architecture"], said["tag"])
        assert cfg.label_names == tuple(said["class_names"])
        assert cfg.input_size == tuple(said["input_size"])
        assert find(name) == find(name.replace(".", "_")) == folder


@pytest.mark.parametrize("name", ["msnn_resnet12_tiny.digit", "", None, "resnet18", "../digits"])
def test_unknown_entry(name):
    with pytest.raises(ConfigurationError, match="unknown zoo entry.*zoo list names all"):
        find(name)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A copy of an entry in a zoo of one's own, which is looked through first."""
    shutil.copytree(entries()[DIGITS], tmp_path / DIGITS)
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path))
    assert find(DIGITS) == tmp_path / DIGITS
    return tmp_path / DIGITS


def change(folder, **fields):
    """Set fields of a ``config.json``, each in the part that has it; a hash is that of the file of weights."""
    content = json.loads((folder / "config.json").read_text())
    parts = (content, content["pretrained_cfg"], content[FACTS])
    for field, value in fields.items():
        next((part for part in parts if field in part), content[FACTS])[field] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", None, "no field 'architecture' of type str"),
        ("input_size", [16, 16], "input_size of length 2, and 3 is needed"),
        ("num_classes", 10**12, "label_names of length 10, and 1000000000000 is needed"),
        ("tag", "../../x", "letters, digits and '_-.' are allowed"),
    ],
)
def test_a_config_that_lacks_what_is_needed(mine, field, value, message):
    change(mine, **{field: value})
    with pytest.raises(ConfigurationError, match=message):
        zoo.load(DIGITS)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"{}", b"\xff", b" " * 2**25])
def test_a_config_that_is_none(mine, content):
    (mine / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        zoo.load(DIGITS)


def test_weights_of_another_hash_are_refused(mine):
    file = mine / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="model.safetensors is refused: its sha256 is"):
        read_weights(mine)
    file.unlink()
    with pytest.raises(ConfigurationError, match=f"weights of {DIGITS} cannot be read"):
        read_weights(mine)


def test_a_pickle_is_no_file_of_weights(mine):
    torch.save({"x": torch.zeros(1)}, mine / "model.safetensors")
    change(mine, sha256=hashlib.sha256((mine / "model.safetensors").read_bytes()).hexdigest())
    with pytest.raises(ConfigurationError, match="is not a safetensors file"):
        read_weights(mine)


def test_8_bits_are_integers_times_the_scale_of_their_channel():
    weight = torch.randint(-127, 128, (3, 2, 2, 2), dtype=torch.int8)
    scale = torch.tensor([0.5, 1.0, 2.0])
    made = dequantised({"w": weight, "w_scale": scale, "b": torch.ones(3).half(), "n": torch.tensor(3)}, "x")
    assert torch.equal(made["w"], torch.stack([w * s for w, s in zip(weight.float(), scale, strict=True)]))
    assert (made["b"].dtype, made["n"].dtype, "w_scale" in made) == (torch.float32, torch.int64, False)
    for wrong in ({"w": weight}, {"w": weight, "w_scale": scale[:2]}):
        with pytest.raises(ConfigurationError, match="x is refused: w has 8 bits"):
            dequantised(wrong, "x")


def test_warm_start_takes_what_fits_by_name_and_shape():
    model = timm.create_model("msnn_rnn12_tiny", widths=(16, 24, 32, 32), in_chans=1, num_classes=7, theta=0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = read_weights(entries()[DIGITS])
    taken, after = warm_start(model, weights, DIGITS), model.state_dict()
    fits = {k for k, v in after.items() if k in weights and weights[k].shape == v.shape and not k.endswith(".theta")}
    assert {"stem.conv.weight", "stages.3.blocks.1.mlp.fc1.norm.running_mean"} <= fits
    assert not {"head.fc.weight", "stages.0.blocks.0.mixer.recurrence.weight_ih_l0"} & fits
    assert all(torch.equal(v, weights[k] if k in fits else before[k]) for k, v in after.items())
    assert taken == sum(p.numel() for k, p in model.named_parameters() if k in fits)


def test_warm_start_leaves_numbers_that_are_not_learnt():
    """A theta and a tau of the network's own arguments, whatever those of the weights are."""
    made = {"widths": (4, 4, 4, 4), "learn_tau": False}
    source = timm.create_model("msnn_resnet12_tiny", theta=0.7, tau=0.6, **made)
    model = timm.create_model("msnn_resnet12_tiny", theta=0.3, tau=0.2, **made)
    warm_start(model, source.state_dict(), "another")
    assert torch.equal(model.stem.conv.weight, source.stem.conv.weight)
    for ending, value in ((".theta", 0.3), (".tau", 0.2)):
        kept = [v for k, v in model.state_dict().items() if k.endswith(ending)]
        assert kept
        assert all(v.item() == pytest.approx(value) for v in kept)


def test_warm_start_from_what_does_not_fit():
    with pytest.raises(ConfigurationError, match=f"no parameter of {DIGITS} fits Linear by name and shape"):
        warm_start(torch.nn.Linear(2, 2), read_weights(entries()[DIGITS]), DIGITS)
