"""Files made to do harm: each is refused, and a canary proves that nothing of theirs ran."""

import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_msnn import zoo
from lightning_msnn.callbacks import BestCheckpoint
from lightning_msnn.cli import main
from lightning_msnn.entries import CONFIG_FILE, WEIGHTS_FILE
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.runs import LastCheckpoint, network_of, read_checkpoint

QUICK = ["--config", str(Path(__file__).parents[1] / "configs" / "quickstart.yaml"), "--trainer.accelerator", "cpu"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that only a payload would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    return tmp_path / "canary"


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


def test_the_payload_works(canary: Path) -> None:
    """Else the tests below could not fail."""
    torch.save({"state_dict": {}, "x": Payload(canary)}, canary.with_name("x"))
    torch.load(canary.with_name("x"), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_pickle_with_a_payload(canary: Path, zipped: bool, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"x": Payload(canary)}}
    torch.save(content, "bad.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as stop:
        main([verb, *QUICK, "--ckpt_path", "bad.ckpt"])
    assert stop.value.code == 2
    assert "bad.ckpt' is not a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert not canary.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system"])
def test_yaml_with_python_tags(canary: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(f"model: {tag.format(canary)}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "--config", "bad.yaml"])
    assert stop.value.code == 2
    assert "cannot read the configuration 'bad.yaml'" in capsys.readouterr().err
    assert not canary.exists()


def test_a_checkpoint_imports_nothing(canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even a module that Python would find."""
    Path("theirs.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    sys.path.insert(0, "")
    try:
        torch.save({"state_dict": {}, "cli": {"model": "theirs.Model", "data": "theirs.Data"}}, "x.ckpt")
        with pytest.raises(SystemExit):
            main(["test", "--ckpt_path", "x.ckpt"])
    finally:
        sys.path.remove("")
    assert "x.ckpt has theirs.Model: give --model theirs.Model" in capsys.readouterr().err
    assert not canary.exists()


# A file does not say what is fetched from where.

NETWORK = "msnn_resnet12_tiny"
SHAPE: dict[str, Any] = {"num_classes": 3, "in_chans": 1, "depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4]}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No connection can be opened; those that were tried."""
    tried: list[str] = []

    def refuse(*args: Any, **_: Any) -> None:
        tried.append(str(args[1:] or args))
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tried


def small_checkpoint() -> dict[str, Any]:
    """What a checkpoint of a small network holds."""
    network = timm.create_model(NETWORK, **SHAPE)
    return {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "hyper_parameters": {"network": NETWORK, "num_classes": 3, "in_chans": 1, "network_kwargs": dict(SHAPE)},
        "network_arguments": dict(network.arguments),
        "preprocessing": {"data": "Digits", "image_size": 8, "mean": [0.5], "std": [0.5]},
        "class_names": ["a", "b", "c"],
        "epoch": 0,
        "global_step": 1,
    }


@pytest.mark.parametrize("verb", ["predict", "test", "report"])
def test_checkpoint_that_names_what_to_fetch(
    tmp_path: Path, verb: str, offline: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's builder would fetch any URL to any folder."""
    monkeypatch.chdir(tmp_path)
    content, away = small_checkpoint(), tmp_path / "anywhere"
    fetched = {"pretrained_cfg": {"url": "https://example.org/x.pth"}, "cache_dir": str(away)}
    content["hyper_parameters"] |= {"pretrained": True, "network_kwargs": fetched}
    torch.save(content, tmp_path / "x.ckpt")
    arguments = [verb, *QUICK, "--ckpt_path", str(tmp_path / "x.ckpt"), "--data.folder", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "x.ckpt")]) if verb == "report" else main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "x.ckpt' is refused: it gives the network cache_dir, pretrained_cfg, and a file may give only" in said
    assert not offline
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_weights_of_a_checkpoint_are_its_own(tmp_path: Path, offline: list[str]) -> None:
    content = small_checkpoint()
    content["hyper_parameters"]["pretrained"] = True
    torch.save(content, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read["hyper_parameters"]["pretrained"] is False
    network = network_of(read, tmp_path / "x.ckpt")
    assert torch.equal(network.state_dict()["head.fc.weight"], content["state_dict"]["network.head.fc.weight"])
    assert not offline


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    content = small_checkpoint()
    content["state_dict"]["network.head.fc.weight"][0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"head\.fc\.weight of a checkpoint has values that are not finite"):
        network_of(content, "x.ckpt")
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=r"head\.fc\.weight of a checkpoint has values that are not finite"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.fixture
def small_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small entry in a zoo of its own, the only folder that is written."""
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(small_checkpoint(), tmp_path / "x.ckpt")
    return zoo.export(tmp_path / "x.ckpt", f"{NETWORK}.small", tmp_path / "zoo")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pretrained_cfg_overlay", {"file": None, "state_dict": None, "url": "https://example.org/x.pth"}),
        ("pretrained_cfg", {"url": "https://example.org/x.pth"}),
        ("cache_dir", "/anywhere"),
        ("checkpoint_path", "x.pth"),
        ("features_only", True),
        ("mixer", "os.system"),
    ],
)
def test_entry_that_gets_past_its_hash(small_entry: Path, argument: str, value: Any, offline: list[str]) -> None:
    content = json.loads((small_entry / CONFIG_FILE).read_text())
    content["model_args"][argument] = value
    (small_entry / CONFIG_FILE).write_text(json.dumps(content))
    for pretrained in (True, False):
        with pytest.raises(ConfigurationError, match=rf"config.json is refused: it gives the network {argument}, and"):
            zoo.load(small_entry.name, pretrained)
    assert not offline


def test_an_entry_without_weights_fetches_none(small_entry: Path, offline: list[str]) -> None:
    content = json.loads((small_entry / CONFIG_FILE).read_text())
    content["pretrained_cfg"] |= {"url": "https://example.org/x.pth", "hf_hub_id": "theirs/x"}
    (small_entry / CONFIG_FILE).write_text(json.dumps(content))
    (small_entry / WEIGHTS_FILE).unlink()
    for load in (zoo.load, lambda _: timm.create_model(f"local-dir:{small_entry}", pretrained=True)):
        with pytest.raises(ConfigurationError, match="weights of .* cannot be read at .*: No such file"):
            load(small_entry.name)
    assert not offline


@pytest.mark.parametrize("argument", ["pretrained_cfg_overlay", "checkpoint_path", "cache_dir"])
def test_load_takes_weights_from_nowhere_else(small_entry: Path, argument: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument} is not an argument of"):
        zoo.load(small_entry.name, **{argument: "x"})


def test_entry_of_a_network_that_is_not_ours(small_entry: Path) -> None:
    """timm would read its weights, whatever their hash."""
    other = small_entry.rename(small_entry.with_name("resnet18.small"))
    content = json.loads((other / CONFIG_FILE).read_text())
    (other / CONFIG_FILE).write_text(json.dumps(content | {"architecture": "resnet18"}))
    with pytest.raises(ConfigurationError, match="resnet18.small is of resnet18, which is refused"):
        zoo.load("resnet18.small")


@pytest.mark.parametrize("kind", [BestCheckpoint, ModelCheckpoint])
def test_checkpoint_that_names_a_file_to_remove(tmp_path: Path, kind: type[ModelCheckpoint]) -> None:
    """Lightning removes what was the best once there is a better one."""
    callback, folder = kind(), tmp_path / "checkpoints"
    callback.dirpath, own = str(folder), str(folder / "best.ckpt")

    def kept(**changes: Any) -> bool:
        """Whether a state reaches the callback."""
        state = {"dirpath": str(folder), "best_model_path": own, "last_model_path": "", "best_k_models": {own: 0.5}}
        loops = {"epoch_progress": {"current": {"processed": 1, "started": 2}}, "epoch_loop.batch_progress": {}}
        content = {"callbacks": {callback.state_key: state | changes}, "loops": {"fit_loop": loops}}
        LastCheckpoint().on_load_checkpoint(
            MagicMock(checkpoint_callbacks=[callback], callbacks=[], overfit_batches=0, max_steps=-1), None, content
        )
        return callback.state_key in content["callbacks"]

    assert kept()
    for path in (f"{folder}/../other.ckpt", f"{folder}/..", "/etc/passwd", f"local://{own}", f"{folder}/a/b", "x.ckpt"):
        for field in ("best_model_path", "kth_best_model_path", "last_model_path"):
            assert not kept(**{field: path})
        assert not kept(best_k_models={own: 0.5, path: 0.4})


def test_report_fetches_no_weights(tmp_path: Path, offline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a network of timm's own that a checkpoint says to be pretrained."""
    network = timm.create_model("resnet18", num_classes=10, in_chans=1)
    content = small_checkpoint()
    content.pop("network_arguments", None)
    content["state_dict"] = {f"network.{name}": value for name, value in network.state_dict().items()}
    content["hyper_parameters"] = {"network": "resnet18", "num_classes": 10, "in_chans": 1, "pretrained": True}
    content["class_names"] = [str(digit) for digit in range(10)]
    content["pytorch-lightning_version"] = "2.6.6"
    torch.save(content, tmp_path / "x.ckpt")
    main(["report", str(tmp_path / "x.ckpt"), "--samples", "4", "--out", str(tmp_path / "page.html")])
    assert not offline
