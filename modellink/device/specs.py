"""Peak rates of accelerators, each with its source; a device that is not here has no MFU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSpec:
    """Attributes: dense peak rates in FLOP/s and memory in bytes, as the vendor's datasheet states them."""

    match: str  # part of the product name
    bf16_flops: float
    memory: int
    source: str


GIB = 1024**3
SPECS = (
    DeviceSpec("H200", 989e12, 141 * GIB, "NVIDIA H200 datasheet: 989 TFLOP/s dense BF16, 141 GB"),
    DeviceSpec("H100", 989e12, 80 * GIB, "NVIDIA H100 SXM datasheet: 989 TFLOP/s dense BF16, 80 GB"),
    DeviceSpec("A100", 312e12, 80 * GIB, "NVIDIA A100 datasheet: 312 TFLOP/s dense BF16, 80 GB"),
)


def find_spec(product_name: str) -> DeviceSpec | None:
    """The entry whose name is part of `product_name`, or None: unknown hardware is never guessed."""
    return next((spec for spec in SPECS if spec.match.lower() in product_name.lower()), None)
