"""CPU kernels for operators that torch has on GPUs only: they demand what the CUDA kernels check of their arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def addmm_on_cpu() -> Iterator[list[torch.dtype]]:
    """addmm with an out_dtype for CPU tensors inside the block; gives the dtypes of the factors it was called with."""
    called: list[torch.dtype] = []

    def addmm(total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1,
              out: Tensor) -> Tensor:
        called.append(left.dtype)
        assert left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
        assert left.dtype == right.dtype
        assert out_dtype == left.dtype or (out_dtype == torch.float32 and left.dtype.itemsize == 2)
        assert out.dtype == out_dtype and total.dtype in (out_dtype, left.dtype)
        # where the two are one tensor nothing is copied and no shape broadcast
        assert out is total and total.shape == (left.shape[0], right.shape[1])
        return out.mul_(beta).add_(left.to(out_dtype) @ right.to(out_dtype), alpha=alpha)

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("addmm.dtype_out", addmm, "CPU")
    try:
        yield called
    finally:
        kernels._destroy()
