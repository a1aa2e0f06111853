"""Shared fixtures."""

import os
import sys

# Each of the processes that share the tests, and those that they start, has a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry

import lightning_msnn  # noqa: F401  registers the networks
from lightning_msnn.imports import TABLES


def rest_is_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Parameters of which all but the quick ones run with ``--runslow`` alone."""
    quick = list(quick)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


NETWORKS = timm.list_models("msnn*")
TINY = [name for name in NETWORKS if name.endswith("_tiny")]
PAPER = ["msnn_resnet12", "msnn_vit12", "msnn_rnn12"]
PUBLISHED = [name for name in TINY if name.removesuffix("_tiny") in PAPER]
"""Tiny networks of the families that the paper has: their blocks have a channel mixer."""
DISTINCT = rest_is_slow(NETWORKS, TINY)
"""The others are a tiny one, only deeper, wider or with another stride of the stem, and run the same code."""

COMPILED = rest_is_slow(TINY, TINY[:1])
"""Networks that are compiled, exported or trained, where the other families run the same code around theirs."""
SHALLOW = {"depths": (2, 1), "widths": (24, 24)}
"""Arguments of a network in which all is there, layers that follow each other and stages, for what writes down its
operations one by one."""

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests that are marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--runslow"):
        skipped = pytest.mark.skip(reason="slow: needs --runslow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    """What a test writes goes to its own folder: it leaves nothing new at the root of the repository."""
    before = set(os.listdir(ROOT))
    yield
    left = {name for name in set(os.listdir(ROOT)) - before if not name.startswith((".", "__pycache__"))}
    assert not left, f"this test, or one that ran beside it, left {sorted(left)} in {ROOT}"


@pytest.fixture
def own_definitions(tmp_path: Path) -> Iterator[None]:
    """What files in the folder of a test define is gone after it."""
    tables, path = [(t, dict(t)) for t in (*TABLES.values(), _registry._model_entrypoints)], list(sys.path)
    yield
    sys.path[:] = path
    for table, content in tables:
        table.clear()
        table.update(content)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def cifar100() -> Path:
    """Folder of the real CIFAR-100, ``train/<class>/*.png`` and ``test/<class>/*.png``."""
    folder = os.environ.get("LIGHTNING_MSNN_DATA")
    if not folder:
        pytest.skip("LIGHTNING_MSNN_DATA is not set: no folder of the real CIFAR-100")
    return Path(folder)
