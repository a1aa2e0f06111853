"""C sources are compiled once, kept where no one else can write, and left out where they cannot be used."""

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
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # a folder that can only be read
    assert native.build(source).twice(4) == 8


def test_another_source_or_processor_has_a_library_of_its_own(source, tmp_path, monkeypatch):
    native.build(source)
    source.write_text("int twice(int x) { return x + x; }\n")
    native.build(source)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.build(source)
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b""], ids=["half", "empty"])
def test_a_library_that_is_broken_is_compiled_again(source, tmp_path, damage):
    """Loading half of one would end the process with a bus error."""
    native.build(source)
    (library,) = kept(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # this process has it in memory
    library.write_bytes(damage(whole))
    assert native.build(source).twice(21) == 42
    assert [file.read_bytes() for file in kept(tmp_path)] == [whole]


def test_flags_that_a_compiler_does_not_know(source, monkeypatch):
    monkeypatch.setattr(native, "TUNING", ("-march=no-such-processor",))
    assert native.build(source).twice(1) == 2


def test_a_source_that_does_not_compile(source, tmp_path, caplog):
    source.write_text("this is not C")
    assert native.build(source) is None
    assert "networks run without twice.c, more slowly" in caplog.text
    assert kept(tmp_path) == []


def test_no_compiler(source, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert native.build(source) is None
    assert "no C compiler" in caplog.text


@pytest.mark.parametrize(("mode", "owner"), [(0o755, -1), (0o701, -1), (0o700, 1234)])
def test_a_folder_of_someone_else_or_open_to_others(source, tmp_path, caplog, mode, owner):
    folder = tmp_path / "cache" / "lightning_msnn_kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    if owner > 0 and os.getuid() != 0:
        pytest.skip("root alone gives a folder away")
    os.chown(folder, owner, -1)
    assert native.build(source).twice(3) == 6
    assert kept(tmp_path) == []
    assert "closed to others (mode 0700)" in caplog.text


def test_threads_of_the_command_line_sleep_while_they_wait(monkeypatch):
    """Beside a busy process threads that spin make a step of a small network ten times as long."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    code = "from lightning_msnn_cli import main; main(['zoo', 'info', 'msnn_resnet12_tiny.digits'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    if "OPENMP DISPLAY ENVIRONMENT" not in shown:
        pytest.skip("torch's threads are not those of GNU OpenMP")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown


def test_switches(source, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", "0")
    assert native.build(source) is None
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", "yes")
    with pytest.raises(ConfigurationError, match="must be 0 or 1, not 'yes'"):
        native.build(source)
    monkeypatch.setenv("LIGHTNING_MSNN_NATIVE", "1")
    monkeypatch.setenv("CC", "gcc'")
    with pytest.raises(ConfigurationError, match="CC must be the command of a C compiler"):
        native.build(source)
