"""The verb `modellink doctor`: devices, versions and the operations in use."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from modellink.config.fields import flag
from modellink.config.parser import parse_sections

PACKAGES = ("torch", "torch-npu", "triton", "liger-kernel", "megatron-core", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class DoctorOptions:
    """Doctor."""

    device: str = flag("auto", "device to look at", choices=["auto", "npu", "cuda", "cpu"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a bug report needs; exit code 0, or 2 when the device asked for cannot be used."""
    (options,), _ = parse_sections("modellink doctor", "Show devices, libraries and operations.", (DoctorOptions,),
                                   argv)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from modellink.device.select import describe_devices, select_device
    from modellink.ops.forms import Situation
    from modellink.ops.table import describe

    print(f"{'python':<15} {platform.python_version()} at {sys.executable}")
    for package in PACKAGES:
        print(f"{package:<15} {_version(package)}")
    print("\n".join(describe_devices()))
    device = select_device(options.device)
    print(f"chosen: {device.name} ({device.free_memory() / 1024**3:.1f} GiB free)")
    for name, version in device.libraries().items():
        print(f"  {name}: {version}")
    print("\n".join(describe(Situation(device.name, device.product_name()))))
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
