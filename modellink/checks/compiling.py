"""What `--compile` needs: a device it knows, a compiler, and for whole layers no collectives inside them."""

import os
import shutil

from modellink.checks.values import Program
from modellink.config.errors import ProblemList
from modellink.config.settings import Settings
from modellink.device.compilers import python_headers_missing, triton_missing

DEVICES = ("cpu", "cuda")


def check_compile(settings: Settings, device: str, is_here: bool, problems: ProblemList) -> None:
    """Whether `--compile` can be kept.

    Args:
        device: name of the device the run uses, empty when unknown.
        is_here: the run is on this machine, whose compilers can be looked for.
    """
    mode, tensor = settings.device.compile, settings.parallel.tensor_model_parallel_size
    if mode == "off":
        return
    flag = f"--compile {mode}"
    if device and device not in DEVICES:
        problems.add(f"{flag}: torch.compile is offered on {' and '.join(DEVICES)} and not on {device}; leave it out, "
                     f"{device} has fused kernels of its own.")
    elif is_here:
        missing = _missing_on(device)
        if missing:
            problems.add(f"{flag} on {device}: {missing}, or leave --compile out.")
    if mode != "layer":
        return
    if tensor > 1:
        problems.add(f"{flag} with --tensor-model-parallel-size {tensor}: torch.compile takes no asynchronous "
                     "collectives into its graph, and the pieces of a layer between them were slower than the layer as "
                     "it is (0.91x on a CPU); use --compile pointwise.")
    if settings.device.gradient_accumulation_fusion:
        problems.add(f"{flag} with --gradient-accumulation-fusion: adding to the main gradient on the way cuts the "
                     "graph of a layer at every matrix product; leave one of them out.")


def _missing_on(device: str) -> str | None:
    """What the code generator of a device does not find, and how to get it."""
    if device == "cuda":
        return triton_missing()
    compiler = os.environ.get("CXX", "g++")  # as torch's inductor looks for it
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found ({compiler}); install g++ or name one with CXX"
    return python_headers_missing()


def compile_notices(settings: Settings, program: Program) -> list[str]:
    """A line where `--compile` does less than it says."""
    if settings.device.compile == "layer" and program != "train":
        return ["--compile layer: only training compiles whole layers; here it is --compile pointwise."]
    return []
