"""The plain formulas of every operation, with their derivatives written out: what all other forms are tested against.

Nothing here is fast or saves memory. Sums and exponentials are taken in fp32, or in fp64 for fp64 tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.ops.attention import RowLengths


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps); dx = r (g - xr mean(g xr)) with g = dy w; dw = sum(dy xr)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * _wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = _wide(x) * scale, _wide(grads[0])
        inner = grad * _wide(weight)
        grad_x = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (grad * unit).flatten(0, -2).sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `modellink.ops.rms_norm.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin); the derivative is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (part.chunk(2, dim=-1)[0] for part in (cos, sin))  # both halves are the same
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        a, b = grads[0].chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `modellink.ops.rotary.rotate`, with a gradient."""
    return _Rotate.apply(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    """y = u g s with s = sigmoid(g); dg = dy u s (1 + g (1 - s)), du = dy g s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = _wide(x).chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = _wide(x).chunk(2, dim=-1)
        grad, sigmoid = _wide(grads[0]), gate.sigmoid()
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.cat((grad_gate, grad * gate * sigmoid), dim=-1).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """As `modellink.ops.swiglu.swiglu`."""
    return _SwiGLU.apply(x)


class _Attention(torch.autograd.Function):
    """o = p v with p = softmax(scale q k'); with d = do v' the scores' gradient is p (d - sum(d p))."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        q, k, v = _wide(query), _wide(key).repeat_interleave(repeat, 1), _wide(value).repeat_interleave(repeat, 1)
        scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~seen, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return (weights @ v).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, weights = ctx.saved_tensors
        groups, repeat = key.shape[1], query.shape[1] // key.shape[1]
        k, v = _wide(key).repeat_interleave(repeat, 1), _wide(value).repeat_interleave(repeat, 1)
        grad = _wide(grads[0])
        grad_weights = grad @ v.transpose(-1, -2)
        grad_scores = ctx.scale * weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        # the heads of a group share its key and value
        grad_key = (grad_scores.transpose(-1, -2) @ _wide(query)).unflatten(1, (groups, repeat)).sum(2)
        grad_value = (weights.transpose(-1, -2) @ grad).unflatten(1, (groups, repeat)).sum(2)
        return ((grad_scores @ k).to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, *,
                lengths: RowLengths | None = None) -> Tensor:
    """As `modellink.ops.attention.attend_rows`."""
    if lengths is not None:
        key, value = key[:, :, :lengths.longest], value[:, :, :lengths.longest]
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    return _Attention.apply(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None,
              cu_seqlens: list[int] | None = None) -> Tensor:
    """As `modellink.ops.attention.attention`."""
    rows, columns = query.shape[0], key.shape[0]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    if cu_seqlens is not None:
        places = torch.arange(rows, device=query.device)
        sample = torch.bucketize(places, torch.tensor(cu_seqlens[1:], device=query.device), right=True)
        seen = seen & (sample[:, None] == sample[None])
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = attend_rows(q, k, v, seen, scale)
    return out.permute(2, 0, 1, 3).flatten(2)


class _CrossEntropy(torch.autograd.Function):
    """loss = log sum exp(x) - x_target; dx = (exp(x) / sum exp(x) - [target]) dloss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, real_rows: int) -> Tensor:
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        rows = logits.shape[-1]
        ids = torch.arange(rank * rows, (rank + 1) * rows, device=logits.device)
        x = _wide(logits).masked_fill(ids >= real_rows, float("-inf"))
        is_target = ids == target[..., None]
        top = x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # a rank of padding only has -inf
        if size > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        sums = torch.stack(((x - top).exp().sum(-1), torch.where(is_target, x, 0.0).sum(-1)))
        if size > 1:
            dist.all_reduce(sums, group=group)
        log_sum = top[..., 0] + sums[0].log()
        ctx.save_for_backward((x - log_sum[..., None]).exp() - is_target.to(x.dtype))
        ctx.dtype = logits.dtype
        return log_sum - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][..., None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None,
                                 real_rows: int) -> Tensor:
    """As `modellink.ops.cross_entropy.vocab_parallel_cross_entropy`; `logits` keeps its values."""
    return _CrossEntropy.apply(logits, target, group, real_rows)


def adamw(parameters: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], *, step: int,
          lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """As `modellink.ops.adamw.adamw`: algorithm 2 of https://arxiv.org/abs/1711.05101."""
    first, second = betas
    for parameter, grad, mean, square in zip(parameters, grads, means, squares, strict=True):
        parameter.mul_(1 - lr * weight_decay)
        mean.mul_(first).add_(grad, alpha=1 - first)
        square.mul_(second).add_(grad.square(), alpha=1 - second)
        root = (square / (1 - second**step)).sqrt()
        parameter.sub_(lr * (mean / (1 - first**step)) / (root + eps))


def accumulate_weight_gradient(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """As `modellink.ops.parallel_linear.accumulate_weight_gradient`."""
    total += torch.einsum("to,ti->oi", _wide(grad), _wide(x))


def _weight_gradient(x: Tensor, grad: Tensor, weight: Any, accumulate: bool) -> Tensor:
    """What autograd gets; with `accumulate` the gradient itself is added to `weight.main_grad`."""
    if accumulate:
        accumulate_weight_gradient(x, grad, weight.main_grad)
        weight.grad_added_to_main_grad = True
        return torch.zeros_like(weight)
    return (_wide(grad).t() @ _wide(x)).to(weight.dtype)


class _Linear(torch.autograd.Function):
    """y = x w' + b; dx = dy w, dw = dy' x, db = sum(dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.accumulate, ctx.has_bias = accumulate, bias is not None
        product = _wide(x) @ _wide(weight).t()
        return (product if bias is None else product + _wide(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_weight = _weight_gradient(x.flatten(0, -2), grad, weight, ctx.accumulate)
        grad_x = (_wide(grads[0]) @ _wide(weight)).to(x.dtype)
        return grad_x, grad_weight, _wide(grad).sum(0).to(weight.dtype) if ctx.has_bias else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
    """As what `modellink.ops.parallel_linear.own_linear` gives."""
    return _Linear.apply(x, weight, bias, accumulate)


class _ColumnLinear(torch.autograd.Function):
    """y = X w' with X = all x of the group; dx = the own rows of the sum of dy w, dw = dy' X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
        whole = gather_rows(x, group)
        ctx.save_for_backward(whole, weight)
        ctx.group, ctx.accumulate = group, accumulate
        return whole @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        whole, weight = ctx.saved_tensors
        grad_weight = _weight_gradient(whole.flatten(0, -2), grads[0].flatten(0, -2), weight, ctx.accumulate)
        return sum_own_rows(grads[0] @ weight, ctx.group), grad_weight, None, None


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool = False) -> Tensor:
    """As `modellink.ops.parallel_linear.column_linear`."""
    return _ColumnLinear.apply(x, weight, group, accumulate)


class _RowLinear(torch.autograd.Function):
    """y = the own rows of the sum of x w'; with G = all dy of the group dx = G w, dw = G' x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.accumulate = group, accumulate
        return sum_own_rows(x @ weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        whole = gather_rows(grads[0], ctx.group)
        grad_weight = _weight_gradient(x.flatten(0, -2), whole.flatten(0, -2), weight, ctx.accumulate)
        return whole @ weight, grad_weight, None, None


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool = False) -> Tensor:
    """As `modellink.ops.parallel_linear.row_linear`."""
    return _RowLinear.apply(x, weight, group, accumulate)


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of every rank, one behind the other: [ranks x n, ...]."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def sum_own_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of [ranks x n, ...] over the group, this rank's n rows of it."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def frozen_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """As `modellink.ops.frozen_linear.frozen_linear`."""
    def product(x: Tensor) -> Tensor:
        out = _wide(x) @ _wide(weight).T
        return (out if bias is None else out + _wide(bias)).to(x.dtype)

    return product
