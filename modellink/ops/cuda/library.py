"""liger-kernel and young functions of torch, looked at when a CUDA form is first considered."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from typing import Any

import torch
from torch import Tensor

from modellink.device.compilers import triton_missing

# operation -> (module, autograd function) of liger-kernel
LIGER = {
    "rms_norm": ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"),
    "rotary": ("liger_kernel.ops.rope", "LigerRopeFunction"),
    "swiglu": ("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction"),
}
# oldest, and first that was not read: the forms rely on what its functions do inside (in place or not, dtypes,
# dimensions of gradients), which no signature tells; setup.py has the same range
LIGER_VERSIONS = ((0, 8, 5), (0, 9))


SYMMETRIC_MEMORY = "torch.distributed._symmetric_memory"


@functools.cache
def liger(operation: str) -> Any:
    """The autograd function of an operation.

    Raises:
        ImportError: liger-kernel or triton is missing or does not fit.
    """
    module, name = LIGER[operation]
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"no {name}") from error


@functools.cache
def liger_missing() -> str | None:
    """None when liger-kernel's functions can be had, otherwise a few words why not."""
    problem = triton_missing()
    if problem is not None:
        return problem
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install 'modellink[cuda]'"
    try:
        problem = liger_version_problem(importlib.metadata.version("liger-kernel"))
    except importlib.metadata.PackageNotFoundError:  # nightly builds have another name
        problem = liger_version_problem("of an unknown version")
    if problem is not None:
        return problem
    try:
        for operation in LIGER:
            liger(operation)
    except (ImportError, OSError, RuntimeError) as error:
        return f"the installed liger-kernel cannot be used ({error}); pip install 'modellink[cuda]'"
    return None


def liger_version_problem(version: str) -> str | None:
    """None for a version of liger-kernel that the forms fit, otherwise a few words."""
    oldest, beyond = LIGER_VERSIONS
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if oldest <= numbers < beyond:
        return None
    first, last = (".".join(map(str, bound)) for bound in LIGER_VERSIONS)
    return (f"liger-kernel {version} is installed, and the forms know the inside of {first} to below {last}; "
            "pip install 'modellink[cuda]'")


@functools.cache
def varlen_missing(is_grouped: bool, is_cached: bool = False) -> str | None:
    """None when torch's varlen_attn takes what we give it, otherwise a few words why not.

    The function is young: up to torch 2.10 it had another way to say causal; grouped queries and rows that are read in
    part came later still.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    needed = ["scale", "window_size", *(["enable_gqa"] if is_grouped else []),
              *(["seqused_k"] if is_cached else [])]
    missing = [name for name in needed if name not in inspect.signature(varlen_attn).parameters]
    return f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}" if missing else None


def addmm_missing() -> str | None:
    """None when torch's addmm gives a sum of another dtype than its factors, otherwise a few words why not.

    That the matrix added to may be fp32 too is of torch 2.10, older than every torch that the package installs with.
    """
    if "dtype_out" in torch.ops.aten.addmm.overloads():
        return None
    return f"addmm of torch {torch.__version__} has no out_dtype"


def symmetric_memory_missing() -> str | None:
    """None when torch has the products over symmetric memory as we call them, otherwise a few words why not.

    They are the same in torch 2.11 and 2.13; their module, which defines them, is not a public one yet.
    """
    try:
        importlib.import_module(SYMMETRIC_MEMORY)
        gathered, _ = torch.ops.symm_mem.fused_all_gather_matmul, torch.ops.symm_mem.fused_matmul_reduce_scatter
        if "return_A" in {argument.name for argument in gathered.default._schema.arguments}:
            return None
    except (ImportError, AttributeError):
        pass
    return f"torch {torch.__version__} does not have these products"


@functools.lru_cache(maxsize=8)
def boundaries(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Boundaries of packed samples on the device, [samples + 1] int32; copied once for all layers of a pass."""
    with torch.inference_mode(False):  # a later backward may keep them
        return torch.tensor(cu_seqlens, dtype=torch.int32).to(device, non_blocking=True)
