"""Peak rates of accelerators, each with its source; a device that is not here has no MFU.

Huawei publishes no rates of its later chips: those are third parties' figures, which differ between sources, and their
rows say so.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSpec:
    """Attributes: dense peak rate of matrix products in FLOP/s.

    `bf16_flops` is also the rate in fp16, and that alone where `has_bf16` is False.
    """

    match: str  # regular expression, found in the product name
    bf16_flops: float
    source: str
    has_bf16: bool = True


CUBES = "cube cores x 16^3 x 2 x clock, third party (verl's flops_counter.py has 354 for every 910B)"
SPECS = (
    DeviceSpec(r"\bB200\b", 2250e12, "NVIDIA DGX B200 datasheet: 36 PFLOP/s dense BF16, 1440 GB of 8 GPUs"),
    DeviceSpec(r"\bGB200\b", 2500e12, "NVIDIA GB200 NVL72 datasheet: 180 PFLOP/s dense BF16 of 72 GPUs"),
    DeviceSpec(r"\bH200 NVL", 835e12, "NVIDIA H200 NVL datasheet: 835 TFLOP/s dense BF16, 141 GB"),
    DeviceSpec(r"\bH200\b", 989e12, "NVIDIA H200 datasheet: 989 TFLOP/s dense BF16, 141 GB"),
    DeviceSpec(r"\bH100 PCIe", 756e12, "NVIDIA H100 PCIe datasheet: 756 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bH100 NVL", 835e12, "NVIDIA H100 NVL datasheet: 835 TFLOP/s dense BF16, 94 GB"),
    DeviceSpec(r"\bH100\b", 989e12, "NVIDIA H100 SXM datasheet: 989 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bH800 PCIe", 756e12, "an H100 PCIe with slower links: 756 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bH800\b", 989e12, "an H100 SXM with slower links: 989 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bA100\b", 312e12, "NVIDIA A100 datasheet: 312 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bA800\b", 312e12, "an A100 with slower links: 312 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec(r"\bL40S\b", 362.05e12, "NVIDIA L40S datasheet: 362.05 TFLOP/s dense BF16, 48 GB"),
    DeviceSpec(r"\bRTX 4090$", 165.2e12,
               "NVIDIA Ada architecture paper: 165.2 TFLOP/s dense BF16 with fp32 sums, 24 GB"),
    DeviceSpec(r"Ascend910_93", 376e12,
               "a die of the 910C: 752 TFLOP/s BF16 and 128 GB a package of two, third party (arXiv 2506.12708)"),
    DeviceSpec(r"Ascend910B[12]", 354e12, f"24 x 1.8 GHz: {CUBES}"),
    DeviceSpec(r"Ascend910B3", 295e12, f"20 x 1.8 GHz: {CUBES}"),
    DeviceSpec(r"Ascend910B4", 246e12, f"20 x 1.5 GHz: {CUBES}"),
    DeviceSpec(r"Ascend910A\b", 256e12,
               "Huawei at the launch of the Ascend 910, 2019: 256 TFLOP/s FP16 (the chip has no BF16), 32 GB",
               has_bf16=False),
)


def find_spec(product_name: str) -> DeviceSpec | None:
    """The first entry that is found in `product_name`, or None: unknown hardware and slices of it are never guessed."""
    if re.search(r"\bMIG\b", product_name):
        return None
    return next((spec for spec in SPECS if re.search(spec.match, product_name, re.IGNORECASE)), None)


def peak_line(product_name: str, precision: str = "bf16") -> str:
    """What the MFU of a run in a precision (fp32, bf16 or fp16) is measured against."""
    spec = find_spec(product_name)
    if spec is not None and precision == "fp32":
        return "MFU is n/a: the peak rates are those of bf16 and fp16"
    if spec is None:
        return f"MFU is n/a: no peak rate of {product_name} is known"
    return f"MFU is the share of {spec.bf16_flops / 1e12:g} TFLOP/s ({spec.source})"
