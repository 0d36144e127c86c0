"""The verb `modellink doctor`: devices, versions and the operations in use."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from modellink.config.fields import flag
from modellink.config.parser import parse_sections


@dataclass(frozen=True)
class DoctorOptions:
    """Doctor."""

    device: str = flag("auto", "device to look at", choices=["auto", "npu", "cuda", "cpu"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a bug report needs; exit code 0, or 2 when the device asked for cannot be used."""
    (options,), _ = parse_sections("modellink doctor", "Show devices, libraries and operations.", (DoctorOptions,),
                                   argv)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from modellink.device.report import device_lines, package_lines
    from modellink.device.select import describe_devices, select_device
    from modellink.device.specs import peak_line
    from modellink.ops.forms import Situation
    from modellink.ops.table import describe

    print("\n".join([*package_lines(), *describe_devices()]))
    device = select_device(options.device)
    print("\n".join(device_lines(device)))
    print(f"  {peak_line(device.product_name())}")
    print("\n".join(describe(Situation(device.name, device.product_name()))))
    return 0
