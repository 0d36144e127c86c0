"""Causal attention with grouped queries; the scores are never held."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """Causal attention.

    With fewer queries than keys the queries are the last positions (lower-right causal): a decode step, or several
    tokens at an offset against a cache.

    Args:
        query: [query_length, batch, heads, head_dim].
        key, value: [key_length, batch, groups, head_dim]; heads is a multiple of groups.
        scale: factor on the scores (default 1 / sqrt(head_dim)).
        cu_seqlens: boundaries of samples packed along the sequence with batch 1; no sample sees another.

    Returns:
        [query_length, batch, heads * head_dim] in the dtype of query.
    """
    if cu_seqlens is not None:
        parts = [_attend(query[start:end], key[start:end], value[start:end], scale)
                 for start, end in zip(cu_seqlens, cu_seqlens[1:])]
        return torch.cat(parts)
    return _attend(query, key, value, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    query_length, batch, heads, head_dim = query.shape
    key_length, groups = key.shape[0], key.shape[2]
    mask = None
    if 1 < query_length < key_length:
        rows = torch.arange(key_length - query_length, key_length, device=query.device)
        mask = torch.arange(key_length, device=query.device)[None] <= rows[:, None]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=query_length == key_length > 1,
                                       scale=scale, enable_gqa=heads != groups)
    return out.permute(2, 0, 1, 3).reshape(query_length, batch, heads * head_dim)
