"""RMSNorm, rotation and SwiGLU by torch_npu's fused kernels."""

import torch
from torch import Tensor

from modellink.ops.limits import dtype_problem, rotary_shape_problem, swiglu_shape_problem
from modellink.ops.npu.library import torch_npu
from modellink.ops.npu.limits import require, rotary_problem


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `modellink.ops.rms_norm.rms_norm`."""
    problem = dtype_problem(x.dtype)
    if problem is None and weight.dtype not in (x.dtype, torch.float32):
        problem = f"the weight must be float32 or of the input's dtype, and is {weight.dtype} beside {x.dtype}"
    require("npu_rms_norm", problem)
    return torch_npu().npu_rms_norm(x, weight, epsilon=eps)[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `modellink.ops.rotary.rotate`: without autograd, whose node would keep x.

    The layout is SBND with cosines and sines of S1..D, one value for each element of a head.
    """
    require("npu_rotary_mul", rotary_shape_problem(x))
    require("npu_rotary_mul", rotary_problem(x.dtype, x.shape[-1], x.shape[1], x.shape[2]))
    return torch_npu().npu_rotary_mul(x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    """As `modellink.ops.swiglu.swiglu`."""
    require("npu_swiglu", dtype_problem(x.dtype) or swiglu_shape_problem(x))
    return torch_npu().npu_swiglu(x.contiguous(), dim=-1)
