"""RMSNorm, rotation and SwiGLU by liger-kernel's Triton kernels; no input and no gradient is overwritten."""

import torch
from torch import Tensor

from modellink.ops.cuda.library import liger
from modellink.ops.cuda.limits import liger_problem, rotary_problem, row_problem
from modellink.ops.limits import require, rotary_shape_problem, swiglu_shape_problem

# all arithmetic in fp32, one rounding at the end, as in our formulas; the name is that of the model that does it so
ALL_IN_FP32 = "gemma"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `modellink.ops.rms_norm.rms_norm`."""
    require("RMSNorm of liger-kernel", liger_problem(row_problem(x.dtype, x.shape[-1])))
    offset, in_place = 0.0, False  # in place it would overwrite the gradient that other nodes may hold too
    return liger("rms_norm").apply(x, weight, eps, offset, ALL_IN_FP32, in_place)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `modellink.ops.rotary.rotate`: without autograd.

    The kernel works in place on queries and keys [batch, sequence, heads, head_dim]; it is compiled for every batch
    size, and not for every length. Our tokens are one sequence of it, so that x keeps its order in memory; it rotates a
    copy, beside one head that nobody reads. The table is widened to fp32, in which the kernel then computes.
    """
    require("rotary of liger-kernel", rotary_shape_problem(x))
    length, batch, heads, head_dim = x.shape
    require("rotary of liger-kernel", liger_problem(rotary_problem(x.dtype, head_dim, heads)))
    tokens = length * batch
    wide_cos, wide_sin = (part[..., :head_dim // 2].float().expand(length, batch, 1, -1).reshape(1, tokens, -1)
                          for part in (cos, sin))
    out = x.clone(memory_format=torch.contiguous_format).view(1, tokens, heads, head_dim)
    unread = torch.zeros(1, tokens, 1, head_dim, dtype=x.dtype, device=x.device)
    # it swaps the two dimensions of its arguments back itself
    rotated, _ = liger("rotary").apply(out.transpose(1, 2), unread.transpose(1, 2), wide_cos, wide_sin, None, 1,
                                       head_dim)
    return rotated.transpose(1, 2).view(x.shape)


def swiglu(x: Tensor) -> Tensor:
    """As `modellink.ops.swiglu.swiglu`."""
    problem = row_problem(x.dtype, x.shape[-1] // 2) or swiglu_shape_problem(x)
    require("SwiGLU of liger-kernel", liger_problem(problem))
    # two dimensions: its backward gives the gradient back in two, whatever the shape of the input was (0.8.5)
    out = liger("swiglu").apply(x.reshape(-1, x.shape[-1]), False)
    return out.view(*x.shape[:-1], x.shape[-1] // 2)
