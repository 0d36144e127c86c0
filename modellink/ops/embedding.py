"""The look-up of rows, and its gradient, which touches only the rows that were looked up."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding as torch_embedding

from modellink.ops.parallel_linear import accumulates_weight_gradients


class _Embedding(torch.autograd.Function):
    """Adds its gradient to the main gradient in fp32 and tells so as the core's linear layers do."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return torch_embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ids, weight = ctx.saved_tensors
        weight.main_grad.index_add_(0, ids.flatten(), grads[0].flatten(0, -2).to(weight.main_grad.dtype))
        weight.grad_added_to_main_grad = True
        # autograd wants one; with tied weights it is added to that of the head
        return None, (torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like)(weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table.

    A gradient of its own for every row would be zeros but for the few of a microbatch, to be added all the same.

    Args:
        ids: integers of any shape.
        weight: [rows, hidden].

    Returns:
        [*ids.shape, hidden].
    """
    if weight.requires_grad and hasattr(weight, "main_grad") and accumulates_weight_gradients(weight.device.type):
        return _Embedding.apply(ids, weight)
    return torch_embedding(ids, weight)
