"""Cross-entropy over a vocabulary that is split over tensor parallel ranks; no fp32 copy of the logits is held.

loss = log(sum_j exp(x_j)) - x_target, with the maximum and the sum reduced over the ranks. Logits are read in
chunks of tokens; the gradient is written into the storage of the logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.ops.forms import form_of

# Tokens of one chunk. A small chunk stays in the CPU's cache (measured: 16 is fastest on a CPU); an accelerator
# wants enough work for one launch.
_CHUNK = {"cpu": 16}
_CHUNK_ACCELERATOR = 1024


def words_of_rank(real_rows: int, rank: int, rows: int) -> int:
    """Rows of a rank's part of the vocabulary that are words and no padding, which is at the end of the last parts."""
    return min(max(real_rows - rank * rows, 0), rows)


def log_sum_over_ranks(maximum: Tensor, sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Logarithm of the sum of exponentials over the whole vocabulary.

    Args:
        maximum: [tokens] fp32, of this rank's logits; overwritten.
        sums: [2, tokens] fp32, this rank's sum of exponentials above its maximum, and the target logit where this rank
            has the word, 0 elsewhere; overwritten with those of all ranks.
        group: tensor parallel group; None for one rank.

    Returns:
        [tokens] fp32.
    """
    if group is not None and group.size() > 1:
        own_maximum = maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        sums[0] *= (own_maximum - maximum).exp()
        dist.all_reduce(sums, group=group)
    return maximum + sums[0].log()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
        rank = group.rank() if group is not None else 0
        rows = logits.shape[-1]
        x = logits.view(-1, rows)
        real = words_of_rank(real_rows, rank, rows)
        local = target.reshape(-1) - rank * rows
        owned = (local >= 0) & (local < real)
        local = local.clamp(0, rows - 1)
        chunk = _CHUNK.get(x.device.type, _CHUNK_ACCELERATOR)

        tokens = x.shape[0]
        maximum = torch.full((tokens,), torch.finfo(torch.float32).min, device=x.device)
        sums = torch.zeros(2, tokens, device=x.device)  # [sum of exponentials, target logit]
        if real:
            for start in range(0, tokens, chunk):
                part = x[start:start + chunk, :real].to(torch.float32, copy=True)
                top = part.amax(-1)
                maximum[start:start + chunk] = top
                sums[0, start:start + chunk] = part.sub_(top[:, None]).exp_().sum(-1)
        sums[1] = torch.where(owned, x.gather(1, local[:, None])[:, 0].float(), 0.0)
        log_sum = log_sum_over_ranks(maximum, sums, group)
        ctx.save_for_backward(logits, log_sum, local, owned)
        ctx.real, ctx.chunk = real, chunk
        return (log_sum - sums[1]).view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, log_sum, local, owned = ctx.saved_tensors
        x = logits.view(-1, logits.shape[-1])
        grad = grads[0].reshape(-1).float()
        real, chunk = ctx.real, ctx.chunk
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = x[rows, :real].to(torch.float32, copy=True).sub_(log_sum[rows, None]).exp_()
            if real:
                part.scatter_add_(1, local[rows, None].clamp(max=real - 1), -owned[rows, None].float())
            x[rows, :real] = part.mul_(grad[rows, None])
        x[:, real:] = 0
        return logits, None, None, None


class _OneRankCrossEntropy(torch.autograd.Function):
    """Where one rank holds the whole vocabulary, the forward already leaves the derivative in the logits' storage.

    d loss / dx = softmax(x) - [target] is computed beside the loss, while the chunk is in the cache; the backward has
    only to multiply rows by the gradient of their loss, which is 1 in training unless they are masked or weighted.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, real: int, is_learning: bool) -> Tensor:
        x, ids = logits.view(-1, logits.shape[-1]), target.reshape(-1, 1)
        losses = torch.empty(x.shape[0])
        buffer = torch.empty(_CHUNK["cpu"], real)
        for start in range(0, x.shape[0], len(buffer)):
            rows = slice(start, start + len(buffer))
            part = buffer[:len(x[rows])].copy_(x[rows, :real])
            top, at = part.amax(-1), part.gather(1, ids[rows])[:, 0]
            torch.softmax(part, -1, out=part)
            # the probability of the largest is one over the sum of exponentials
            losses[rows] = top - at - part.amax(-1).log_()
            if is_learning:
                x[rows, :real] = part.scatter_add_(1, ids[rows], torch.full_like(part[:, :1], -1.0))
        if is_learning:
            x[:, real:] = 0
            ctx.save_for_backward(logits)
        return losses.view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        x, grad = logits.view(-1, logits.shape[-1]), grads[0].reshape(-1)
        for part, factors in zip(x.split(_CHUNK["cpu"]), grad.split(_CHUNK["cpu"])):
            if (factors != 1).any():
                part.mul_(factors[:, None])
        return logits, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None,
                                 real_rows: int) -> Tensor:
    """Loss of every token. The forward or the backward overwrites logits that have a gradient, so
    nothing else may need them afterwards.

    Args:
        logits: [sequence, batch, vocabulary rows / TP], contiguous, fp32, bf16 or fp16.
        target: [sequence, batch] int64, ids below `real_rows`.
        group: tensor parallel group; None for one rank.
        real_rows: words of the vocabulary; rows from here on are padding and enter neither loss nor gradient.

    Returns:
        [sequence, batch] fp32.
    """
    return form_of("cross_entropy", logits.device.type, torch_cross_entropy)(logits, target, group, real_rows)


def torch_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
    """The portable form."""
    return _VocabParallelCrossEntropy.apply(logits, target, group, real_rows)


def one_rank_problem(dtype: torch.dtype, *, is_split: bool) -> str | None:
    """Why the derivative cannot be left beside the loss, or None; `is_split`: over tensor parallel ranks."""
    if is_split:
        return "the vocabulary is split over tensor parallel ranks"
    # its small probabilities live only after the loss scale, which the backward brings
    return "float16 needs the loss scale before it" if dtype == torch.float16 else None


def cpu_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
    """The form for the CPU, where passes over memory are what it costs.

    The loss is the same to the last bit without a gradient: a preference compares it with that of a frozen model.
    Where `one_rank_problem` says why not, it is the portable form.
    """
    if one_rank_problem(logits.dtype, is_split=group is not None):
        return torch_cross_entropy(logits, target, group, real_rows)
    # inside the function grad mode is always off
    is_learning = torch.is_grad_enabled() and logits.requires_grad
    return _OneRankCrossEntropy.apply(logits, target, min(real_rows, logits.shape[-1]), is_learning)
