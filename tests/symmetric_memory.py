"""torch's products over symmetric memory on CPU tensors: its own functions for GPUs, over files that gloo ranks share.

The two streams of a GPU are one here: every call is done when it returns. So this shows what is computed from which
part of whose memory, and not that the parts overlap or wait for each other as they must.
"""

import dataclasses
import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from modellink.models import forms
from modellink.ops.cuda.library import SYMMETRIC_MEMORY
from modellink.ops.forms import Choice, Situation
from modellink.ops.table import choose

LINEARS = ("column_linear", "row_linear")
WIDEST = 8  # bytes of an element


class Stream:
    """Every stream."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Memory:
    """What torch has of a group's memory: the buffers of all ranks, and a barrier."""

    def __init__(self, group_name: str, size: int, folder: Path) -> None:
        self.group, self.size = _resolve_process_group(group_name), -(-size // WIDEST) * WIDEST
        self.rank, self.world_size = self.group.rank(), self.group.size()
        ranks = dist.get_process_group_ranks(self.group)
        place = f"{folder}/memory-{group_name}-{'-'.join(map(str, ranks))}-{self.size}-"
        self._buffers = [torch.from_file(f"{place}{rank}", shared=True, size=self.size, dtype=torch.uint8)
                         for rank in range(self.world_size)]
        self.barrier()

    def barrier(self, channel: int = 0) -> None:
        dist.barrier(self.group)

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        return self._buffers[rank].view(dtype)[storage_offset:storage_offset + math.prod(sizes)].view(*sizes)


@contextmanager
def symmetric_memory_on_cpu(folder: Path) -> Iterator[list[str]]:
    """The products for CPU tensors inside the block, in a folder that all ranks see; gives the names of those called.

    In torch's test mode they are its plain fallbacks.
    """
    module: Any = importlib.import_module(SYMMETRIC_MEMORY)
    memories: dict[str, Memory] = {}
    called: list[str] = []

    def workspace(group_name: str, min_size: int) -> Memory:
        if group_name not in memories or memories[group_name].size < min_size:
            memories[group_name] = Memory(group_name, min_size, folder)
        return memories[group_name]

    def gathered(*args: Any, **options: Any) -> Any:
        called.append("fused_all_gather_matmul")
        return module._fused_all_gather_matmul(*args, **options)

    def scattered(*args: Any) -> Any:
        called.append("fused_matmul_reduce_scatter")
        return module._fused_matmul_reduce_scatter(*args)

    stream = Stream()
    kernels = torch.library.Library("symm_mem", "IMPL")
    kernels.impl("fused_all_gather_matmul", gathered, "CPU")
    kernels.impl("fused_matmul_reduce_scatter", scattered, "CPU")
    with ExitStack() as stack:
        stack.callback(kernels._destroy)
        for stand_in in ((module, "get_symm_mem_workspace", workspace), (module, "_get_backend_stream", lambda: stream),
                         (torch.cuda, "current_stream", lambda: stream), (torch.cuda, "_sleep", lambda cycles: None)):
            stack.enter_context(patch.object(*stand_in))
        yield called


@contextmanager
def symmetric_linears(folder: Path) -> Iterator[list[str]]:
    """As `symmetric_memory_on_cpu`; runs with --use-symm-mem take their linear layers as on CUDA, and those alone."""

    def choices(situation: Situation) -> list[Choice]:
        found = choose(situation)
        if "use_symm_mem" not in situation.wishes:
            return found
        on_cuda = {choice.operation: choice for choice in choose(dataclasses.replace(situation, device="cuda"))}
        return [on_cuda[choice.operation] if choice.operation in LINEARS else choice for choice in found]

    with symmetric_memory_on_cpu(folder) as called, patch.object(forms, "choose", choices):
        yield called
