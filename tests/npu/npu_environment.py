"""Whether this process can simulate an NPU; test modules call `require_simulation` before anything else."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

SIMULATE = Path(__file__).with_name("simulate.py")
WORKER = Path(__file__).with_name("worker.py")
CANN_9 = "-cann9"  # marks a case that runs as under CANN 9


def require_simulation() -> None:
    """Skip the calling test module, with the reason, where torch_npu or the stub libraries are missing."""
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed here; `make test-npu` runs these tests", allow_module_level=True)
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if not any(folder and (Path(folder) / "failing.c").exists() for folder in folders):
        pytest.skip("no stub CANN libraries on LD_LIBRARY_PATH; `make test-npu` runs these tests",
                    allow_module_level=True)


def without_kernel(operators: set[str]) -> set[str]:
    """Those of these operators that torch_npu has no kernel for: on an NPU they would run on the CPU, or not at all."""
    import torch

    # the last two are made of other operators, for every device
    keys = ("PrivateUse1", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return {name for name in operators if not any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)}


def operators_of(folder: Path, world: int) -> set[str]:
    """The operators that ran on npu tensors in the runs of one number of ranks, from the records of `worker.py`."""
    records = [json.loads(path.read_text()) for path in folder.glob(f"cases{world}-*.record")]
    return {name for record in records for name in record["operators"]}
