"""Linear layers of one rank in fp32 through oneDNN.

torch multiplies fp32 matrices on the CPU with MKL, which uses AVX-512 on processors of Intel alone. oneDNN uses it
wherever it is there (measured on an AMD EPYC 9004: 110 against 103 GFLOP/s of a core).
"""

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from modellink.device.cpu import LARGEST_ON_HEAP
from modellink.ops.cpu import workspace
from modellink.ops.forms import Situation, name_of_dtype
from modellink.ops.parallel_linear import accumulate_weight_gradient

_LARGEST_PART = LARGEST_ON_HEAP // 2  # bytes; on the heap, so that each part has the memory of the last
_FEWEST_COLUMNS = 256  # of a part; fewer make a slow product


def problem(situation: Situation) -> str | None:
    """Why this form is not used, or None."""
    if situation.dtype != torch.float32:
        return f"for float32 and not {name_of_dtype(situation.dtype)}, which torch gives to oneDNN itself"
    if situation.tensor > 1:
        return "megatron-core's layers communicate"
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "it needs oneDNN and AVX-512"
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, shape = x.flatten(0, -2), [*x.shape[:-1], weight.shape[0]]
    columns = _LARGEST_PART // (4 * rows.shape[0])
    if rows.shape[0] * weight.shape[0] * 4 <= LARGEST_ON_HEAP or columns < _FEWEST_COLUMNS:
        # no view: the loss writes its derivative into its input
        return torch.ops.aten._unsafe_view(_onednn(rows, weight, bias), shape)
    # oneDNN writes to fresh memory alone: parts of it that stay in the process are copied
    out = workspace.empty(shape)
    biases = bias.split(columns) if bias is not None else repeat(None)
    for target, part, its_bias in zip(out.view(len(rows), -1).split(columns, 1), weight.split(columns), biases):
        target.copy_(_onednn(rows, part, its_bias))
    return out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """As the core's linear layer on one rank, which tells by `grad_added_to_main_grad` where the gradient went."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
        # a frozen weight asks for no input
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.accumulate = accumulate
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_rows, grad_weight = grad.flatten(0, -2), None
        if ctx.needs_input_grad[1] and ctx.accumulate:
            accumulate_weight_gradient(x.flatten(0, -2), grad_rows, weight.main_grad)
            weight.grad_added_to_main_grad = True
            # autograd wants one; with tied weights it is added to that of the embedding
            grad_weight = (torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like)(weight)
        elif ctx.needs_input_grad[1]:
            grad_weight = grad_rows.t() @ x.flatten(0, -2)
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.needs_input_grad[2] else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
    """As what `modellink.ops.parallel_linear.own_linear` gives."""
    return _Linear.apply(x, weight, bias, accumulate)
