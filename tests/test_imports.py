"""Files of the user's own, as a command line imports them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_msnn.cli import main
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.functional import PROJECTIONS
from lightning_msnn.imports import import_files
from tests.conftest import ROOT

LARGER = """
import torch
from lightning_msnn.functional import PROJECTIONS
PROJECTIONS["larger"] = lambda a, b, theta: torch.maximum(a, b)
with open({log!r}, "a") as log:
    log.write("imported\\n")
"""
SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "1", "--run.test", "false"),
    *("--model.schedule", "constant", "--run.monitors", "false", "--run.name", "mine"),
]
NETWORK = ["--model.network_kwargs", "{projection: larger}"]


@pytest.fixture
def here(tmp_path, monkeypatch, own_definitions):
    """A folder with ``larger.py``, which writes a line into ``log`` whenever it runs."""
    (tmp_path / "larger.py").write_text(LARGER.format(log=str(tmp_path / "log")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    return tmp_path


def forget(here):
    """Make this process one that has imported nothing."""
    del sys.modules["larger"], PROJECTIONS["larger"]
    sys.path.remove(str(here))
    (here / "log").unlink()


def error_of(capsys, *args):
    """Return the one line that the command line refuses arguments with."""
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lightning-msnn: error: ")]
    return line


@pytest.fixture
def run(here):
    """Folder of a run that needs the file, in a process that has forgotten it."""
    main(["fit", "--run.imports", "larger.py", *NETWORK, *SHORT])
    forget(here)
    return here / "runs" / "mine" / "version_0"


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_the_saved_configuration_repeats_the_run_from_another_folder(here, run, monkeypatch):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["run"]["imports"] == [str(here / "larger.py")]
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    main(["fit", "--config", str(run / "config.yaml")])
    again = Path("runs/mine/version_0")
    assert yaml.safe_load((again / "config.yaml").read_text()) == saved
    first, second = weights(run), weights(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_checkpoint_says_what_it_misses(here, run, capsys, verb):
    path = "last" if verb == "fit" else str(run / "checkpoints" / "last.ckpt")
    given = [verb, "--ckpt_path", path, *([*SHORT, *NETWORK] if verb == "fit" else ["--trainer.accelerator", "cpu"])]
    message = error_of(capsys, *given)
    assert "unknown projection 'larger'" in message
    assert message.endswith("a file of yours that defines projection 'larger' must be imported with --run.imports")
    assert not (here / "log").exists(), "nothing ran"
    more = ["--trainer.max_steps", "3"] if verb == "fit" else ["--trainer.limit_test_batches", "1"]
    main([*given, *more, "--run.imports", "larger.py"])
    assert (here / "log").read_text() == "imported\n"


def test_programs_beside_say_it_too(here, run, capsys):
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    for args in (
        ("zoo", "export", checkpoint, "msnn_resnet12_tiny.mine", "--out", "entries"),
        ("report", checkpoint, "--out", "page.html"),
    ):
        message = error_of(capsys, *args)
        assert message.endswith("a file of yours that defines projection 'larger' must be imported with --imports")


def test_classes_of_a_checkpoint(here, capsys):
    """Its classes are named, not imported: the option is, on the command line."""
    (here / "own_classes.py").write_text(
        "from lightning_msnn.data import Digits\nfrom lightning_msnn.tasks import SpikingClassifier\n"
        "class Mine(SpikingClassifier):\n    pass\nclass Theirs(Digits):\n    pass\n"
    )
    classes = ["--model", "own_classes.Mine", "--data", "own_classes.Theirs"]
    assert error_of(capsys, "fit", *classes, *SHORT).endswith("must be imported with --run.imports")
    main(["fit", "--run.imports", "own_classes.py", *classes, *SHORT])
    del sys.modules["own_classes"]
    sys.path.remove(str(here))
    test = ["test", "--ckpt_path", "runs/mine/version_0/checkpoints/last.ckpt", "--trainer.accelerator", "cpu"]
    message = error_of(capsys, *test)
    assert (
        "has own_classes.Mine: give --model own_classes.Mine, and import the file that defines it with --run.imports"
        in message
    )
    message = error_of(capsys, *test, "--model", "own_classes.Mine")
    assert "has own_classes.Theirs: give --data own_classes.Theirs, and import the file that defines it with" in message
    once = ["--trainer.limit_test_batches", "1", "--run.monitors", "false"]
    main([*test, *classes, "--run.imports", "own_classes.py", *once])


def test_each_file_runs_once(here):
    (here / "link.py").symlink_to(here / "larger.py")
    full = str(here / "larger.py")
    assert import_files(["larger.py", "./larger.py", full, "link.py", "json"]) == [full] * 4 + ["json"]
    assert import_files("larger.py") == [full]
    assert (here / "log").read_text() == "imported\n"


TABLE = "from lightning_msnn.functional import PROJECTIONS, WINDOWS\n"
BROKEN = {
    "nothing.py": (None, r"cannot import '.*/nothing\.py': there is no such file"),
    "syntax.py": ("x = (\n", r"cannot import 'syntax\.py': SyntaxError: .*\(syntax\.py, line 1\)"),
    "json.py": ("", r"cannot import '.*/json\.py': there is another module 'json' \(.*\), so rename the file"),
    "taken.py": (f"{TABLE}PROJECTIONS['sine'] = max\n", r"'taken\.py' changes projection 'sine', which there is"),
    "gone.py": (f"{TABLE}del WINDOWS['grid']\n", r"'gone\.py' changes kind of windows 'grid', which there is already"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_imported(here, name):
    text, message = BROKEN[name]
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        import_files(name)


@pytest.mark.slow
def test_processes_of_a_training_import_it_too(here):
    """Two processes of DDP, of which the second is started by the first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args = ["fit", "--run.imports", "larger.py", *NETWORK, *SHORT]
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.limit_train_batches", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_msnn", *args, *ddp],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (here / "log").read_text() == "imported\n" * 2
