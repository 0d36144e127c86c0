"""Attention on GPUs: flash attention over packed samples, scaled_dot_product_attention in shapes that keep it fused.

On CUDA only the flash and math kernels of scaled_dot_product_attention know grouped queries (`enable_gqa`), flash takes
no mask and no fp32, and math holds all scores. So what flash cannot do is given to it with as many key/value heads as
query heads, which leaves it the memory-efficient kernel.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modellink.ops.attention import longest_rows, torch_attend_rows, torch_attention
from modellink.ops.cuda.library import boundaries
from modellink.ops.cuda.limits import flash_problem, require
from modellink.ops.limits import packed_problem, same_dtype_problem


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`: packed samples in one call of varlen_attn."""
    if cu_seqlens is None:
        return torch_attention(query, key, value, scale=scale)
    from torch.nn.attention.varlen import varlen_attn

    length, batch, heads, head_dim = query.shape
    groups = key.shape[2]
    require("varlen_attn", same_dtype_problem(query, key, value) or flash_problem(query.dtype, head_dim, heads, groups)
            or packed_problem(cu_seqlens, batch, length))
    ends = [end for start, end in pairwise(cu_seqlens) if end > start]
    longest = max(end - start for start, end in pairwise([0, *ends]))
    places = boundaries((0, *ends), query.device)
    # an older varlen_attn does not know the word
    options: dict[str, Any] = {"enable_gqa": True} if heads != groups else {}
    out = varlen_attn(query.squeeze(1), key.squeeze(1), value.squeeze(1), places, places, longest, longest, scale=scale,
                      window_size=(-1, 0), **options)
    assert isinstance(out, Tensor)  # it gives a pair when asked for more
    return out.reshape(length, 1, -1)


def repeated_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
                       cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`: every head gets a key and a value of its own."""
    repeat = query.shape[2] // key.shape[2]
    return torch_attention(query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2), scale=scale,
                           cu_seqlens=cu_seqlens)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                lengths: Sequence[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attend_rows`: the heads of a group are further queries of one head.

    A step of decoding reads keys and values once for the whole group, and no kernel need know of groups.
    """
    key, value = longest_rows(key, value, lengths)
    rows, heads, length, head_dim = query.shape
    groups = key.shape[1]
    if mask is None and length > 1:  # causal: further queries would stand behind the last position
        if flash_problem(query.dtype, head_dim, heads, groups) is not None:
            key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        return torch_attend_rows(query, key, value, mask, scale)
    folded = query.reshape(rows, groups, -1, head_dim)
    if mask is not None:
        mask = _fold_mask(mask, heads // groups, length)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, length, head_dim)


def _fold_mask(mask: Tensor, repeat: int, length: int) -> Tensor:
    """A mask over [rows, heads, length, keys] for `repeat` heads one behind the other, as small as it can be."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.shape[1] > 1:
        mask = mask.expand(-1, -1, length, -1)
        return mask.reshape(mask.shape[0], -1, repeat * length, mask.shape[3])
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, repeat, 1)
