"""Causal attention of short samples by tiles of queries, whose scores stay in the cache.

Above the diagonal nothing is computed. After Dao et al. 2022 (https://arxiv.org/abs/2205.14135), with all keys that a
tile sees at once: a row of scores is whole, so nothing is rescaled. With P = softmax(scale Q K') and D = dO V' the
gradient of the scores is P (D - sum(dO O)). Everything is computed in fp32; bf16 and fp16 are widened before.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modellink.ops.attention import torch_attention

# from 1024 tokens on torch's kernel is as fast in fp32, and faster in 16 bits
LONGEST = 512
_ROWS = 64  # queries of a tile
_CACHED_SCORES = 1 << 18  # of one core: 1 MiB


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`; long samples, and more keys than queries, go to torch's kernel.

    Without a gradient too: recomputed activations are those of the first pass.
    """
    bounds = cu_seqlens or [0, query.shape[0]]
    longest = max(b - a for a, b in pairwise(bounds))
    if longest > LONGEST or query.shape[0] != key.shape[0] or query.dtype == torch.float64:
        return torch_attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lengths = [b - a for a, b in pairwise(bounds)]
    # split has one backward for all parts; each slice would fill a row of zeros
    parts = [_TiledAttention.apply(*part, scale) for part in zip(*(x.split(lengths) for x in (query, key, value)))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        wide_query, wide_key, wide_value = query.float(), key.float(), value.float()
        out = torch.empty(query.shape)
        log_sums = torch.empty(query.shape[:3])
        hidden = _hidden_places()
        for start, end, (q, o, log_sum), (k, v) in _tiles((wide_query, out, log_sums), (wide_key, wide_value)):
            scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
            scores[:, :, start:] += hidden[:end - start, :end - start]
            top = scores.amax(-1)
            torch.softmax(scores, -1, out=scores)
            # the largest weight is one over the sum of exponentials
            log_sum.copy_(top.sub_(scores.amax(-1).log_()))
            o.copy_(torch.bmm(scores, v))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scale = scale
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grads[0].reshape(out.shape).float()
        shares = (grad * out).sum(-1)
        grad_query, grad_key, grad_value = torch.empty(query.shape), torch.zeros(key.shape), torch.zeros(value.shape)
        hidden = _hidden_places()
        for start, end, (q, g, grad_q, log_sum, share), (k, v, grad_k, grad_v) in _tiles(
                (query.float(), grad, grad_query, log_sums, shares),
                (key.float(), value.float(), grad_key, grad_value)):
            weights = torch.baddbmm(log_sum[..., None], q, k.transpose(1, 2), beta=-1, alpha=ctx.scale)
            weights[:, :, start:] += hidden[:end - start, :end - start]
            weights.exp_()
            grad_v.baddbmm_(weights.transpose(1, 2), g)
            slope = torch.baddbmm(share[..., None], g, v.transpose(1, 2), beta=-1).mul_(weights)
            grad_q.copy_(torch.bmm(slope, k)).mul_(ctx.scale)
            grad_k.baddbmm_(slope.transpose(1, 2), q, alpha=ctx.scale)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _hidden_places() -> Tensor:
    """What is added to the scores on the diagonal of a tile."""
    return torch.full((_ROWS, _ROWS), float("-inf")).triu_(1)


def _tiles(per_query: tuple[Tensor, ...], per_key: tuple[Tensor, ...]
           ) -> Iterator[tuple[int, int, list[Tensor], list[Tensor]]]:
    """Views on one tile after another.

    Args:
        per_query: [length, batch, heads, ...] each.
        per_key: [length, batch, groups, ...] each.

    Yields:
        (first position, position behind the last, views [n, end - start, ...], views [n, end, ...]) with n
        sequences of one head each.
    """
    length, batch, groups = per_key[0].shape[:3]
    sequences = batch * groups
    for member in range(per_query[0].shape[2] // groups):  # query heads that share a key
        queries = [x.unflatten(2, (groups, -1))[:, :, :, member].flatten(1, 2).transpose(0, 1) for x in per_query]
        keys = [x.flatten(1, 2).transpose(0, 1) for x in per_key]
        for start in range(0, length, _ROWS):
            end = min(start + _ROWS, length)
            some = max(1, torch.get_num_threads() * _CACHED_SCORES // ((end - start) * end))
            for first in range(0, sequences, some):
                yield (start, end, [x[first:first + some, start:end] for x in queries],
                       [x[first:first + some, :end] for x in keys])
