"""The CPU as a device: gloo, no streams, and a stand-in for the parts of torch.cuda that megatron-core names."""

import contextlib
import ctypes
import resource
import types
from typing import Any

import psutil
import torch

from modellink.device.options import DeviceOptions, make_deterministic

# of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 30  # bytes
LARGEST_ON_HEAP = 1 << 25  # bytes; operations that make larger outputs keep the memory themselves


class NoStream:
    """A stream or event that has always finished: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "NoStream":
        return self

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "NoStream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _nothing(*args: Any, **options: Any) -> None:
    return None


def _zero(*args: Any, **options: Any) -> int:
    return 0


def _false(*args: Any, **options: Any) -> bool:
    return False


def _no_context(*args: Any, **options: Any) -> Any:
    return contextlib.nullcontext()


def _current_device() -> torch.device:
    # retargeted code says x.to(current_device()) and device=current_device()
    return torch.device("cpu")


def cpu_namespace() -> types.SimpleNamespace:
    """What megatron-core finds instead of torch.cuda."""
    types_of_tensors = {name: getattr(torch, name) for name in (
        "FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "LongTensor", "IntTensor", "ByteTensor")}
    return types.SimpleNamespace(
        **types_of_tensors,
        Stream=NoStream, Event=NoStream, CUDAGraph=NoStream, Generator=torch.Generator,
        stream=_no_context, device=_no_context, graph=_no_context,
        current_stream=NoStream, default_stream=NoStream,
        current_device=_current_device, set_device=_nothing, device_count=lambda: 1,
        is_available=_false, is_initialized=_false, is_current_stream_capturing=_false,
        synchronize=_nothing, empty_cache=_nothing, manual_seed=torch.manual_seed,
        memory_allocated=_zero, max_memory_allocated=_zero, memory_reserved=_zero, max_memory_reserved=_zero,
        get_rng_state=lambda *a, **k: torch.get_rng_state(),
        set_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
        random=types.SimpleNamespace(get_rng_state=lambda *a, **k: torch.get_rng_state(),
                                     set_rng_state=lambda state, *a, **k: torch.set_rng_state(state)),
        default_generators=(torch.default_generator,),
        get_device_capability=lambda *a: (0, 0),
        get_device_properties=lambda *a: types.SimpleNamespace(total_memory=psutil.virtual_memory().total, name="cpu"),
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_no_context),
    )


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, as allocators of accelerators do.

    By default glibc gives the end of its heap back to the system at once; the next tensor then pays for every page of
    4 KiB again, which the system has to clear (several percent of a training step). Blocks above 32 MiB stay mappings
    of their own: on the heap a freed one is a hole that the next of its size does not fit into again, because torch
    asks for aligned blocks, and the process grows without end. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)


class CpuDevice:
    """A plain CPU. Every rank is a process with its own share of the threads."""

    name = "cpu"
    backend = "gloo"
    graph_recorder = None

    def __init__(self) -> None:
        self.namespace = cpu_namespace()

    def unusable_reason(self) -> str | None:
        return None

    def prepare(self, options: DeviceOptions) -> None:
        if options.deterministic:
            make_deterministic({})

    def group_options(self, group: str) -> Any:
        return None

    def vary_lengths(self) -> None:
        pass

    def profiler(self) -> Any:
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def set_current(self, local_rank: int) -> torch.device:
        keep_freed_memory()
        return torch.device("cpu")

    def current(self) -> torch.device:
        return torch.device("cpu")

    def count(self) -> int:
        return 1

    def synchronize(self) -> None:
        pass

    def free_memory(self) -> int:
        return psutil.virtual_memory().available

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def product_name(self) -> str:
        return "cpu"

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def libraries(self) -> dict[str, str]:
        return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
