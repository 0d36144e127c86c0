"""What Triton kernels, flash attention and addmm take, as checks before the call.

Sources: liger_kernel/ops of liger-kernel 0.8.5 (the dtypes it maps to Triton's, MAX_FUSED_SIZE), Triton's largest block
(2^20 elements), the conditions under which torch's flash attention runs (aten/src/ATen/native/transformers/cuda), and
what addmm with an out_dtype checks (aten/src/ATen/native/cuda/Blas.cpp). A `..._problem` function gives a few words, or
None.
"""

import torch

from modellink.ops.cuda.library import addmm_missing, liger_missing, triton_missing, varlen_missing
from modellink.ops.forms import name_of_dtype
from modellink.ops.limits import HALF, dtype_problem
from modellink.ops.limits import require as require  # the forms of this folder take it from here, beside the limits

LIGER_ROW = 65536
TRITON_BLOCK = 1 << 20
# its backward knows wider heads on some chips only
FLASH_HEAD_DIM = 192
FLASH_CAPABILITY = (8, 0)


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


def flash_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """varlen_attn, which runs flash attention only."""
    if dtype not in HALF:
        return f"flash attention takes float16, bfloat16 and not {name_of_dtype(dtype)}"
    if head_dim % 8 or not 8 <= head_dim <= FLASH_HEAD_DIM:
        return f"flash attention takes head sizes up to {FLASH_HEAD_DIM} that 8 divides, and not {head_dim}"
    if heads % groups:
        return f"the heads must be a multiple of the key/value groups, and are {heads} with {groups} groups"
    # without a GPU there is nothing to ask: the choice is made for another machine
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH_CAPABILITY:
        return "flash attention needs compute capability 8.0 (Ampere) or newer"
    return varlen_missing(heads != groups)


def weight_gradient_problem(x: torch.dtype, grad: torch.dtype, total: torch.dtype) -> str | None:
    """addmm of 16-bit factors into an fp32 sum."""
    if total != torch.float32:
        return f"it adds to float32 and not to {name_of_dtype(total)}"
    if x != grad:
        return f"input and gradient need one dtype and have {name_of_dtype(x)} and {name_of_dtype(grad)}"
    return dtype_problem(x, HALF) or addmm_missing()
