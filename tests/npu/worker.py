"""The worker of `ladder.py` on the simulated NPU: `python worker.py CASES.json`, also under torchrun.

CASES.<rank>.record receives which npu:: operators ran, how often, the autograd nodes that called them, and which
other operators ran on npu tensors, and how many messages each batch had that torch_npu sent as one. A stand-in for
MindSpeed can be imported. With EVERY_DTYPE=1 the products of MC2 and of weight gradients take fp32 too. A case whose
metrics file has CANN_9 in its name runs as under CANN 9.
"""

import json
import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parent / "stand_in")]

import ladder  # noqa: E402
from mindspeed.ops import npu_matmul_add  # noqa: E402
from npu_contracts import every_dtype  # noqa: E402
from npu_environment import CANN_9  # noqa: E402
from simulator import BATCHES, cann_9, simulated_npu  # noqa: E402


def around(words: list[str]) -> AbstractContextManager:
    return cann_9() if any(CANN_9 in word for word in words) else nullcontext()


def main(cases_path: str) -> None:
    with simulated_npu() as kernels, ExitStack() as stack:
        if "EVERY_DTYPE" in os.environ:
            stack.enter_context(every_dtype())
        ladder.main(cases_path, around)
    record = Path(cases_path).with_suffix(f".{os.environ.get('RANK', 0)}.record")
    record.write_text(json.dumps({"calls": kernels.calls | {"mindspeed": npu_matmul_add.calls},
                                  "nodes": sorted(kernels.nodes), "operators": sorted(kernels.operators),
                                  "batches": BATCHES}))


if __name__ == "__main__":
    main(sys.argv[1])
