"""NVIDIA GPUs through torch.cuda and nccl."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modellink.device.options import DeviceOptions, make_deterministic
from modellink.device.visible import setting_of, visibility_problem

VISIBLE = "CUDA_VISIBLE_DEVICES"
# cuBLAS: https://docs.nvidia.com/cuda/cublas/#results-reproducibility. NCCL: reductions in the switch (NVLS) add in an
# order of their own; megatron-core's deterministic mode asks for an algorithm as well
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
                 "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain")}


def order_kernels(tensor_ranks: int) -> None:
    """Let GPUs start kernels in the order in which they were launched, unless the user has said otherwise.

    Tensor parallel layers launch a collective just before the product that hides it; with several queues to the GPU the
    product may take it all first. The driver reads the variable when it starts: call this before anything asks for a
    device. (Megatron-LM asks for it up to Hopper, and no more from Blackwell on.)
    """
    if torch.version.cuda is not None and tensor_ranks > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


class GraphCapture:
    """Records functions as CUDA graphs that share one memory pool and one stream.

    What a graph makes on its way lies where another of the same pool may write: its result holds until any of them is
    launched, so take a copy, and launch them on one stream. Memory of the pool is free again when all its graphs are
    gone; torch then asks for a new pool, so make a new object.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # also for the warm-up: libraries keep a workspace for each stream, and must not get it from the pool
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record the kernels that `step` launches.

        Args:
            step: reads and writes tensors that stay where they are, moves nothing between host and device, and asks for
                no value of a tensor.

        Returns:
            A function that launches them again and gives the tensor that they fill, always the same.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # first calls of libraries allocate and compile, which is not recorded
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = step()

        def launch() -> torch.Tensor:
            graph.replay()
            return out

        return launch


class CudaDevice:
    """One NVIDIA GPU per rank."""

    name = "cuda"
    backend = "nccl"
    graph_recorder = GraphCapture

    def __init__(self) -> None:
        self.namespace = torch.cuda

    def unusable_reason(self) -> str | None:
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) was built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return visibility_problem(VISIBLE) or _start_problem()
        return None

    def prepare(self, options: DeviceOptions) -> None:
        if options.deterministic:
            make_deterministic(DETERMINISTIC)

    def group_options(self, group: str) -> Any:
        return None

    def vary_lengths(self) -> None:
        # cuDNN makes a plan for every new shape, on the host and for good; flash attention needs none
        torch.backends.cuda.enable_cudnn_sdp(False)

    def profiler(self) -> Any:
        kinds = torch.profiler.ProfilerActivity
        return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])

    def set_current(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def current(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def count(self) -> int:
        return torch.cuda.device_count()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def product_name(self) -> str:
        return torch.cuda.get_device_name()

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def libraries(self) -> dict[str, str]:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"driver": driver_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda), "nccl": nccl,
                "cuDNN": str(torch.backends.cudnn.version())}


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of the kernel module, as Linux shows it."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text()) if path.is_file() else None
    return found[1] if found else "unknown"


def _start_problem() -> str:
    """Why CUDA does not start, in the driver's words where it has any; a list of visible GPUs may be the cause."""
    shown = setting_of(VISIBLE)
    advice = f"{shown}: compare it with the GPUs that nvidia-smi lists" if shown else "check the driver with nvidia-smi"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"CUDA does not start ({str(error).splitlines()[0].rstrip('.')}); {advice}"
    return f"torch sees no usable GPU; {advice}"
