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
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        places, grad = ids.flatten(), grads[0].flatten(0, -2).to(weight.main_grad.dtype)
        if weight.is_cuda:  # it sorts the places; index_add_ adds to a row in any order there, and rounds as it comes
            weight.main_grad.index_put_((places,), grad, accumulate=True)
        else:
            weight.main_grad.index_add_(0, places, grad)
        weight.grad_added_to_main_grad = True
        # the hooks of data parallelism want one, and nobody reads it
        return None, None if getattr(weight, "head_gives_gradient", False) else torch.empty_like(weight)


def leave_gradient_to_head(weight: Any) -> None:
    """For a table that is also the head of its stage, and whose look-ups all go through `embedding`.

    megatron-core marks it (`zero_out_wgrad`): autograd adds up what head and embedding hand it, and the sum goes to the
    main gradient, so that a head which has added its own hands a table of zeros. Here both add their own: the embedding
    hands none, and what the head hands is all that the hooks see, after both, and may be an empty table that nobody
    reads.

    Args:
        weight: [rows, hidden], a parameter with a main gradient.
    """
    if getattr(weight, "zero_out_wgrad", False):
        weight.zero_out_wgrad, weight.head_gives_gradient = False, True


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
