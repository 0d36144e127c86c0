"""MC2: tensor parallel products that overlap their communication, and the weight gradient added inside its product.

An operator of MC2 works on the communicator of the group, so none starts while another collective of the group is under
way.
"""

import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.ops.npu.library import torch_npu
from modellink.ops.npu.limits import GROUPED_WIDTH, mc2_problem, require, weight_gradient_problem
from modellink.ops.overlapped_linear import ColumnLinear, OverlappedProducts, RowLinear
from modellink.ops.parallel_linear import torch_accumulate


def communicator(group: dist.ProcessGroup) -> str:
    """The name by which MC2's operators know the group's HCCL communicator."""
    backend: Any = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(dist.get_rank())


def gathered_product(x: Tensor, matrix: Tensor, name: str, ranks: int) -> tuple[Tensor, Tensor]:
    """All x @ matrix, and all x: [n, batch, in], [in, out] -> [ranks x n, batch, out], [ranks x n, batch, in]."""
    require("npu_all_gather_base_mm", mc2_problem(x.dtype, ranks, x.shape[-1]))
    flat = x.flatten(0, 1).contiguous()  # the left factor may not be transposed
    product, whole = torch_npu().npu_all_gather_base_mm(flat, matrix, name, ranks, gather_output=True)
    lead = (x.shape[0] * ranks, x.shape[1])
    return product.view(*lead, -1), whole.view(*lead, -1)


def scattered_product(x: Tensor, matrix: Tensor, name: str, ranks: int) -> Tensor:
    """This rank's rows of the sum of x @ matrix: [ranks x n, batch, in], [in, out] -> [n, batch, out]."""
    require("npu_mm_reduce_scatter_base", mc2_problem(x.dtype, ranks, x.shape[-1]))
    flat = x.flatten(0, 1).contiguous()
    product = torch_npu().npu_mm_reduce_scatter_base(flat, matrix, name, ranks, reduce_op="sum")
    return product.view(x.shape[0] // ranks, x.shape[1], -1)


def products(group: dist.ProcessGroup) -> OverlappedProducts:
    """MC2's two products over a group."""
    name, ranks = communicator(group), group.size()
    return OverlappedProducts(group, lambda x, matrix, with_x: gathered_product(x, matrix, name, ranks),
                              lambda x, matrix: scattered_product(x, matrix, name, ranks))


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
    """As `modellink.ops.parallel_linear.column_linear`."""
    return ColumnLinear.apply(x, weight, products(group), accumulate)


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
    """As `modellink.ops.parallel_linear.row_linear`."""
    return RowLinear.apply(x, weight, products(group), accumulate)


@functools.lru_cache(maxsize=64)  # packed and variable batches have many lengths
def one_group(tokens: int, device: torch.device) -> Tensor:
    """[1] int64, the end of the only group: filled on the device once, where a copy of a number would wait for it."""
    return torch.full((1,), tokens, dtype=torch.int64, device=device)


def accumulate_grouped(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """As `modellink.ops.parallel_linear.accumulate_weight_gradient`, by a grouped product with one group.

    The portable form does the layers that are too wide for the operator: the output layer of a large vocabulary.
    """
    require("npu_grouped_matmul_add_", weight_gradient_problem(x.dtype, total.dtype))
    if max(total.shape) > GROUPED_WIDTH:
        torch_accumulate(x, grad, total)
        return
    torch_npu().npu_grouped_matmul_add_(total[None], grad, x, one_group(x.shape[0], x.device), transpose_x=True,
                                        transpose_weight=False, group_type=2)


def accumulate_mindspeed(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """As `modellink.ops.parallel_linear.accumulate_weight_gradient`, by MindSpeed's product that adds."""
    require("npu_matmul_add_fp32 (mindspeed)", weight_gradient_problem(x.dtype, total.dtype))
    importlib.import_module("mindspeed.ops.npu_matmul_add").npu_matmul_add_fp32(x, grad, total)
