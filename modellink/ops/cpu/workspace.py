"""Memory of large outputs that is used again.

A block above glibc's threshold goes back to the kernel when it is freed, and the kernel clears every page of the next
one: for the logits of 1024 tokens and 32000 words that is a sixth of the time of their product. These blocks stay.
"""

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as torch's own blocks

_free: list[np.ndarray] = []


def empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised fp32 tensor, no view of another; its block is free again when no tensor shares it any more.

    A block that is too small is given up for a larger one, so that no more memory stays than was in use at once.
    """
    count = prod(shape)
    block = next((block for block in _free if block.nbytes >= 4 * count + _ALIGNMENT), None)
    if block is None:
        _free.clear()
        block = np.empty(4 * count + _ALIGNMENT, np.uint8)
    else:
        _free[:] = [other for other in _free if other is not block]
    start = -block.ctypes.data % _ALIGNMENT
    part = block[start:start + 4 * count].view(np.float32)
    # torch holds this array as long as a tensor has the storage
    weakref.finalize(part, _free.append, block).atexit = False
    return torch.ops.aten._unsafe_view(torch.from_numpy(part), list(shape))
