"""Causal attention with grouped queries; the scores are never held."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modellink.ops.forms import form_of


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row of a cache that a pass reads; all its layers share one.

    Attributes:
        counts: [rows] int32, on the device of the rows.
        longest: no row is longer.
        host: the same numbers on the host; None where only the device knows them, as in a recorded step.
    """

    counts: Tensor
    longest: int
    host: Sequence[int] | None = None
    _starts: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def starts(self, step: int) -> Tensor:
        """Where rows begin that lie `step` tokens apart, and the end, [rows + 1] int32; made once for all layers."""
        if step not in self._starts:
            end = len(self.counts) * step
            self._starts[step] = torch.arange(0, end + 1, step, dtype=torch.int32, device=self.counts.device)
        return self._starts[step]


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """Causal attention.

    With fewer queries than keys the queries are the last positions (lower-right causal).

    Args:
        query: [query_length, batch, heads, head_dim].
        key, value: [key_length, batch, groups, head_dim]; heads is a multiple of groups.
        scale: factor on the scores (default 1 / sqrt(head_dim)).
        cu_seqlens: boundaries of samples packed along the sequence with batch 1; no sample sees another.

    Returns:
        [query_length, batch, heads * head_dim] in the dtype of query.
    """
    form = form_of("attention", query.device.type, torch_attention)
    return form(query, key, value, scale=scale, cu_seqlens=cu_seqlens)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
                    cu_seqlens: list[int] | None = None) -> Tensor:
    """The portable form: torch's scaled_dot_product_attention, once for each packed sample."""
    if cu_seqlens is not None:
        # split has one backward for all parts; each slice would fill a row of zeros
        lengths = [end - start for start, end in pairwise(cu_seqlens)]
        parts = [_attend(q, k, v, scale) for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)))]
        return torch.cat(parts)
    return _attend(query, key, value, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch_attend_rows(q, k, v, lower_right(query.shape[0], key.shape[0], query.device), scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def lower_right(query_length: int, key_length: int, device: torch.device) -> Tensor | None:
    """What the last `query_length` of `key_length` positions see, [query_length, key_length] bool; None where
    `attend_rows` knows it without a mask."""
    if not 1 < query_length < key_length:
        return None
    rows = torch.arange(key_length - query_length, key_length, device=device)
    return torch.arange(key_length, device=device)[None] <= rows[:, None]


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                lengths: RowLengths | None = None) -> Tensor:
    """Attention with the batch first, as keys and values lie in a cache.

    Args:
        query: [batch, heads, query_length, head_dim].
        key, value: [batch, groups, key_length, head_dim].
        mask: True where a query sees a key, broadcastable to [batch, heads, query_length, key_length]; None: all keys
            for a single query, causal for as many queries as keys.
        lengths: given when key and value are whole rows: so many tokens of each row are read, the queries are the last
            of them, and each sees those up to itself. `mask` must say the same of the first `lengths.longest` keys; a
            form takes whichever of the two it can use.

    Returns:
        [batch, heads, query_length, head_dim].
    """
    form = form_of("cached_attention", query.device.type, torch_attend_rows)
    return form(query, key, value, mask, scale, lengths=lengths)


def longest_rows(key: Tensor, value: Tensor, lengths: RowLengths | None) -> tuple[Tensor, Tensor]:
    """The part of key and value that the mask of `attend_rows` is about."""
    if lengths is None:
        return key, value
    return key[:, :, :lengths.longest], value[:, :, :lengths.longest]


def torch_attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                      lengths: RowLengths | None = None) -> Tensor:
    """The portable form."""
    key, value = longest_rows(key, value, lengths)
    causal = mask is None and query.shape[2] == key.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale,
                                        enable_gqa=query.shape[1] != key.shape[1])
