"""Break the package on purpose, one place at a time, and see that tests fail: else a wrong program would pass them.

    python -m benchmarks.mutations [--only NAME ...]

Each mutation of mutations.toml changes one text in a copy of the package, and the tests that must fail are run against
that copy. At first they are run on a copy as it is, where all must pass. Exit status 1 if a mutation survives, if its
tests cannot be run, or if its text is not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT, processor


class Mutation(NamedTuple):
    """A change that makes the package wrong.

    Args:
        file: File of the package.
        text: What occurs once in it.
        replacement: What takes its place.
        tests: Tests that must fail then, at least one of each.
        needs: Flag that a processor must have to run this code, any if empty.
    """

    file: str
    text: str
    replacement: str
    tests: list[str]
    needs: str = ""


MUTATIONS = {
    name: Mutation(**mutation)
    for name, mutation in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
}


def occurrences(mutation: Mutation) -> int:
    """How often a mutation's text occurs in its file of the package."""
    return (ROOT / "lightning_msnn" / mutation.file).read_text(encoding="utf-8").count(mutation.text)


def copy(folder: Path) -> None:
    """Make a checkout of the package and its tests; what no mutation changes is linked."""
    for name in ("lightning_msnn", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_zoo", "_configs"))
    for name in ("pyproject.toml", "configs", "zoo", "benchmarks", "docs", "README.md", "CONTRIBUTING.md"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)


def run(folder: Path, tests: Sequence[str], cache: Path | None) -> tuple[int, str]:
    """Run tests against the package in a folder until one fails; return pytest's exit status and its last lines.

    Args:
        folder: The checkout.
        tests: Tests.
        cache: Folder of compiled kernels, None for the user's own.
    """
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    options = ("-n", "0", "-x", "-q", "--runslow", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def survives(name: str) -> bool:
    """Apply a mutation to a copy of the package, run its tests one by one, and say what became of it."""
    mutation, begun = MUTATIONS[name], time.monotonic()
    survived, said = False, ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        copy(folder)
        file = folder / "lightning_msnn" / mutation.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutation.text, mutation.replacement), encoding="utf-8")
        for test in mutation.tests:
            status, said = run(folder, [test], Path(temporary) if file.suffix == ".c" else None)
            if survived := status != 1:
                print(f"{name}: {'SURVIVED' if status == 0 else 'cannot be tested by'} {test}\n{said}", flush=True)
                break
    if not survived:
        reason = next((line for line in said.splitlines() if line.startswith("FAILED")), said)
        print(f"{name}: killed in {time.monotonic() - begun:.0f} s, {reason}", flush=True)
    return survived


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MUTATIONS, nargs="+", default=list(MUTATIONS), metavar="NAME")
    names = parser.parse_args().only
    for name in [name for name in names if MUTATIONS[name].needs not in ("", *processor()[1])]:
        print(f"{name}: left out, since this processor lacks {MUTATIONS[name].needs}", flush=True)
        names.remove(name)
    for name in names:
        if (found := occurrences(MUTATIONS[name])) != 1:
            sys.exit(f"{name}: its text occurs {found} times in {MUTATIONS[name].file}, and once is needed")
    with tempfile.TemporaryDirectory() as temporary:
        copy(Path(temporary))
        status, said = run(Path(temporary), sorted({test for name in names for test in MUTATIONS[name].tests}), None)
    if status != 0:
        sys.exit(f"the tests do not pass on the package as it is:\n{said}")
    survivors = [name for name in names if survives(name)]
    print(f"{len(names) - len(survivors)} of {len(names)} mutations killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
