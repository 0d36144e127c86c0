"""Fake cuda tensors on a build of torch without CUDA: shapes, dtypes, devices and autograd, no memory and no numbers.

torch's FakeTensorMode runs the operators' own shape functions and refuses to mix devices. `absent_gpu.cpp` gives it the
device guard that autograd asks for and the choice of attention kernels; `absent_gpu` says in the driver's place what
megatron-core and our device ask before a kernel runs. `host_looks.py` sees where the host waits for the device.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

COMPILER = os.environ.get("CXX", "g++")
HERE = Path(__file__).parent
REPO = HERE.parent
PRODUCT = "NVIDIA H100 80GB HBM3"


def missing() -> str | None:
    """None when fake cuda tensors can be had here, otherwise a few words why not."""
    import torch

    if torch.version.cuda is not None:
        return "this torch knows cuda itself; the tests marked cuda run on a GPU"
    return None if shutil.which(COMPILER) else "no C++ compiler"


def build(folder: Path) -> Path:
    """Compile the library against the installed torch; takes some seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch, target = Path(spec.origin).parent, folder / "absent_gpu.so"
    subprocess.run([COMPILER, "-O0", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}",
                    str(HERE / "absent_gpu.cpp"), "-o", str(target), f"-L{torch / 'lib'}",
                    f"-Wl,-rpath,{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"], check=True)
    return target


def load(library: str) -> None:
    """Give torch the library. It asks for such things once, when it is imported."""
    assert "torch" not in sys.modules, "the library must be there before torch"
    ctypes.CDLL(library)


@contextmanager
def absent_gpu() -> Iterator[Any]:
    """Inside the block cuda tensors are fake, and so are the messages of process groups; gives our device for them."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from modellink.device.cuda import CudaDevice

    def rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def to(module: Any, device: Any) -> Any:
        """torch's own would swap fake parameters for new ones, which it refuses where something holds them weakly."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and not isinstance(parameter, FakeTensor):
                    moved = part._parameters[name] = torch.nn.Parameter(parameter.to(device), parameter.requires_grad)
                    moved.__dict__.update(parameter.__dict__)
        return module

    def all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        """Of one rank; pickled bytes are numbers, which fake tensors do not have."""
        found[:] = [own] * len(found)

    new_group = dist.new_group
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda index: None),
        (torch.cuda, "synchronize", lambda *device: None),
        (torch.cuda, "get_device_capability", lambda *device: (9, 0)),
        (torch.cuda, "get_device_name", lambda *device: PRODUCT),
        (torch.cuda, "get_rng_state", rng_state),
        (torch.cuda.random, "get_rng_state", rng_state),
        (torch.nn.Module, "to", to),
        (dist, "all_gather_object", all_gather_object),
        (dist, "new_group", lambda *args, **options: new_group(*args, **options | {"backend": "fake"})),
    ]
    with ExitStack() as stack:
        for stand_in in stand_ins:
            stack.enter_context(patch.object(*stand_in))
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield CudaDevice()
