"""Compile the Triton kernels for a CUDA device, which need not be there, and print their names: see test_triton.py."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_msnn.kernels import triton as kernels
from lightning_msnn.kernels.geometry import Layer, tables

TARGET = GPUTarget("cuda", 80, 32)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
done = set()


def compile_only(self, kernel, *args, num_warps=4, **constants):
    """Stand in for the launch of a kernel, with the signature that the launch would find."""
    constants |= {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, fixed = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    if (key := (kernel.__name__, str(signature), str(fixed))) not in done:
        done.add(key)
        triton.compile(ASTSource(kernel, signature, fixed), target=TARGET, options={"num_warps": num_warps})
        sys.stdout.write(f"{kernel.__name__}\n")


def run(layer: Layer, images: int, dtype: torch.dtype, channels: int = 48, **parameters: torch.Tensor) -> None:
    """Both passes of a layer on a map of 8 by 8 pixels."""
    size = 8, 8
    at = tables(layer, *size, torch.device("cpu"))

    def a_map(batch, size, channels=channels):
        return torch.zeros(batch, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    ones = torch.ones(channels)
    current = a_map(images * (at.windows if layer.windows_in else 1), at.current)
    out = a_map(images * (at.windows if layer.windows_out else 1), at.out)
    handed = a_map((at.windows - 1) * images, at.window, layer.handed) if layer.handed else None
    other = {
        "coupled": lambda: a_map((at.windows - 1) * images, at.window),
        "recurrent": lambda: a_map(images, size),
    }.get(layer.form, lambda: None)()
    residual = None if layer.surrogate else out
    norm = {"weight": ones, "running_mean": ones, "running_var": ones}
    given = {"tau": torch.ones(channels, 1, 1), "theta": torch.ones(()), **norm, **parameters}
    merged = out if layer.keeps else None
    norm = kernels.forward(layer, size, current, residual, other, None, None, given, out, handed, merged, None)
    grads = out, handed, merged, None
    sums = kernels.backward(layer, size, *grads, current, other, None, norm, given, not layer.synchronised)[-1]
    if layer.synchronised:
        kernels.settle(current, current, norm, sums, torch.ones(1, dtype=torch.float64), layer.eps)


if __name__ == "__main__":
    kernels._Tiles.run = compile_only
    run(
        Layer("recurrent", "tanh", "dilated", "sigmoid", "graded", handed=5, keeps=True, training=True),
        2, torch.bfloat16, level=torch.ones(48), anneal=torch.ones(()),
    )  # fmt: skip
    run(
        Layer("first", "none", "non_dilated", "triangular", handed=48, training=True, synchronised=True),
        2,
        torch.float16,
    )
    run(Layer("coupled", "sine", "grid", "", windows_out=True), 1, torch.float32)
    run(Layer("still", "none", "single", "arctan"), 1, torch.float32, 1)
