"""AOTInductor: a network compiled to machine code, for this kind of processor and this version of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_msnn.errors import ConfigurationError, brief
from lightning_msnn.export.program import trace
from lightning_msnn.export.source import Source

__all__ = ["run", "write"]


def write(source: Source, file: Path, shape: torch.Size, dtype: str) -> None:
    """Write a network, folded, as a compiled package of torch's own operators for any batch size.

    Args:
        source: The network.
        file: The file, with the ending ``.pt2``.
        shape: Shape of one input.
        dtype: ``"float32"``.

    Raises:
        ConfigurationError: If there is no C++ compiler, or torch cannot export or compile the network.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ConfigurationError(
            "aoti needs a C++ compiler, and none is found: install g++ or clang, or name one in $CXX"
        ) from error
    program = trace(source, shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # As many threads as the process that runs it has, not as this one.
            options = {"aot_inductor.metadata": source.facts(), "cpp.dynamic_threads": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
        except Exception as error:  # whatever stops torch or its compiler
            reason = brief(error)
            raise ConfigurationError(f"{source.name} cannot be compiled by AOTInductor: {reason}") from error


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits. It runs the machine code of the file: load no stranger's.

    Args:
        file: A file that :func:`write` has written.

    Raises:
        ConfigurationError: If torch cannot read the file.
    """
    try:
        module: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(file))
    except Exception as error:  # whatever the bytes make torch raise
        reason = brief(error)
        raise ConfigurationError(f"AOTInductor cannot read {file.name!r}: {reason}") from error
    return module
