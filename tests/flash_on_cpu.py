"""CPU kernels for flash attention's two aten operators, made of the plain formulas for what their arguments say."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modellink.ops import reference
from modellink.ops.cuda import limits


class Kept:
    """The context of an autograd function, by hand: below torch's dispatcher nothing is recorded."""

    saved_tensors: tuple[Tensor, ...]
    scale: float

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def each_sample(ends: Tensor, scale: float | None, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None
                ) -> list[Tensor]:
    """Causal attention of every sample ([tokens, heads, head_dim]); with a gradient those of q, k and v."""
    parts = []
    for a, b in pairwise(ends.tolist()):
        rows = [x[a:b].transpose(0, 1)[None] for x in ((q, k, v) if grad is None else (q, k, v, grad))]
        context, seen = Kept(), torch.ones(b - a, b - a, dtype=torch.bool).tril()
        out = [reference._Attention.forward(context, *rows[:3], seen, q.shape[-1] ** -0.5 if scale is None else scale)]
        if grad is not None:
            out = list(reference._Attention.backward(context, rows[3])[:3])
        parts.append([x[0].transpose(0, 1) for x in out])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def check_call(q: Tensor, ends: Tensor, longest: int) -> None:
    """What flash attention demands of its arguments."""
    assert q.dim() == 3 and q.stride(-1) == 1
    assert ends.dtype == torch.int32 and ends.is_contiguous() and ends[0] == 0 and ends[-1] == q.shape[0]
    assert longest == int(ends.diff().max()) and int(ends.diff().min()) > 0


def over_a_cache(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, starts: Tensor, max_k: int, used: Tensor,
                 causal: bool, scale: float | None) -> Tensor:
    """The kernel where it is told how many tokens of each row it reads: its queries are the last of them."""
    assert starts.dtype == used.dtype == torch.int32 and len(starts) == len(q_ends) == len(used) + 1
    assert int(used.max()) <= max_k <= int(starts.diff().min()) and k.stride() == v.stride() and k.stride(-1) == 1
    parts = []
    for (a, b), start, count in zip(pairwise(q_ends.tolist()), starts.tolist(), used.tolist()):
        rows = [x.transpose(0, 1)[None] for x in (q[a:b], k[start:start + count], v[start:start + count])]
        seen = torch.ones(b - a, count, dtype=torch.bool).tril(count - (b - a) if causal else count)
        out = reference._Attention.forward(Kept(), *rows, seen, q.shape[-1] ** -0.5 if scale is None else scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@contextmanager
def flash_on_cpu(takes: tuple[torch.dtype, ...] = limits.HALF) -> Iterator[list[str]]:
    """The kernels inside the block; gives the names of those that ran.

    Args:
        takes: dtypes; with more than flash attention has, our own limit is lifted with it, for wrong wirings that the
            roundings of 16 bits would hide.
    """
    called: list[str] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int,
                dropout: float, causal: bool, return_debug_mask: bool, *, scale: float | None = None,
                window_size_left: int | None = None, window_size_right: int | None = None,
                seqused_k: Tensor | None = None, **unused: Any) -> Any:
        called.append("forward" if seqused_k is None else "over a cache")
        assert q.dtype in takes
        check_call(q, q_ends, max_q)
        assert dropout == 0.0 and all(value is None for value in unused.values())
        assert (window_size_left, window_size_right) == ((-1, 0) if causal else (-1, -1))
        if seqused_k is None:
            assert causal and max_k == max_q and torch.equal(q_ends, k_ends)
            (out,) = each_sample(q_ends, scale, q, k, v)
        else:
            assert causal == (max_q > 1)
            out = over_a_cache(q, k, v, q_ends, k_ends, max_k, seqused_k, causal, scale)
        return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64), torch.zeros(0), q[:0]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ends: Tensor,
                 k_ends: Tensor, max_q: int, max_k: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *,
                 scale: float | None = None, window_size_left: int | None = None,
                 window_size_right: int | None = None) -> Any:
        called.append("backward")
        assert q.dtype in takes
        check_call(q, q_ends, max_q)
        assert causal and (window_size_left, window_size_right) == (-1, 0)
        return tuple(each_sample(q_ends, scale, q, k, v, grad))

    kernels, before = torch.library.Library("aten", "IMPL"), limits.HALF
    limits.HALF = takes
    kernels.impl("_flash_attention_forward", forward, "CPU")
    kernels.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield called
    finally:
        limits.HALF = before
        kernels._destroy()
