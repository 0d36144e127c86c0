"""Causal attention of short samples by tiles of queries, whose scores stay in the cache.

Above the diagonal nothing is computed. After Dao et al. 2022 (https://arxiv.org/abs/2205.14135), with all keys that a
tile sees at once: a row of scores is whole, so nothing is rescaled, and the softmax of the backward is that of the
forward again. With P = softmax(scale Q K') and D = dO V' the gradient of the scores is P (D - sum(P D)). Everything is
computed in fp32; bf16 and fp16 are widened before.
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
_CACHED_SCORES = 1 << 19  # of one core: 2 MiB


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
        out = torch.empty(query.shape)
        for start, (q, o), (k, v) in _tiles((query.float(), out), (key.float(), value.float())):
            o.copy_(torch.bmm(_weights(q, k, start, scale), v))
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return out.to(query.dtype).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        grad, grad_query = grads[0].reshape(query.shape).float(), torch.empty(query.shape)
        length, batch, groups, width = key.shape
        # a sequence of a head after another: torch adds products in place sequence by sequence elsewhere
        grad_key, grad_value = torch.zeros(2, batch, groups, length, width).permute(0, 3, 1, 2, 4)
        for start, (q, g, grad_q), (k, v, grad_k, grad_v) in _tiles(
                (query.float(), grad, grad_query), (key.float(), value.float(), grad_key, grad_value)):
            weights = _weights(q, k, start, ctx.scale)
            grad_v.add_(torch.bmm(weights.transpose(1, 2), g))
            slope = torch.bmm(g, v.transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(slope, weights, -1, torch.float32, grad_input=slope)
            torch.mul(torch.bmm(slope, k), ctx.scale, out=grad_q)
            grad_k.add_(torch.bmm(slope.transpose(1, 2), q), alpha=ctx.scale)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _weights(query: Tensor, key: Tensor, start: int, scale: float) -> Tensor:
    """softmax(scale Q K') of a tile.

    Args:
        query: [n, rows, head_dim], at the positions from `start` on.
        key: [n, start + rows, head_dim].

    Returns:
        [n, rows, start + rows], zero above the diagonal.
    """
    scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)
    rows = query.shape[1]
    scores[:, :, start:] += torch.full((rows, rows), float("-inf")).triu_(1)
    return torch.softmax(scores, -1, out=scores)


def _tiles(per_query: tuple[Tensor, ...], per_key: tuple[Tensor, ...]
           ) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """Views on one tile after another.

    Args:
        per_query: [length, batch, heads, ...] each.
        per_key: [length, batch, groups, ...] each.

    Yields:
        (first position, views [n, rows, ...], views [n, first position + rows, ...]) with
        n sequences of one head each.
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
                yield (start, [x[first:first + some, start:end] for x in queries],
                       [x[first:first + some, :end] for x in keys])
