"""What the optimizer does to all gradients at once, in the form in which megatron-core calls it.

Without Apex and Transformer Engine the core falls back to loops that wait for the device after every tensor and copy
every gradient to scale it.
"""

from typing import Any

import torch
from torch import Tensor


def multi_tensor_norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool,
                      *unused: Any) -> tuple[Tensor, None]:
    """Norm of all tensors of the first list as one vector.

    Returns:
        ([1] fp32 on their device, None).
    """
    return torch.stack(torch._foreach_norm(lists[0])).norm().float().view(1), None


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Second list = first list x factor; in place where both are the same."""
    source, target = lists
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)
