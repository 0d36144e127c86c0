"""Folds an adapter into the weight it sits on."""

import torch
from torch import Tensor


def merge_adapter(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
                  magnitude: Tensor | None = None) -> Tensor:
    """The weight that computes what weight and adapter compute together.

    Args:
        weight: [out, in] of one HF projection (or of a fused layer, for an adapter over the whole of it).
        lora_a: [rank, in].
        lora_b: [out, rank].
        scaling: `LoraPlan.scaling`.
        magnitude: [out], for DoRA.

    Returns:
        [out, in] in the dtype of `weight`; the sum is formed in fp32.
    """
    merged = torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)
