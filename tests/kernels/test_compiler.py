"""C sources are compiled once, kept where no one else can write, and left out where they cannot be used."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys

import pytest

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.kernels import compiler as native

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or native._compiler() is None, reason="no C compiler for a library of this system"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_MSNN_NATIVE", raising=False)
    file = tmp_path / "twice.c"
    file.write_text("int twice(int x) { return 2 * x; }\n")
    return file


def kept(tmp_path):
    return list((tmp_path / "cache" / "lightning_msnn_kernels").glob("*"))


def test_compiled_once(source, tmp_path, monkeypatch):
    assert native.build(source).twice(21) == 42
    (library,) = kept(tmp_path)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.build(source).twice(4) == 8


def test_another_source_or_processor_has_a_library_of_its_own(source, tmp_path, monkeypatch):
    native.build(source)
    source.write_text("int twice(int x) { return x + x; }\n")
    native.build(source)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.build(source)
    assert len(kept(tmp_path)) == 3


def test_flags_that_a_compiler_does_not_know(source, monkeypatch):
    monkeypatch.setattr(native, "TUNING", ("-march=no-such-processor",))
    assert native.build(source).twice(1) == 2


def test_a_source_that_does_not_compile(source, tmp_path, caplog):
    source.write_text("this is not C")
    with caplog.at_level(logging.INFO, "lightning_msnn"):
        assert native.build(source) is None
    assert "twice.c is not used" in caplog.text
    assert kept(tmp_path) == []


def test_a_library_that_cannot_be_loaded(source, monkeypatch, caplog):
    monkeypatch.setattr(native, "_compile", lambda compiler, source, target: target.write_bytes(b"not a library"))
    with caplog.at_level(logging.INFO, "lightning_msnn"):
        assert native.build(source) is None
    assert "twice.c is not used" in caplog.text


def test_no_compiler(source, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO, "lightning_msnn"):
        assert native.build(source) is None
    assert "no C compiler" in caplog.text


def test_the_compiler_of_the_environment(source, monkeypatch):
    command = native._compiler()
    monkeypatch.setenv("CC", f"{command[0]} -DTEST")
    assert native._compiler() == [command[0], "-DTEST"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native._compiler() == command


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs no folder of someone else's for root")
def test_a_folder_of_someone_else(source, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "lightning_msnn_kernels"
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 1234, -1)
    assert native.build(source).twice(3) == 6
    assert kept(tmp_path) == []


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o701])
def test_a_folder_that_is_open_to_others(source, tmp_path, caplog, mode):
    folder = tmp_path / "cache" / "lightning_msnn_kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert native.build(source).twice(3) == 6
    assert kept(tmp_path) == []
    assert "closed to others (mode 0700)" in caplog.text


def test_a_link_to_a_folder(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lightning_msnn_kernels").symlink_to(elsewhere)
    assert native.build(source).twice(3) == 6
    assert list(elsewhere.iterdir()) == []


def test_beside_decoded_data(source, tmp_path, caplog):
    """Data that was decoded first makes a folder that others may read; kernels are kept all the same."""
    (tmp_path / "cache" / "lightning_msnn").mkdir(parents=True, mode=0o755)
    assert native.build(source).twice(3) == 6
    assert len(kept(tmp_path)) == 1
    assert not caplog.text


def test_two_processes_at_once(source, tmp_path):
    """Both compile; each finds a whole library, and one is left."""
    code = (
        "import sys; from pathlib import Path; from lightning_msnn.kernels.compiler import build; "
        "print(build(Path(sys.argv[1])).twice(21))"
    )
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42", "42"]
    assert len(kept(tmp_path)) == 1


def test_no_home(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source / "below a file"))
    assert native.build(source).twice(3) == 6


def test_an_unknown_processor(monkeypatch):
    monkeypatch.setattr(native.Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError))
    assert isinstance(native._processor(), str)


@pytest.mark.parametrize(("value", "type_"), [("0", type(None)), ("1", ctypes.CDLL)])
def test_switch(source, monkeypatch, value, type_):
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", value)
    assert isinstance(native.build(source), type_)


def test_switch_that_is_neither(source, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", "yes")
    with pytest.raises(ConfigurationError, match="must be 0 or 1, not 'yes'"):
        native.build(source)
