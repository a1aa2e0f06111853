"""Compiled programs, and files of every format that are damaged or that their runtime cannot run."""

import shutil
import zipfile

import onnx
import pytest
import torch

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export import FORMATS, aoti, export, read_source
from tests.export.test_export import SMALL, TINIEST, checkpoint

# Compiled programs


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A small network, compiled."""
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    source = checkpoint(folder, **SMALL | TINIEST)
    return source, export(source, to="aoti", out=folder / "x.pt2")


def test_a_compiled_program_takes_any_batch(compiled):
    source, report = compiled
    assert (report.runtime, report.images) == ("AOTInductor", 64)
    assert report.differ <= 1
    module = aoti.run(report.path)
    ours = read_source(source).network
    for batch in (1, 2, 3, 17, 65):
        images = torch.rand(batch, 1, 8, 8)
        with torch.no_grad():
            difference = (module(images) - ours(images)).abs().amax(1)
        assert difference.shape == (batch,)
        assert (difference > 1e-4).sum() <= 1 + batch // 20


def test_a_compiled_program_says_what_images_it_takes(compiled):
    said = aoti.run(compiled[1].path).get_metadata()
    assert said["class_names"] == '["a", "b", "c"]'
    assert said["input_size"] == "[1, 8, 8]"


def test_a_compiled_program_has_none_of_our_operators(compiled):
    content = compiled[1].path.read_bytes()
    assert b"lightning_msnn::" not in content


def test_a_compiled_program_has_the_threads_of_what_runs_it(compiled):
    """It was compiled on one thread, as tests are."""
    assert torch.get_num_threads() == 1
    with zipfile.ZipFile(compiled[1].path) as package:
        code = b"".join(package.read(name) for name in package.namelist() if name.endswith(".so"))
    assert b"GOMP_parallel" in code or b"__kmpc_fork_call" in code


def test_without_a_compiler_there_is_no_compiled_program(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigurationError, match=r"aoti needs a C\+\+ compiler, and none is found"):
        export(checkpoint(tmp_path, **SMALL), to="aoti", out=tmp_path / "x.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.ckpt"]


# What is damaged

SPOILT = {"nothing": lambda b: b"", "half": lambda b: b[: len(b) // 2], "other": lambda b: b"nothing" * 100}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of a small network by format; one without windows, so that NIR has it too."""
    folder = tmp_path_factory.mktemp("whole")
    source = checkpoint(folder, windows="single", **SMALL)
    found = {}

    def make(to):
        if to not in found:
            found[to] = export(source, to=to, out=folder / f"{to}{FORMATS[to].suffix}").path
        return found[to]

    return make


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("to", [to for to in FORMATS if to != "aoti"])
def test_damaged_files_are_refused_in_one_sentence(to, spoilt, whole, tmp_path):
    file = tmp_path / f"x{FORMATS[to].suffix}"
    file.write_bytes(SPOILT[spoilt](whole(to).read_bytes()))
    with pytest.raises(ConfigurationError, match=r"x\.\w+") as refused:
        FORMATS[to].run(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_damaged_compiled_programs_are_refused_in_one_sentence(spoilt, compiled, tmp_path):
    file = tmp_path / "x.pt2"
    file.write_bytes(SPOILT[spoilt](compiled[1].path.read_bytes()))
    with pytest.raises(ConfigurationError, match="AOTInductor cannot read 'x.pt2'") as refused:
        aoti.run(file)
    assert "\n" not in str(refused.value)


def test_a_stranger_s_graph_is_refused_in_one_sentence(tmp_path):
    """A graph that onnxruntime reads, of other ends."""
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "x.onnx")
    with pytest.raises(ConfigurationError, match=r"'x.onnx' maps \['x'\] to \['y'\], and 'image' to 'logits' is"):
        FORMATS["onnx"].run(tmp_path / "x.onnx")


def test_a_runtime_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def run(file):
        return lambda images: images @ images[:, :, :3]

    monkeypatch.setitem(FORMATS, "weights", FORMATS["weights"]._replace(run=run))
    with pytest.raises(
        ConfigurationError, match="lightning_msnn cannot run mine.ckpt, so nothing is written: "
    ) as stop:
        export(checkpoint(tmp_path, **{**SMALL, "in_chans": 3}, size=8), to="weights", out=tmp_path / "x.safetensors")
    assert "\n" not in str(stop.value)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.ckpt"]
