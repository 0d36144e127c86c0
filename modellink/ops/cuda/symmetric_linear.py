"""Tensor parallel products over symmetric memory: GPUs of a node that reach each other's memory.

torch cuts such a product into one part for each rank, and computes one part while another is copied between two GPUs,
in a stream of its own. With a single queue to the GPU the streams would wait for each other.
"""

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.config import ConfigError
from modellink.ops.cuda.library import SYMMETRIC_MEMORY
from modellink.ops.cuda.limits import rows_problem
from modellink.ops.limits import require
from modellink.ops.overlapped_linear import ColumnLinear, OverlappedProducts, RowLinear

_started: set[str] = set()  # names of groups


def start(group: dist.ProcessGroup) -> None:
    """Have the ranks of a group map each other's memory, once for each group; all of them call this.

    The products would do so by themselves, and do it again where they need more; here a refusal is told from other
    failures.

    Raises:
        ConfigError: the driver refuses.
    """
    if group.group_name in _started:
        return
    memory: Any = importlib.import_module(SYMMETRIC_MEMORY)
    try:
        memory.get_symm_mem_workspace(group.group_name, min_size=1)
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"--use-symm-mem: the GPUs of {group.size()} tensor parallel ranks cannot map each other's "
                          f"memory ({said}); see that nvidia-smi topo -p2p r shows OK between them, or leave "
                          "--use-symm-mem out.") from error
    _started.add(group.group_name)


def gathered_product(x: Tensor, matrix: Tensor, group: dist.ProcessGroup, with_x: bool
                     ) -> tuple[Tensor, Tensor | None]:
    """All x @ matrix, and all x where it is asked for: [n, batch, in], [in, out] -> [ranks x n, batch, out], [ranks x
    n, batch, in]."""
    start(group)
    whole, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(
        x.contiguous(), [matrix], 0, group.group_name, return_A=with_x)
    return product, whole


def scattered_product(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum of x @ matrix: [ranks x n, batch, in], [in, out] -> [n, batch, out]."""
    require("symm_mem.fused_matmul_reduce_scatter", rows_problem(x.shape[0], group.size()))
    start(group)
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, matrix, "sum", 0, group.group_name)


def products(group: dist.ProcessGroup) -> OverlappedProducts:
    """The two products over a group."""
    return OverlappedProducts(group, lambda x, matrix, with_x: gathered_product(x, matrix, group, with_x),
                              lambda x, matrix: scattered_product(x, matrix, group))


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
    """As `modellink.ops.parallel_linear.column_linear`."""
    return ColumnLinear.apply(x, weight, products(group), accumulate)


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
    """As `modellink.ops.parallel_linear.row_linear`."""
    return RowLinear.apply(x, weight, products(group), accumulate)
