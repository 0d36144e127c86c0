"""Linear layers: tensor parallel ones under sequence parallelism, those of one rank, and where the gradient goes."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from modellink.ops.forms import chosen, form_of
from modellink.ops.reference import column_linear as reference_column
from modellink.ops.reference import row_linear as reference_row

_PART_ELEMENTS = 1 << 21  # of a product in 16 bits: 4 MiB; smaller parts make the product slower


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool = False) -> Tensor:
    """The product of the whole sequence with this rank's output features.

    Args:
        x: [sequence / ranks, batch, in], this rank's tokens.
        weight: [out / ranks, in].
        group: the tensor parallel group.
        accumulate: the backward adds the weight's gradient to `weight.main_grad`, by `accumulate_weight_gradient`, and
            hands autograd an empty one.

    Returns:
        [sequence, batch, out / ranks].
    """
    return form_of("column_linear", x.device.type, reference_column)(x, weight, group, accumulate)


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup, accumulate: bool = False) -> Tensor:
    """The product summed over the ranks' input features, for this rank's tokens.

    Args:
        x: [sequence, batch, in / ranks].
        weight: [out, in / ranks].
        group: the tensor parallel group.
        accumulate: the backward adds the weight's gradient to `weight.main_grad`, by `accumulate_weight_gradient`, and
            hands autograd an empty one.

    Returns:
        [sequence / ranks, batch, out].
    """
    return form_of("row_linear", x.device.type, reference_row)(x, weight, group, accumulate)


def accumulates_weight_gradients(device_type: str) -> bool:
    """Whether the layers add to their main gradient in `accumulate_weight_gradient` and hand autograd none."""
    return chosen("weight_gradient", device_type) is not None


def own_linear(device_type: str) -> Callable[[Tensor, Tensor, Tensor | None, bool], Tensor] | None:
    """The linear layer of one rank in a form of ours; None where megatron-core's own does the work.

    Its arguments: x [..., in]; weight [out, in]; bias [out] or None; whether the weight has a main gradient that takes
    the sum of its gradients (it then hands autograd an empty one, as the core does). It gives [..., out].
    """
    return chosen("linear", device_type)


def has_own_linear(device_type: str) -> bool:
    """Whether the layers use `column_linear` and `row_linear` instead of megatron-core's own."""
    return chosen("column_linear", device_type) is not None


def accumulate_weight_gradient(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """total += grad' x; what megatron-core calls with `gradient_accumulation_fusion`.

    Args:
        x: [tokens, in], input of the layer.
        grad: [tokens, out], gradient of its output, same dtype.
        total: [out, in], the main gradient, usually fp32.
    """
    form_of("weight_gradient", x.device.type, torch_accumulate)(x, grad, total)


def torch_accumulate(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """The portable form: inside the product where the dtypes agree, otherwise product and addition.

    On the CPU the product is added part by part, so that the product of a head is never held whole.
    """
    if x.dtype == total.dtype:
        total.addmm_(grad.t(), x)
        return
    rows = total.shape[0] if x.device.type != "cpu" else max(1, _PART_ELEMENTS // total.shape[1])
    for part, columns in zip(total.split(rows), grad.split(rows, dim=1)):
        part.add_(columns.t() @ x)
