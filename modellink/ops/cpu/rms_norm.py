"""RMSNorm by parts of rows that stay in the cache; torch composes its backward of operations on whole tensors.

With r = 1 / sqrt(mean(x^2) + eps) and g the gradient of y = x r w: dw = (g x)' r, summed over rows, and
dx = r g w - x r^3 mean(g x w). Everything is computed in fp32; bf16 and fp16 are widened part by part.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modellink.ops.rms_norm import torch_rms_norm

_CACHED_ELEMENTS = 1 << 18  # of one core, in each of about four tensors
_FEW_ELEMENTS = 1 << 14  # a step of generation: calls cost more than passes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `modellink.ops.rms_norm.rms_norm`; few rows and fp64 go to torch's own."""
    if x.numel() <= _FEW_ELEMENTS or x.dtype == torch.float64:
        return torch_rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, width, wide_weight = torch.empty(x.shape, dtype=x.dtype), x.shape[-1], weight.float()
        scales = torch.empty(*x.shape[:-1], 1)
        for part, target, scale in _parts(x, out, scales):
            wide = part.float()
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(width).add_(eps).rsqrt_()
            unit = torch.mul(wide, scale, out=target if target.dtype == wide.dtype else None).mul_(wide_weight)
            if unit is not target:
                target.copy_(unit)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        out, width, wide_weight = torch.empty(x.shape, dtype=x.dtype), x.shape[-1], weight.float()
        grad_weight = torch.zeros(width)
        for part, grad, target, scale in _parts(x, grads[0], out, scales):
            wide, wide_grad = part.float(), grad.float()
            product = wide * wide_grad
            grad_weight.addmv_(product.t(), scale[:, 0])
            slope = torch.mv(product, wide_weight)[:, None].mul_(scale.pow(3)).div_(-width)
            target.copy_(torch.mul(wide_grad, wide_weight, out=product).mul_(scale).addcmul_(wide, slope))
        return out, grad_weight.to(weight.dtype), None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of each tensor ([..., width]), as many at a time as the cache holds."""
    rows = max(1, torch.get_num_threads() * _CACHED_ELEMENTS // tensors[0].shape[-1])
    return zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)
