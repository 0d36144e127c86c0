"""Triton kernels on CPU tensors; test modules call `require_interpreter` before anything else.

Triton's interpreter runs the kernels' Python with numpy, and differs from the compiler in four things that the kernels
of liger-kernel need. They are set right here, in the interpreter and not in the kernels: it hands numbers over bare,
which the compiler makes fp32 scalars; it has no libdevice; it holds bf16 as integers and multiplies those; and it cuts
fp32 off to bf16 where a GPU rounds to the nearest.
"""

import importlib.util
import os
from typing import Any

import pytest


def require_interpreter() -> None:
    """Skip the calling test module, with the reason, where the kernels cannot be interpreted."""
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed here; `make test-triton` runs these tests",
                        allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1; `make test-triton` runs these tests", allow_module_level=True)


def complete_interpreter() -> None:
    """Give the interpreter what it lacks; once a process, before a kernel runs."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    bare_argument, integer_operation, cutting_cast = interpreter._implicit_cvt, builder.binary_op, builder.cast_impl

    def argument(value: Any) -> Any:
        if type(value) is float:
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return bare_argument(value)

    def operation(self: Any, left: Any, right: Any, function: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return integer_operation(self, left, right, function)
        wide = (self.cast_impl(operand, tl.float32) for operand in (left, right))
        return self.cast_impl(integer_operation(self, *wide, function), tl.bfloat16)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cutting_cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    interpreter._implicit_cvt, builder.binary_op, builder.cast_impl = argument, operation, cast
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # looked up when called: the interpreter replaces it
