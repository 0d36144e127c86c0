"""Column and row parallel layers under sequence parallelism, over products that overlap their communication.

Such products have no autograd; these functions are the derivatives. A gather in one direction is a reduce-scatter in
the other, so that a device gives two products and gets both layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.ops.parallel_linear import accumulate_weight_gradient


@dataclass(frozen=True)
class OverlappedProducts:
    """A device's products over one tensor parallel group.

    Attributes:
        group: the group.
        gathered: all x @ matrix, and all x, which may be None unless the flag asks for it: [n, batch, in], [in, out],
            bool -> [ranks x n, batch, out], [ranks x n, batch, in].
        scattered: this rank's rows of the sum of x @ matrix: [ranks x n, batch, in], [in, out] -> [n, batch, out].
    """

    group: dist.ProcessGroup
    gathered: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    scattered: Callable[[Tensor, Tensor], Tensor]


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, accumulate: bool) -> Tensor:
    """The gradient of weight [out, in] for x [tokens, in] and grad [tokens, out].

    With `accumulate` it goes to the main gradient, as megatron-core's layers do it, and autograd gets an empty one.
    """
    if not accumulate:
        return grad.t() @ x
    main: Any = weight
    accumulate_weight_gradient(x, grad, main.main_grad)
    main.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class ColumnLinear(torch.autograd.Function):
    """y = X w' with X = all x. X is not kept, that would undo sequence parallelism: the backward gathers it again.

    It does so beside a plain product, and sums the result beside another one: an overlapped product may work on the
    communicator of the group (MC2 does), and has no place between two collectives that are under way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: OverlappedProducts, accumulate: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.accumulate = products.group, accumulate
        return products.gathered(x, weight.t(), False)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad, grad_weight = grads[0].contiguous(), None
        if ctx.needs_input_grad[1]:
            whole = x.new_empty(grad.shape[0], *x.shape[1:])
            gather = dist.all_gather_into_tensor(whole, x.contiguous(), group=ctx.group, async_op=True)
        product, grad_x = grad @ weight, torch.empty_like(x, memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[1]:
            gather.wait()
        scatter = dist.reduce_scatter_tensor(grad_x, product, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(whole.flatten(0, 1), grad.flatten(0, 1), weight, ctx.accumulate)
        scatter.wait()
        return grad_x, grad_weight, None, None


class RowLinear(torch.autograd.Function):
    """y = the own rows of the sum of x w'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: OverlappedProducts, accumulate: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.accumulate = products, accumulate
        return products.scattered(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x, whole = ctx.products.gathered(grads[0], weight, ctx.needs_input_grad[1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x.flatten(0, 1), whole.flatten(0, 1), weight, ctx.accumulate)
        return grad_x, grad_weight, None, None
