"""Products with weights that do not change any more: generation and evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from modellink.ops.forms import form_of

Product = Callable[[Tensor], Tensor]
BATCH_HINT = 8  # rows that oneDNN's layout is chosen for; it made no difference between 1 and 512
FEWEST_ROWS = 4


def frozen_linear(weight: Tensor, bias: Tensor | None = None) -> Product:
    """The function x -> x @ weight.T + bias, for as many calls as one likes.

    Args:
        weight: [out, in]; held, or copied, by the function.
        bias: [out], of its dtype.

    Returns:
        A function from x [n, in] of the dtype of weight to [n, out].
    """
    form = form_of("frozen_linear", weight.device.type, torch_frozen_linear)
    product: Product = form(weight, bias)
    return product


def torch_frozen_linear(weight: Tensor, bias: Tensor | None) -> Product:
    """The portable form."""
    return lambda x: linear(x, weight, bias)


def packed_problem(dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot keep a weight in its own layout here."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if dtype not in (torch.float32, torch.bfloat16):
        return "for float32 and bfloat16"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 instructions"
    return None


def packed_frozen_linear(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN over a copy of the weight in the layout it likes best, as torch's compiler uses it for inference.

    Few rows are bound by memory or by the packing of the weight that a product otherwise does each time: with 4 to 32
    rows this takes 0.4 to 0.7 of the time of `linear`. One to three rows are slower than four, so they get company.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_HINT)
    product = torch.ops.mkldnn._linear_pointwise

    def run(x: Tensor) -> Tensor:
        count = x.shape[0]
        if count >= FEWEST_ROWS:
            return product(x, packed, bias, "none", [], "")
        return product(pad(x, (0, 0, 0, FEWEST_ROWS - count)), packed, bias, "none", [], "")[:count]

    return run
