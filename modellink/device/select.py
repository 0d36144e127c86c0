"""Choosing the device of a run."""

from modellink.config import ConfigError
from modellink.device.base import Device
from modellink.device.cpu import CpuDevice
from modellink.device.cuda import CudaDevice
from modellink.device.npu import NpuDevice
from modellink.device.starting import reporting_device

_KINDS: dict[str, type] = {"npu": NpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}  # best first


def select_device(name: str = "auto") -> Device:
    """Return the device called `name`; `auto` takes the best one that is really usable.

    Raises:
        ConfigError: the device asked for cannot be used here.
    """
    if name == "auto":
        devices = (kind() for kind in _KINDS.values())
        return next(device for device in devices if device.unusable_reason() is None)
    device: Device = _KINDS[name]()
    reason = device.unusable_reason()
    if reason:
        raise ConfigError(f"--device {name}: {reason}; or use --device auto.")
    return device


def describe_devices() -> list[str]:
    """One line for each kind of device: usable, or why not."""
    lines = []
    for name, kind in _KINDS.items():
        device = kind()
        reason = device.unusable_reason()
        lines.append(f"{name}: not usable: {reason}" if reason is not None else _described(device))
    return lines


def _described(device: Device) -> str:
    try:
        with reporting_device("it"):
            return f"{device.name}: usable, {device.count()} visible, {device.product_name()}"
    except ConfigError as error:  # a look at all devices goes on
        return f"{device.name}: not usable: {error}"
