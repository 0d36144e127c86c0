"""Attention by torch_npu's kernels: npu_fusion_attention in training, npu_fused_infer_attention_score over a cache.

Both mask where a mask is True, unlike torch. With sparse mode 2 (causal from the upper left) and 3 (from the lower
right) they take the compressed mask, whatever the lengths are.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from modellink.ops.attention import RowLengths, longest_rows
from modellink.ops.limits import packed_problem, same_dtype_problem
from modellink.ops.npu.library import compressed_mask, torch_npu
from modellink.ops.npu.limits import (
    ATTENTION_TOKENS,
    PACKED_SAMPLES,
    attention_problem,
    cache_problem,
    cached_attention_problem,
    require,
    samples_problem,
)

WHOLE_MASK, UPPER_LEFT, LOWER_RIGHT = 0, 2, 3


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`: SBH, or TND for packed samples."""
    length, batch, heads, head_dim = query.shape
    require("npu_fusion_attention", same_dtype_problem(query, key, value)
            or attention_problem(query.dtype, head_dim, heads, key.shape[2]))
    scale = head_dim**-0.5 if scale is None else scale  # the operator's own default is 1
    mask = compressed_mask(query.device)
    if cu_seqlens is not None:
        require("npu_fusion_attention", packed_problem(cu_seqlens, batch, length))
        require("npu_fusion_attention", samples_problem(1, max(end - start for start, end in pairwise(cu_seqlens))))
        calls = packed_calls(cu_seqlens)
        inputs: list[tuple[Tensor, ...]] = [tuple(x.squeeze(1) for x in (query, key, value))]
        if len(calls) > 1:  # split has one backward for all parts
            sizes = [ends[-1] for ends in calls]
            inputs = list(zip(*(x.split(sizes) for x in inputs[0])))
        parts = [torch_npu().npu_fusion_attention(
            q, k, v, head_num=heads, input_layout="TND", atten_mask=mask, scale=scale, sparse_mode=UPPER_LEFT,
            actual_seq_qlen=ends, actual_seq_kvlen=ends)[0] for ends, (q, k, v) in zip(calls, inputs, strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(length, 1, -1)
    require("npu_fusion_attention", samples_problem(batch, max(length, key.shape[0])))
    return torch_npu().npu_fusion_attention(
        query.flatten(2), key.flatten(2), value.flatten(2), head_num=heads, input_layout="SBH", atten_mask=mask,
        scale=scale, sparse_mode=UPPER_LEFT if length == key.shape[0] else LOWER_RIGHT)[0]


def packed_calls(cu_seqlens: Sequence[int]) -> list[list[int]]:
    """Packed samples cut into calls that the operator takes: where the samples of each call end, from its start on.

    Samples without tokens have no rows and are left out.
    """
    calls: list[list[int]] = [[]]
    first = 0  # token of the present call
    for start, end in pairwise(cu_seqlens):
        if end == start:
            continue
        if calls[-1] and (len(calls[-1]) == PACKED_SAMPLES or end - first > ATTENTION_TOKENS):
            calls.append([])
            first = start
        calls[-1].append(end - first)
    return calls


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                lengths: RowLengths | None = None) -> Tensor:
    """As `modellink.ops.attention.attend_rows`, without autograd: BNSD, one call for prefill and decode.

    The operator takes contiguous tensors only. Whole rows of a cache are; so it is told of their lengths, and a mask is
    for what these cannot say.
    """
    known = None if lengths is None else lengths.host  # the operator takes numbers of the host
    if known is None:
        key, value = longest_rows(key, value, lengths)
    heads, queries, head_dim = query.shape[1:]
    groups, keys = key.shape[1:3]
    require("npu_fused_infer_attention_score", same_dtype_problem(query, key, value)
            or cached_attention_problem(query.dtype, head_dim, heads, groups)
            or cache_problem(query.shape[0], queries, keys)
            or ("it takes one mask for all heads" if known is None and mask is not None and mask.dim() == 4
                and mask.shape[1] > 1 else None))
    mode = WHOLE_MASK
    hidden: Tensor | None = None
    if mask is not None and known is None:
        whole = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        hidden = ~whole.expand(-1, -1, queries, keys).contiguous()
    elif queries > 1:
        mode, hidden = LOWER_RIGHT, compressed_mask(query.device)
    return torch_npu().npu_fused_infer_attention_score(
        query.contiguous(), key.contiguous(), value.contiguous(), atten_mask=hidden,
        actual_seq_lengths_kv=None if known is None else list(known), num_heads=heads,
        scale=head_dim**-0.5 if scale is None else scale, input_layout="BNSD", num_key_value_heads=groups,
        sparse_mode=mode)[0]
