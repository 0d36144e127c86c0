"""NVIDIA GPUs through torch.cuda and nccl."""

import os

import torch


def order_kernels(tensor_ranks: int) -> None:
    """Let GPUs start kernels in the order in which they were launched, unless the user has said otherwise.

    Tensor parallel layers launch a collective just before the product that hides it; with several queues to the GPU the
    product may take it all first. The driver reads the variable when it starts: call this before anything asks for a
    device. (Megatron-LM asks for it up to Hopper, and no more from Blackwell on.)
    """
    if torch.version.cuda is not None and tensor_ranks > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


class CudaDevice:
    """One NVIDIA GPU per rank."""

    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        self.namespace = torch.cuda

    def unusable_reason(self) -> str | None:
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) was built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch sees no usable GPU; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        return None

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
        return {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "nccl": nccl,
                "cuDNN": str(torch.backends.cudnn.version())}
