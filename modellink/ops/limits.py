"""Limits that fused forms of several devices have in common: a few words about a problem, or None.

The choice of forms asks about a run and takes the next form; a call that does not keep what was asked about, ends in a
`ConfigError` by `require`.
"""

import torch
from torch import Tensor

from modellink.config import ConfigError
from modellink.ops.forms import name_of_dtype

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
# what decides dtypes and shapes of every operation
FLAGS = "--bf16, --fp16, --fp32, the sizes of the model"


def require(kernel: str, problem: str | None, flags: str = FLAGS) -> None:
    """Raise a ConfigError that names the kernel and the flags behind its limits, when there is a problem."""
    if problem is not None:
        raise ConfigError(f"{kernel}: {problem}; change the flag behind it ({flags}), or run with --device cpu.")


def dtype_problem(dtype: torch.dtype, allowed: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    if dtype not in allowed:
        return f"it takes {', '.join(name_of_dtype(each) for each in allowed)} and not {name_of_dtype(dtype)}"
    return None


def same_dtype_problem(*tensors: Tensor) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"query, key and value need one dtype and have {', '.join(sorted(map(name_of_dtype, dtypes)))}"
    return None


def packed_problem(cu_seqlens: list[int], batch: int, length: int) -> str | None:
    """Packed samples: one row, and boundaries from 0 to its length in order."""
    if batch != 1:
        return f"packed samples need a batch of 1 and not {batch}"
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or sorted(cu_seqlens) != cu_seqlens:
        return f"the boundaries of packed samples must rise from 0 to {length}, and are {cu_seqlens}"
    return None


def rotary_shape_problem(x: Tensor) -> str | None:
    """What is rotated."""
    return None if x.dim() == 4 else f"it takes [sequence, batch, heads, head size] and not {list(x.shape)}"


def swiglu_shape_problem(x: Tensor) -> str | None:
    """Gate and up behind one another."""
    return f"it takes an even number of features and not {x.shape[-1]}" if x.shape[-1] % 2 else None
