"""The notebooks run from top to bottom, and say little enough to be kept with what they print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_msnn import zoo
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SECONDS = 90.0
"""Time that each may take on one core."""


def cells(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook: Path, tmp_path: Path) -> None:
    """In a process of its own, as a kernel would run it, in a folder without anything."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook))
    (tmp_path / "cells.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "cells.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert os.times().children_user - before < SECONDS, "longer than a reader would wait"
    assert done.stdout.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["cells.py"], "it leaves nothing behind"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran(notebook: Path) -> None:
    """In order, without an error, and small."""
    found = cells(notebook)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    kinds = [output["output_type"] for cell in found for output in cell["outputs"]]
    assert kinds
    assert "error" not in kinds
    assert not [o for cell in found for o in cell["outputs"] if o.get("name") == "stderr"], "warnings are not kept"
    assert notebook.stat().st_size < 300_000


def test_figures_are_those_of_the_cards() -> None:
    """Accuracies, energy, and how many times as much the ReLU baseline takes."""
    printed = {path.stem: str([cell["outputs"] for cell in cells(path)]) for path in NOTEBOOKS}
    for name, top1 in re.findall(r"(msnn\w+\.digits) ([\d.]+) %", printed["start_here"]):
        assert zoo.info(name)["top1"] == float(top1)
    card = zoo.info("msnn_resnet12_tiny.digits")
    assert f"{1e6 * card['energy_joules']:.2f} µJ for an image" in printed["energy"]
    for key in ("energy_joules", "energy_joules_zeros_skipped", "energy_joules_memory"):
        factor = pytest.approx(card[f"{key}_ann_twin"] / card[key], rel=0.01)
        assert factor in [float(number) for number in re.findall(r"\d\.\d+", printed["energy"])], key
