"""Packages that others install beside torch_npu, and what of them is used here."""

import importlib.metadata
import importlib.util

USES = {
    "mindspeed": "npu_matmul_add_fp32, only with --use-mindspeed-ops and --gradient-accumulation-fusion",
    # its optimizers join tensors by moving their memory, which the gradient buffers of megatron-core do not allow
    "apex": "nothing of it, torch_npu has a fused AdamW of its own",
}


def companion_lines() -> list[str]:
    """One line for each package: its version, and what of it is used. Nothing is imported."""
    return [f"{name}: {_version(name)}; used: {use}" for name, use in USES.items()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(name) is None else "installed"
