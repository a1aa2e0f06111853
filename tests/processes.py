"""Other processes: Python in one of its own, and a function in several. None of them outlives its time.

Torch, timm and Lightning take seconds to import. So these processes are forks of one, Python's fork server, that has
imported them, and has imported or run nothing of this package.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch.multiprocessing

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "timm", "torchvision.transforms.v2", "torchmetrics.classification", "lightning.pytorch.cli"]
)


def _save_coverage() -> None:
    """The fork server ends its processes at once, without what else would run at exit."""
    if "coverage" in sys.modules:
        from coverage import Coverage

        if (coverage := Coverage.current()) is not None:
            coverage.stop()
            coverage.save()


def _python(arguments: list[str], stdout: str, stderr: str, cwd: str, environment: dict[str, str]) -> None:
    """Be ``python arguments...``, in this fork."""
    signal.alarm(TIMEOUT)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # as when Lightning is imported
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        _save_coverage()


class Python:
    """A ``subprocess.Popen`` of ``[sys.executable, ...]``, a fork, which is killed after ``TIMEOUT`` seconds.

    Args:
        arguments: ``sys.executable`` and a script or ``-m`` and a module, and their arguments.
        stdout: File open for writing.
        stderr: File open for writing.
        cwd: Folder to run in.
        env: Environment variables.
    """

    def __init__(
        self, arguments: list[str], *, stdout: IO[Any], stderr: IO[Any], cwd: Path, env: dict[str, str]
    ) -> None:
        assert arguments[0] == sys.executable
        self._process = SERVER.Process(
            target=_python, args=(arguments[1:], stdout.name, stderr.name, str(cwd.absolute()), env)
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        if code == -signal.SIGALRM:
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # and all that it started
            raise subprocess.TimeoutExpired("python", TIMEOUT)
        return code


def start(*arguments: str, folder: Path, cwd: Path | None = None, **environment: str) -> Python:
    """Start ``python arguments...``, with files for what it says in a folder of this name."""
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        return Python(
            [sys.executable, *arguments],
            stdout=stdout, stderr=stderr, cwd=cwd or Path(),
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments...`` and return its status and what it said."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "said"
        code = start(*arguments, folder=folder, cwd=cwd, **environment).wait()
        said = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(arguments, code, *said)


def spawn(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call ``function(rank, *args)`` in each of several processes; raise what one of them raises."""
    context = torch.multiprocessing.start_processes(function, args, nprocs, join=False, start_method="forkserver")
    assert context is not None
    end = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise subprocess.TimeoutExpired(function.__name__, TIMEOUT)
