"""Attention on GPUs: flash attention over packed samples, scaled_dot_product_attention in shapes that keep it fused.

On CUDA only the flash and math kernels of scaled_dot_product_attention know grouped queries (`enable_gqa`), flash takes
no mask and no fp32, and math holds all scores. So what flash cannot do is given to it with as many key/value heads as
query heads, which leaves it the memory-efficient kernel. Over a cache flash needs no mask where it is told how many
tokens of each row it reads: its queries are the last of them.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modellink.ops.attention import RowLengths, longest_rows, torch_attend_rows, torch_attention
from modellink.ops.cuda.library import boundaries
from modellink.ops.cuda.limits import cached_flash_problem, flash_problem
from modellink.ops.limits import packed_problem, require, same_dtype_problem


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
    out = varlen_attn(query.squeeze(1), key.squeeze(1), value.squeeze(1), places, places, longest, longest, scale=scale,
                      window_size=(-1, 0), **_grouped(heads, groups))
    assert isinstance(out, Tensor)  # it gives a pair when asked for more
    return out.reshape(length, 1, -1)


def _grouped(heads: int, groups: int) -> dict[str, Any]:
    return {"enable_gqa": True} if heads != groups else {}  # an older varlen_attn does not know the word


def repeated_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
                       cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`: every head gets a key and a value of its own."""
    repeat = query.shape[2] // key.shape[2]
    return torch_attention(query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2), scale=scale,
                           cu_seqlens=cu_seqlens)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                lengths: RowLengths | None = None) -> Tensor:
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


def attend_lengths(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                   lengths: RowLengths | None = None) -> Tensor:
    """As `modellink.ops.attention.attend_rows`: rows of different lengths, and prompts in parts, by varlen_attn.

    Keys and values stay where they are in the cache. What needs no mask is left to `attend_rows`, whose kernel divides
    long rows among more of the device's processors.
    """
    if mask is None or lengths is None:
        return attend_rows(query, key, value, mask, scale, lengths=lengths)
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, count, head_dim = query.shape
    groups = key.shape[1]
    require("varlen_attn", same_dtype_problem(query, key, value)
            or cached_flash_problem(query.dtype, head_dim, heads, groups))
    packed = query.transpose(1, 2).reshape(rows * count, heads, head_dim)
    (keys, step), (values, _) = _in_one_line(key), _in_one_line(value)
    # for a single query causal is no other thing, but leaves its heads in their places: told of none, the kernel makes
    # the heads of a group its queries
    window = (-1, 0) if count > 1 else (-1, -1)
    out = varlen_attn(packed, keys, values, lengths.starts(count), lengths.starts(step), count, lengths.longest,
                      scale=scale, window_size=window, seqused_k=lengths.counts, **_grouped(heads, groups))
    assert isinstance(out, Tensor)
    return out.view(rows, count, heads, head_dim).transpose(1, 2)


def _in_one_line(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of a cache as varlen_attn takes them, without a copy: their tokens one behind the other.

    Between two rows lie places of other heads, which belong to no row.

    Args:
        rows: [rows, groups, tokens, head_dim].

    Returns:
        [places, groups, head_dim], and the places from the beginning of one row to that of the next.
    """
    count, groups, tokens, head_dim = rows.shape
    of_row, of_group, of_token, _ = rows.stride()
    step = of_row // of_token if count > 1 else tokens
    return rows.as_strided(((count - 1) * step + tokens, groups, head_dim), (of_token, of_group, 1)), step


def _fold_mask(mask: Tensor, repeat: int, length: int) -> Tensor:
    """A mask over [rows, heads, length, keys] for `repeat` heads one behind the other, as small as it can be."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.shape[1] > 1:
        mask = mask.expand(-1, -1, length, -1)
        return mask.reshape(mask.shape[0], -1, repeat * length, mask.shape[3])
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, repeat, 1)
