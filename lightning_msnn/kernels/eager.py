"""Where a kernel may run at all: only where torch computes each operation as it comes."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["eager"]


def eager(x: Tensor) -> bool:
    """Whether nothing compiles, exports, traces, transforms (``torch.func``), differentiates forwards or watches.

    A kernel reads memory, which none of these see: what is traced would be what the memory held before.

    Args:
        x: A tensor that a kernel would read; that it is a subclass speaks against it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:  # type: ignore[no-untyped-call]
        return False
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return torch._C._has_storage(x)  # a backward pass of several gradients at once is known by those alone
