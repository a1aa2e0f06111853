"""C sources are compiled once, kept where no one else can write, and left out where they cannot be used."""

import ctypes
import logging
import os
import shutil
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


def test_no_compiler(source, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO, "lightning_msnn"):
        assert native.build(source) is None
    assert "no C compiler" in caplog.text


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


@pytest.mark.parametrize(("value", "type_"), [("0", type(None)), ("1", ctypes.CDLL)])
def test_switch(source, monkeypatch, value, type_):
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", value)
    assert isinstance(native.build(source), type_)


def test_switch_that_is_neither(source, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", "yes")
    with pytest.raises(ConfigurationError, match="must be 0 or 1, not 'yes'"):
        native.build(source)
