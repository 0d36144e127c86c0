"""Products with weights that do not change any more, through oneDNN."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from modellink.ops.frozen_linear import Product

_BATCH_HINT = 8  # rows that the layout is chosen for; it made no difference between 1 and 512
_FEWEST_ROWS = 4


def problem(dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot keep a weight in its own layout here."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if dtype not in (torch.float32, torch.bfloat16):
        return "for float32 and bfloat16"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 instructions"
    return None


def frozen_linear(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN over a copy of the weight in the layout it likes best, as torch's compiler uses it for inference.

    Few rows are bound by memory or by the packing of the weight that a product otherwise does each time: with 4 to 32
    rows this takes 0.4 to 0.7 of the time of `linear`. One to three rows are slower than four, so they get company.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
    product = torch.ops.mkldnn._linear_pointwise

    def run(x: Tensor) -> Tensor:
        count = x.shape[0]
        if count >= _FEWEST_ROWS:
            return product(x, packed, bias, "none", [], "")
        return product(pad(x, (0, 0, 0, _FEWEST_ROWS - count)), packed, bias, "none", [], "")[:count]

    return run
