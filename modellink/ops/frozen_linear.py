"""Products with weights that do not change any more: generation and evaluation."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from modellink.ops.forms import form_of

Product = Callable[[Tensor], Tensor]


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
