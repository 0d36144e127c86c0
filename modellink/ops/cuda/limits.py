"""What Triton kernels, flash attention, addmm and products over symmetric memory take, as checks before the call.

Sources: liger_kernel/ops of liger-kernel 0.8.5 (the dtypes it maps to Triton's, MAX_FUSED_SIZE), Triton's largest block
(2^20 elements), the conditions under which torch's flash attention runs (aten/src/ATen/native/transformers/cuda), what
addmm with an out_dtype checks (aten/src/ATen/native/cuda/Blas.cpp), and where torch runs its own tests of symmetric
memory (requires_cuda_p2p_access in torch/testing/_internal/common_utils.py). A `..._problem` function gives a few
words, or None.
"""

from itertools import combinations

import torch

from modellink.device.compilers import triton_missing
from modellink.ops.cuda.library import addmm_missing, liger_missing, symmetric_memory_missing, varlen_missing
from modellink.ops.forms import name_of_dtype
from modellink.ops.limits import HALF, dtype_problem

LIGER_ROW = 65536
TRITON_BLOCK = 1 << 20
# its backward knows wider heads on some chips only
FLASH_HEAD_DIM = 192
FLASH_CAPABILITY = (8, 0)
SYMMETRIC_CAPABILITY = (8, 0)


def row_problem(dtype: torch.dtype, width: int) -> str | None:
    """RMSNorm and SwiGLU of liger-kernel: a program holds a row of this many features."""
    if not 1 <= width <= LIGER_ROW:
        return f"it takes rows of up to {LIGER_ROW} features and not {width}"
    return dtype_problem(dtype)


def rotary_problem(dtype: torch.dtype, head_dim: int, heads: int) -> str | None:
    """Rotary of liger-kernel: a program holds half of all heads of a token, each size rounded up to a power of two."""
    if head_dim < 2 or head_dim % 2:
        return f"it takes even head sizes and not {head_dim}"
    block = (1 << (heads - 1).bit_length()) * (1 << (head_dim - 1).bit_length()) // 2
    if block > TRITON_BLOCK:
        return f"{heads} heads of {head_dim} are more than a block of Triton holds"
    return dtype_problem(dtype)


def liger_problem(problem: str | None) -> str | None:
    """First whether liger-kernel is there at all, then what a kernel of it says."""
    return liger_missing() or problem


def loss_problem(dtype: torch.dtype) -> str | None:
    """Our kernels of the cross-entropy; a vocabulary of any size."""
    return triton_missing() or dtype_problem(dtype)


def flash_shape_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """Flash attention on a GPU that has it."""
    if dtype not in HALF:
        return f"flash attention takes float16, bfloat16 and not {name_of_dtype(dtype)}"
    if head_dim % 8 or not 8 <= head_dim <= FLASH_HEAD_DIM:
        return f"flash attention takes head sizes up to {FLASH_HEAD_DIM} that 8 divides, and not {head_dim}"
    if heads % groups:
        return f"the heads must be a multiple of the key/value groups, and are {heads} with {groups} groups"
    return None


def flash_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """varlen_attn, which runs flash attention only."""
    problem = flash_shape_problem(dtype, head_dim, heads, groups)
    if problem is not None:
        return problem
    # without a GPU there is nothing to ask: the choice is made for another machine
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH_CAPABILITY:
        return "flash attention needs compute capability 8.0 (Ampere) or newer"
    return varlen_missing(heads != groups)


def cached_flash_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """varlen_attn over rows of a cache of which it is told how many tokens it reads."""
    return flash_problem(dtype, head_dim, heads, groups) or varlen_missing(heads != groups, is_cached=True)


def weight_gradient_problem(x: torch.dtype, grad: torch.dtype, total: torch.dtype) -> str | None:
    """addmm of 16-bit factors into an fp32 sum."""
    if total != torch.float32:
        return f"it adds to float32 and not to {name_of_dtype(total)}"
    if x != grad:
        return f"input and gradient need one dtype and have {name_of_dtype(x)} and {name_of_dtype(grad)}"
    return dtype_problem(x, HALF) or addmm_missing()


def symmetric_memory_problem(ranks: int, here: int = 0) -> str | None:
    """Products over symmetric memory, for tensor parallel groups of GPUs of one node.

    Groups are made of neighbouring ranks, and a rank has the GPU of its number on the node.

    Args:
        ranks: of a group; with one rank the question is about pairs of GPUs.
        here: ranks on this node; 0 when nobody knows, then as many as it has GPUs.
    """
    problem = symmetric_memory_missing()
    # without a GPU there is nothing more to ask: the choice is made for another machine
    if problem is not None or not torch.cuda.is_available():
        return problem
    count, group = torch.cuda.device_count(), max(ranks, 2)
    if count < group:
        return f"it takes {group} GPUs of one node, and there {'is 1' if count == 1 else f'are {count}'}"
    if here % ranks:
        return f"{ranks} tensor parallel ranks must be on one node, and not spread over nodes of {here} ranks"
    for first in range(0, (here or count) - group + 1, group):
        for one, other in combinations(range(first, first + group), 2):
            if not torch.cuda.can_device_access_peer(one, other):
                return f"GPUs {one} and {other} do not reach each other's memory"
    if torch.cuda.get_device_capability() < SYMMETRIC_CAPABILITY:
        return "it needs compute capability 8.0 (Ampere) or newer"
    return None


def rows_problem(rows: int, ranks: int) -> str | None:
    """A product whose rows are shared among ranks."""
    return f"{ranks} ranks cannot share {rows} rows evenly" if rows % ranks else None
