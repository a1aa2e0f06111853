"""C sources compiled on the machine that runs them, once, where it has a compiler.

A library is kept in a cache folder that is the user's alone (``$XDG_CACHE_HOME/lightning_msnn_kernels``, by default
under ``~/.cache``; mode 0700) by the hash of its source, the compiler and the processor: machines that share a home
folder do not share a library that one of them cannot run. ``LIGHTNING_MSNN_NATIVE=0`` in the environment switches it
off.
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
"""How compilers are told to use all that the processor has; the first that one takes is used."""


def _switched_on() -> bool:
    value = os.environ.get("LIGHTNING_MSNN_NATIVE", "1")
    if value not in ("0", "1"):
        raise ConfigurationError(f"LIGHTNING_MSNN_NATIVE must be 0 or 1, not {value!r}")
    return value == "1"


def _compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, or the system's."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _processor() -> str:
    """What the processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folder() -> Path | None:
    """The cache folder; None where it cannot be written, or where it is open to others."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(cache).expanduser() / "lightning_msnn_kernels"  # apart from decoded data, which may be open
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError):  # no home folder at all
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        logger.warning(
            "%s is not a folder of the user's own that is closed to others (mode 0700): no library is kept there, and "
            "every process compiles its own",
            folder,
        )
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Compile to a file that is whole or not there.

    Raises:
        OSError: If the compiler cannot be run or the file not be written.
        subprocess.SubprocessError: If it fails, or takes minutes.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for tuning in (*TUNING, None):
            command = [*compiler, *FLAGS, *([tuning] if tuning else []), "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                os.replace(made, target)
                return
    raise subprocess.SubprocessError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")


def build(source: Path) -> ctypes.CDLL | None:
    """Load the library of a C source; the first time on a machine, compile it, which takes half a minute.

    Args:
        source: The source, one file.

    Returns:
        The library, or None where there is no compiler or it fails, which the log says at level INFO.

    Raises:
        ConfigurationError: If ``LIGHTNING_MSNN_NATIVE`` is neither 0 nor 1.
    """
    if not _switched_on() or sys.platform == "win32":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("no C compiler ($CC, cc, gcc or clang): %s is not used", source.name)
        return None
    try:
        told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        parts = (source.read_text(), shlex.join(compiler), told, *FLAGS, *TUNING, platform.platform(), _processor())
        name = f"{source.stem}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
        folder = _folder()
        if folder is not None:
            if not (folder / name).exists():
                _compile(compiler, source, folder / name)
            return ctypes.CDLL(str(folder / name))
        with tempfile.TemporaryDirectory() as temporary:  # a library that is loaded needs its file no longer
            _compile(compiler, source, Path(temporary) / name)
            return ctypes.CDLL(str(Path(temporary) / name))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s is not used: %s", source.name, error)
        return None
