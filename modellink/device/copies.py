"""Copies from the host that wait for nothing."""

import torch
from torch import Tensor


def queued_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, copied there behind the work that is queued already; the caller goes on at once.

    A copy out of ordinary memory would make the host wait for everything before it, so it goes through pinned memory,
    which torch keeps until the copy was made. A tensor that is there already, as on a CPU, is returned itself.
    """
    return tensor if tensor.device.type == device.type else tensor.pin_memory().to(device, non_blocking=True)
