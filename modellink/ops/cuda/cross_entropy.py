"""Cross-entropy on GPUs in two Triton kernels: one pass over the logits for the loss, one in place for the gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.ops.cross_entropy import log_sum_over_ranks, words_of_rank
from modellink.ops.cuda.limits import loss_problem
from modellink.ops.limits import require

# columns that a program of 8 warps holds at a time: 16 in each thread
_BLOCK, _WARPS = 4096, 8


class _TritonCrossEntropy(torch.autograd.Function):
    """The forward leaves the logits alone, so that a loss has the same bits with and without a gradient, and fp16 keeps
    small probabilities until the backward brings the loss scale."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
        from modellink.ops.cuda.triton_cross_entropy import statistics

        rank = group.rank() if group is not None else 0
        rows = logits.shape[-1]
        x, ids = logits.view(-1, rows), target.reshape(-1)
        real = words_of_rank(real_rows, rank, rows)
        maximum = torch.empty(len(ids), device=x.device)
        sums = torch.empty(2, len(ids), device=x.device)  # [sum of exponentials, target logit]
        if len(ids):
            statistics[(len(ids),)](x, ids, maximum, sums[0], sums[1], rank * rows, rows, real, BLOCK=_BLOCK,
                                    num_warps=_WARPS)
        log_sum = log_sum_over_ranks(maximum, sums, group)
        ctx.save_for_backward(logits, ids, log_sum)
        ctx.first, ctx.real = rank * rows, real
        return (log_sum - sums[1]).view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from modellink.ops.cuda.triton_cross_entropy import derivative

        logits, ids, log_sum = ctx.saved_tensors
        rows, slope = logits.shape[-1], grads[0].reshape(-1).float().contiguous()
        if len(ids):
            derivative[len(ids), -(-rows // _BLOCK)](logits, ids, log_sum, slope, ctx.first, rows, ctx.real,
                                                     BLOCK=_BLOCK, num_warps=_WARPS)
        # autograd does not see a kernel write: a second backward over these logits has to be refused
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None


def cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
    """As `modellink.ops.cross_entropy.vocab_parallel_cross_entropy`; the backward overwrites the logits."""
    require("cross-entropy in Triton", loss_problem(logits.dtype))
    return _TritonCrossEntropy.apply(logits, target, group, real_rows)
