"""Which form of every operation runs on a device, and why."""


def describe(device_name: str) -> list[str]:
    """One line for each operation."""
    where = f"torch's {device_name} kernels"
    return [
        f"rms_norm: torch.nn.functional.rms_norm ({where})",
        f"rotary: own autograd function over elementwise torch operations ({where})",
        f"swiglu: own autograd function over elementwise torch operations ({where})",
        f"attention: torch.nn.functional.scaled_dot_product_attention, causal, grouped queries ({where})",
        f"cross_entropy: chunked over tokens, vocabulary parallel, gradient in place ({where})",
        f"adamw: torch's fused AdamW ({where})",
    ]
