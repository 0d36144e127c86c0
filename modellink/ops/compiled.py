"""RMSNorm, rotation and SwiGLU as plain formulas of which torch.compile makes one kernel each (`--compile`).

The arithmetic is in fp32 and rounded once. Inside a compiled layer the formulas become part of its graph.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _compiled(formula: Callable[..., Tensor]) -> Callable[..., Any]:
    # lengths of sequences change: sizes that are not constants cost little here, a kernel for each length a lot
    return torch.compile(formula, dynamic=True)


def _run(formula: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return formula(*arguments)
    return _compiled(formula)(*arguments)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]  # both halves are the same
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `modellink.ops.rms_norm.rms_norm`."""
    return _run(_rms_norm, x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `modellink.ops.rotary.rotate`."""
    return _run(_rotate, x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    """As `modellink.ops.swiglu.swiglu`."""
    return _run(_swiglu, x)
