"""Weight gradients on GPUs: cuBLAS adds a product of 16-bit factors to an fp32 matrix within the product."""

import torch
from torch import Tensor

from modellink.ops.cuda.limits import weight_gradient_problem
from modellink.ops.limits import require


def accumulate_weight_gradient(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """As `modellink.ops.parallel_linear.accumulate_weight_gradient`; nothing is rounded to 16 bits on the way."""
    require("addmm with an fp32 sum", weight_gradient_problem(x.dtype, grad.dtype, total.dtype))
    torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
