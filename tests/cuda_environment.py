"""The device of the tests marked `cuda`, and how many of it there are.

On a machine without a GPU they skip and say why. MODELLINK_CUDA_TESTS_ON=cpu runs the same tests on the CPU instead,
which proves the tests themselves.
"""

import os

import pytest

from modellink.device.cuda import CudaDevice

DEVICE = os.environ.get("MODELLINK_CUDA_TESTS_ON", "cuda")


def need_gpus(count: int) -> None:
    """Skip the calling test or fixture where there are fewer GPUs: two nccl ranks cannot share one."""
    if DEVICE == "cpu":
        return
    reason = CudaDevice().unusable_reason()
    if reason is not None:
        pytest.skip(f"no GPU: {reason}")
    if CudaDevice().count() < count:
        pytest.skip(f"it needs {count} GPUs, and {CudaDevice().count()} can be seen")
