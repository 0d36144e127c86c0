"""`npu_matmul_add_fp32` with the signature and meaning of its page, docs/ops/npu_matmul_add.md of Ascend/MindSpeed."""

import torch
from torch import Tensor

calls = 0


def npu_matmul_add_fp32(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """grad [out, in] fp32 += grad_output [tokens, out]' total_input [tokens, in]."""
    global calls
    if grad.dtype != torch.float32 or total_input.dtype != grad_output.dtype:
        raise RuntimeError("stand-in: the sum is fp32 and both factors have one dtype")
    if not (total_input.dim() == grad_output.dim() == 2 and total_input.shape[0] == grad_output.shape[0]):
        raise RuntimeError("stand-in: two matrices with a row for each token")
    calls += 1
    grad += grad_output.float().t() @ total_input.float()
