"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) in the half-rotated form of Qwen1.5."""

from typing import Any

import torch
from torch import Tensor

from modellink.ops.forms import form_of


def rotary_table(num_positions: int, head_dim: int, base: float, *, dtype: torch.dtype,
                 device: torch.device | str = "cpu", offset: int = 0) -> Tensor:
    """Cosines and sines of every position, computed in fp32 and rounded once.

    Returns:
        [3, num_positions, head_dim]: cosines, sines, and the sines of the opposite angles, by which a backward rotates.
        Both halves of a row are the same: a kernel that takes one value for each element of a head reads the rows as
        they lie, others read the first half. So nothing is made of the table in any layer.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(offset, offset + num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    sin = angles.sin()
    return torch.stack((angles.cos(), sin, -sin)).to(dtype).repeat(1, 1, 2)


class _Rotate(torch.autograd.Function):
    """A rotation is linear and orthogonal: its backward is the rotation by the opposite angle, and needs no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, opposite: Tensor) -> Tensor:
        ctx.save_for_backward(cos, opposite)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, opposite = ctx.saved_tensors
        return rotate(grads[0], cos, opposite), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` without autograd.

    Args:
        x: [sequence, batch, heads, head_dim].
        cos, sin: of these positions, [sequence, batch or 1, 1, head_dim], both halves of a row the same.

    Returns:
        Tensor of the shape and dtype of x.
    """
    return form_of("rotary", x.device.type, torch_rotate)(x, cos, sin)


def torch_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The portable form, of elementwise operations."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=out)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    sin = sin.chunk(2, dim=-1)[0]
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
    return out


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: [sequence, batch, heads, head_dim].
        table: `rotary_table` for these positions: [3, sequence, head_dim], or per batch row
            [3, sequence, batch, head_dim].

    Returns:
        Tensor of the shape and dtype of x.
    """
    if table.dim() == 3:
        table = table[:, :, None]
    return _Rotate.apply(x, *table[:, :, :, None].unbind())  # each [sequence, batch or 1, 1, head_dim]
