"""SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): silu(gate) * up."""

from typing import Any

import torch
from torch import Tensor

from modellink.ops.forms import form_of

_CACHED_ELEMENTS = 1 << 18  # of the input, in the cache of one core


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input; the backward computes silu(gate) again instead of storing it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, whatever x is
        for part, grad, target in zip(_parts(x), grads[0].reshape(-1, grads[0].shape[-1]).split(_rows(x)), _parts(out)):
            gate, up = part.chunk(2, dim=-1)
            target_gate, target_up = target.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), grad, out=target_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=target_gate)
        return out


def _rows(x: Tensor) -> int:
    """Rows that are computed at a time: what a cache holds on the CPU, all elsewhere."""
    if x.device.type != "cpu":
        return x.numel() // x.shape[-1]
    return max(1, torch.get_num_threads() * _CACHED_ELEMENTS // x.shape[-1])


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.flatten(0, -2).split(_rows(x))


def swiglu(x: Tensor) -> Tensor:
    """Gated activation of the concatenation [gate, up].

    Args:
        x: [..., 2 * width], gate first.

    Returns:
        [..., width] in the dtype of x.
    """
    return form_of("swiglu", x.device.type, torch_swiglu)(x)


def torch_swiglu(x: Tensor) -> Tensor:
    """The portable form, of elementwise operations."""
    return _SwiGLU.apply(x)
