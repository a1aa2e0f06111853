"""C sources compiled on the machine that runs them, once, where it has a compiler.

A library is kept in a cache folder that is the user's alone (``$XDG_CACHE_HOME/lightning_msnn_kernels``, by default
under ``~/.cache``; mode 0700). Its name has two hashes: one of source, compiler and processor, because machines may
share a home folder, and one of its content, so that a broken file is compiled again.
``LIGHTNING_MSNN_NATIVE=0`` in the environment switches kernels off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from lightning_msnn.errors import ConfigurationError

__all__ = ["build"]

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""No ``-ffast-math``: values that are not finite must come out as they do from torch."""

TUNING = ("-march=native", "-mcpu=native")
"""Flags for all instructions of this processor; the first that the compiler accepts is used."""


def _compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, or the system's."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"CC must be the command of a C compiler, not {command!r}") from error
        if words and shutil.which(words[0]):
            return words
    return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _processor() -> str:
    """Return what the system says about the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folder() -> Path | None:
    """The cache folder; None where there is none, or where it is open to others."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(cache).expanduser() / "lightning_msnn_kernels"  # apart from decoded data, which may be open
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError):  # no home folder at all
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        logger.warning("%s is not your own folder, closed to others (mode 0700): it is not used", folder)
        return None
    return folder


def _compile(compiler: list[str], source: Path, folder: Path, name: str) -> Path:
    """Compile to a file whose name begins with ``name`` and ends with the hash of its content.

    Raises:
        OSError: If the compiler cannot be run or the file not be written.
        subprocess.SubprocessError: If it fails, or takes minutes.
    """
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        made = Path(beside) / "made.so"
        for tuning in (*TUNING, None):
            command = [*compiler, *FLAGS, *([tuning] if tuning else []), "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                return made.replace(folder / f"{name}_{_hash(made.read_bytes())}.so")
    raise subprocess.SubprocessError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")


def build(source: Path) -> ctypes.CDLL | None:
    """Load the library of a C source; the first time on a machine, compile it, which takes half a minute.

    Returns:
        The library; None where it is switched off, and, with a warning, where there is no compiler or it fails.

    Raises:
        ConfigurationError: If ``LIGHTNING_MSNN_NATIVE`` is neither 0 nor 1, or ``CC`` no command.
    """
    value = os.environ.get("LIGHTNING_MSNN_NATIVE", "1")
    if value not in ("0", "1"):
        raise ConfigurationError(f"LIGHTNING_MSNN_NATIVE must be 0 or 1, not {value!r}")
    if value == "0" or sys.platform == "win32":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.warning("no C compiler ($CC, cc, gcc or clang): networks run without %s, more slowly", source.name)
        return None
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
        machine = (asked.stdout, platform.platform(), _processor())
        parts = (source.read_text(), shlex.join(compiler), *FLAGS, *TUNING, *machine)
        name, kept = f"{source.stem}_{_hash(chr(0).join(parts).encode())}", _folder()
        for library in kept.glob(f"{name}_*.so") if kept else ():
            if library.stem == f"{name}_{_hash(library.read_bytes())}":
                return ctypes.CDLL(str(library))
        if kept is None or not os.access(kept, os.W_OK):
            logger.warning("cannot write to $XDG_CACHE_HOME: each process compiles %s anew", source.name)
            with tempfile.TemporaryDirectory() as temporary:  # a library that is loaded needs its file no longer
                return ctypes.CDLL(str(_compile(compiler, source, Path(temporary), name)))
        return ctypes.CDLL(str(_compile(compiler, source, kept, name)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("networks run without %s, more slowly: %s", source.name, error)
        return None
