"""Files with changed keys and values: refused by a ConfigurationError or taken, and nothing else happens.

What is opened for writing outside of the test's folder, each connection, and each attempt that takes too long is a
failure. The default number of attempts through the command line is small; ``LIGHTNING_MSNN_FUZZ=600`` makes it 600.
"""

import contextlib
import copy
import json
import os
import random
import resource
import signal
import socket
import string
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_msnn import zoo
from lightning_msnn.cli import main
from lightning_msnn.entries import CONFIG_FILE, FACTS, entries
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import native
from lightning_msnn.report import main as report
from lightning_msnn.runs import network_of, read_checkpoint
from lightning_msnn.zoo.card import table, write_card
from tests.test_security import NETWORK, small_checkpoint
from tests.test_yaml import LAUGHS, NESTED

pytestmark = pytest.mark.filterwarnings("ignore")
THROUGH_THE_COMMAND_LINE = int(os.environ.get("LIGHTNING_MSNN_FUZZ", "12"))
SAYS = "lightning-msnn: error: "
SECONDS = 60  # of an attempt; most take a hundredth of that

HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 10**12, 10**400, 1e308, -0.0, float("nan"), float("inf")),
    *("", "x", "\x00", "../../x", "/etc/passwd", "os.system", "https://example.org/x", "msnn_vit12_tiny", "resnet18"),
    *([], [[]], [0], [10**12], ["x"] * 4, {}, {"x": 1}, {"url": "https://example.org/x"}, {0: 1}),
    *("hf-hub:x/y", "local-dir:/etc", {"class_path": "os.system", "init_args": {"command": "touch x"}}),
]
NAMES = [
    *("pretrained_cfg_overlay", "cache_dir", "url", "file", "state_dict", "checkpoint_path", "features_only", "x", ""),
    *("pretrained", "hf_hub_id", "custom_load", "kwargs_filter", "pretrained_filter_fn", "model_cfg", "theta", "self"),
    *("class_path", "init_args", "dict_kwargs", "root", "config"),
]


# What must not happen


class Opened:
    """Paths that were opened for writing, made, renamed or removed while it is on; Python has no way to take it off."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.paths is None:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            path, mode, flags = args
            if set(mode or "") & set("wax+") or (not mode and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                self.paths.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"):
            self.paths += [os.fsdecode(path) for path in args[:2] if isinstance(path, str | bytes)]


OPENED = Opened()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which nothing is done but what is seen: no connection, no write elsewhere."""
    tried: list[str] = []

    def refuse(*args: Any, **_: Any) -> None:
        tried.append(str(args))
        raise OSError("no network")

    for module, name in (
        (socket.socket, "connect"),
        (urllib.request, "urlopen"),
        (torch.hub, "urlopen"),
        (torch.hub, "download_url_to_file"),
        (torch.hub, "load_state_dict_from_url"),
        (huggingface_hub, "hf_hub_download"),
        (huggingface_hub, "snapshot_download"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(sys, "argv", ["lightning-msnn"])
    folder = tmp_path / "a" / "b" / "here"  # "../../x" of it is still the test's
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native.available()  # which compiles into the user's cache, once on a machine
    monkeypatch.setattr(OPENED, "paths", opened := [])
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**32
    resource.setrlimit(
        resource.RLIMIT_AS, (most if before[1] == resource.RLIM_INFINITY else min(most, before[1]), before[1])
    )
    yield folder
    resource.setrlimit(resource.RLIMIT_AS, before)
    OPENED.paths = None
    outside = {str(path) for path in map(Path, opened) if not path.absolute().is_relative_to(tmp_path)}
    assert {path for path in outside if "__pycache__" not in path} <= {"/dev/null"}
    assert not tried


class TooLongError(BaseException):
    """No handler of errors catches it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooLongError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# What is changed


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dictionary or list in a value with each of its keys."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(content: dict[str, Any], rng: random.Random) -> None:
    """Change, remove, rename or add one to three values, wherever they are."""
    for _ in range(rng.randint(1, 3)):
        found = list(places(content))
        if not found:
            return
        # Or most changes would be of the weights.
        holder, key = rng.choice(found if rng.random() < 0.1 else [p for p in found if len(p[0]) < 40] or found)
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], dict):
            holder[key][rng.choice(NAMES)] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))


def scramble(text: str, rng: random.Random) -> str:
    """Change, remove or repeat pieces of a text."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.choice((0, 1, 1, 5, 40))
        piece = rng.choice(
            (rng.choice(string.printable), text[at : at + length], "&a ", "*a", "!!int ", "- ", ": ", "{")
        )
        text = text[:at] + piece * rng.choice((1, 1, 3)) + text[at + length :]
    return text


def fuzz(attempt: Callable[[random.Random], None], times: int, least: float = 1 / 3) -> None:
    """Have as many mutations refused by a ConfigurationError or accepted; some share must be refused, not all."""
    refused, failed = 0, []
    for seed in range(times):
        try:
            with within(SECONDS):
                attempt(random.Random(seed))
        except ConfigurationError:
            refused += 1
        except (TooLongError, Exception) as error:
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-15:-1]]
            failed.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]} ({' < '.join(where)})")
    assert not failed, "\n".join([f"{len(failed)} of {times}", *failed])
    assert times * least < refused < times


def call(command: Callable[[list[str]], None], args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line; raise what it says as the ConfigurationError that it was."""
    capsys.readouterr()
    try:
        command(args)
    except SystemExit as stop:
        if stop.code in (0, None):
            return
        said = capsys.readouterr().err.strip().splitlines()
        if stop.code not in (1, 2) or "Traceback" in "".join(said) or not said[-1].startswith(SAYS):
            raise AssertionError(said) from stop
        raise ConfigurationError(said[-1]) from stop


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint of a short training holds."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-msnn"])
        main(["fit", *SMALL, "--run.folder", str(folder), "--trainer.callbacks+", "lightning_msnn.callbacks.EMA"])
    (path,) = folder.rglob("last.ckpt")
    return read_checkpoint(path)


OF_TRAINING = {"loops", "optimizer_states", "lr_schedulers", "callbacks", "random_state", "current_model_state"}
"""What a resume alone reads."""

SMALL = [
    *("--model.network_kwargs", "{depths: [1, 1, 1, 1], widths: [4, 4, 4, 4]}", "--data.image_size", "8"),
    *("--data.batch_size", "8", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.test", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--run.monitors", "false"),
    *("--trainer.logger", "false"),
]


def test_checkpoints(place: Path) -> None:
    original, path = small_checkpoint(), place / "x.ckpt"

    def attempt(rng: random.Random) -> None:
        content = copy.copy(original) | {"state_dict": dict(original["state_dict"])}
        for field in ("hyper_parameters", "network_arguments", "preprocessing"):
            content[field] = copy.deepcopy(original[field])
        mutate(content, rng)
        torch.save(content, path)
        network_of(read_checkpoint(path), path)
        zoo.export(path, f"{NETWORK}.fuzz{rng.random()}", place / "made")

    fuzz(attempt, max(600, THROUGH_THE_COMMAND_LINE))
    assert {p.name for p in place.iterdir()} == {"x.ckpt", "made"}
    assert not [p for p in (place / "made").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("verb", ["fit", "test", "predict", "report"])
def test_checkpoints_through_the_command_line(
    place: Path, trained: dict[str, Any], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "x.ckpt"
    (place / "images").mkdir()

    def attempt(rng: random.Random) -> None:
        content = copy.deepcopy({k: v for k, v in trained.items() if verb == "fit" or k not in OF_TRAINING})
        mutate(content, rng)
        torch.save(content, path)
        if verb == "report":
            call(report, [str(path), "--samples", "8", "--output", str(place / "page.html")], capsys)
        else:
            more = ["--data.folder", str(place / "images")] if verb == "predict" else []
            call(main, [verb, *SMALL, *more, "--run.folder", str(place / "runs"), "--ckpt_path", str(path)], capsys)

    from PIL import Image

    Image.new("L", (8, 8)).save(place / "images" / "x.png")
    fuzz(attempt, THROUGH_THE_COMMAND_LINE, 0.1)
    assert {p.name for p in place.iterdir()} <= {"x.ckpt", "images", "runs", "predictions.csv", "page.html", "test_0"}


# Entries


@pytest.fixture
def entry(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small entry in a zoo of its own."""
    monkeypatch.setenv("LIGHTNING_MSNN_ZOO", str(place / "zoo"))
    torch.save(small_checkpoint(), place / "x.ckpt")
    return zoo.export(place / "x.ckpt", f"{NETWORK}.small", place / "zoo")


def test_entries(place: Path, entry: Path) -> None:
    """Loaded, listed, and its card written."""
    original = json.loads((entry / CONFIG_FILE).read_text())
    original[FACTS] |= {"top1": 50.0, "energy_joules": 1e-6, "energy_joules_ann_twin": 2e-6, "versions": {"torch": "2"}}

    def attempt(rng: random.Random) -> None:
        content = copy.deepcopy(original)
        mutate(content, rng)
        text = json.dumps(content)
        (entry / CONFIG_FILE).write_text(scramble(text, rng) if rng.random() < 0.1 else text)
        if entry.name in entries():
            write_card(entry)
            table([entry.name])
            zoo.transforms(entry.name)
        zoo.load(entry.name)

    fuzz(attempt, max(600, THROUGH_THE_COMMAND_LINE))
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} <= {
        "x.ckpt",
        *(f"zoo/{NETWORK}.small/{name}" for name in (CONFIG_FILE, "model.safetensors", "README.md")),
    }


# Configurations

CONFIGURATION: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "lightning_msnn.tasks.SpikingClassifier",
        "init_args": {
            "network": NETWORK,
            "network_kwargs": {"depths": [1, 1], "widths": [4, 4], "theta": [0.2, 0.3], "windows": "grid"},
            "lr": 0.01,
            "optimizer": "sgd",
            "schedule": "one_cycle",
            "warmup_epochs": 0.5,
            "label_smoothing": 0.1,
        },
    },
    "data": {
        "class_path": "lightning_msnn.data.Digits",
        "init_args": {"batch_size": 8, "image_size": 8, "train_sizes": {0: 8}, "val_fraction": 0.2, "num_workers": 0},
    },
    "trainer": {
        "max_epochs": 1,
        "precision": "32-true",
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": 1,
        "callbacks": [
            {"class_path": "lightning_msnn.callbacks.EMA", "init_args": {"decay": 0.9}},
            {"class_path": "lightning_msnn.callbacks.SpikeAnnealing", "init_args": {"until": 0.5}},
            {"class_path": "lightning_msnn.callbacks.Mixing", "init_args": {"mixup": 0.2, "share": {0: 1.0, 1: 0.5}}},
            {"class_path": "lightning_msnn.callbacks.Freeze", "init_args": {"modules": ["stem"]}},
        ],
    },
    "run": {"name": "x", "every_n_steps": 1, "best": "val/top1", "ema": 0.0},
}
ONE_STEP = [*SMALL[4:], "--trainer.max_steps", "1"]


def test_the_configuration_that_is_changed_trains(place: Path) -> None:
    (place / "x.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    main(["fit", "--config", "x.yaml", *ONE_STEP])


@pytest.mark.parametrize("trains", [False, True])
def test_configurations(
    place: Path, trains: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the training, and with a step of it."""
    if not trains:
        monkeypatch.setattr(Trainer, "fit", lambda *_, **__: None)

    def attempt(rng: random.Random) -> None:
        content = copy.deepcopy(CONFIGURATION)
        mutate(content, rng)
        text = yaml.safe_dump(content, sort_keys=False)
        (place / "x.yaml").write_text(scramble(text, rng) if rng.random() < 0.25 else text)
        call(main, ["fit", "--config", "x.yaml", *ONE_STEP], capsys)

    fuzz(attempt, THROUGH_THE_COMMAND_LINE if trains else 3 * THROUGH_THE_COMMAND_LINE)


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
@pytest.mark.parametrize("name", ["laughs", *NESTED])
def test_yaml_that_unfolds_without_end(place: Path, name: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Given whole, and as the value of an option."""
    text = LAUGHS if name == "laughs" else f"model: {NESTED[name]}"
    (place / "x.yaml").write_text(text)
    for args in (["--config", "x.yaml"], ["--config=x.yaml"], ["-c", "x.yaml"]):
        with (
            within(SECONDS),
            pytest.raises(ConfigurationError, match="more than 100000 values or lie more than 50 levels deep"),
        ):
            call(main, [verb, *args], capsys)
    assert not (place / "runs").exists()
