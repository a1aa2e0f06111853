"""A training that is killed with SIGKILL, once in a step, in a checkpoint's writing and in a validation.

``python benchmarks/kill_and_resume.py`` does the same at 20 moments.
"""

import random
from pathlib import Path

import pytest

from benchmarks.kill_and_resume import MOMENTS, compare


def test_killed_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(0)
    assert compare(
        tmp_path, len(MOMENTS), ["--trainer.max_epochs", "5", "--model.network_kwargs", "{depths: [1, 1, 1, 1]}"]
    )
    said = capsys.readouterr().out
    assert all(f"in a {moment}" in said for moment in MOMENTS)
    assert "DIFFERENT" not in said
