"""Trainings that are killed with SIGKILL, once in a step, in a checkpoint's writing and in a validation.

``python benchmarks/kill_and_resume.py`` does the same at 40 moments and with more pairs of options.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    pairs = ["accumulation, val_check_interval", "two processes, every_n_steps"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_and_resume.py", "--kills", "6", "--only", *pairs],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for moment in ("step", "write", "validation"):
        assert done.stdout.count(f"killed in a {moment}") == 2
    assert done.stdout.count("    identical") == 2
