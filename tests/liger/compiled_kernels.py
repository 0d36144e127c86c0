"""Compiles our Triton kernels for GPUs that need not be here; prints a line for each kernel, dtype and chip."""

import re

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modellink.ops.cuda import cross_entropy, triton_cross_entropy

FLOAT, WORD = "*fp32", "*i64"
SIGNATURES = {
    triton_cross_entropy.statistics: {"target": WORD, "top_out": FLOAT, "sum_out": FLOAT, "at_out": FLOAT},
    triton_cross_entropy.derivative: {"target": WORD, "log_sum": FLOAT, "slope": FLOAT},
}

for kernel, pointers in SIGNATURES.items():
    for kind in ("fp32", "bf16", "fp16"):
        signature = {"logits": f"*{kind}", **pointers, **dict.fromkeys(("first", "rows", "real"), "i32"),
                     "BLOCK": "constexpr"}
        for chip in (80, 90, 100):
            source = ASTSource(kernel, signature, {"BLOCK": cross_entropy._BLOCK})
            made = compile_kernel(source, GPUTarget("cuda", chip, 32), {"num_warps": cross_entropy._WARPS})
            assert made.asm["cubin"]
            shared = made.metadata.shared
            print(kernel.__name__, kind, f"sm_{chip}", f"shared {shared}", "spills",
                  len(re.findall(r"\b[sl]t\.local", made.asm["ptx"])))
