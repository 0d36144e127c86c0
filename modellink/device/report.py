"""The lines about a machine with which `modellink doctor` and every training log open."""

import importlib.metadata
import platform
import sys

from modellink.device.base import Device
from modellink.device.starting import reporting_device

PACKAGES = ("torch", "torch-npu", "triton", "liger-kernel", "megatron-core", "transformers", "safetensors", "numpy")


def package_lines() -> list[str]:
    """The versions of Python and of the packages that decide what runs."""
    return [f"{'python':<15} {platform.python_version()} at {sys.executable}",
            *(f"{package:<15} {_version(package)}" for package in PACKAGES)]


def device_lines(device: Device) -> list[str]:
    """The device of this process, and the versions of its driver and libraries.

    Raises:
        ConfigError: the device does not start.
    """
    with reporting_device(device.name):
        return [f"chosen: {device.name}, {device.product_name()} ({device.free_memory() / 1024**3:.1f} GiB free)",
                *(f"  {name}: {version}" for name, version in device.libraries().items())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
