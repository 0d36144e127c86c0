"""torch_npu, imported when an NPU form is first looked at, and the mask that its attention shares."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# what sparse modes 2 and 3 take instead of a mask of the sequence's own size
COMPRESSED = 2048


def torch_npu() -> Any:
    """The module torch_npu."""
    return importlib.import_module("torch_npu")


def has_operator(name: str) -> bool:
    """Whether a torch_npu is installed that has an operator."""
    try:
        return hasattr(torch_npu(), name)
    except ImportError:  # a plan for an NPU, made where there is none
        return False


@functools.cache
def compressed_mask(device: torch.device) -> Tensor:
    """[2048, 2048] bool, True above the diagonal: what is not seen. Made once for a device."""
    with torch.inference_mode(False):  # generation may ask first, and training must be able to keep it for its backward
        return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu_(1).to(device)
