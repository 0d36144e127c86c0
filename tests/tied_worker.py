"""The worker of `ladder.py` that writes down what a backward does to whole tables: `python tied_worker.py CASES.json`.

CASES.<rank>.<case>.tables receives the names of the operators that made or changed a tensor of the embedding's shape
(this rank's rows) while gradients were computed, in their order, but for those that only reserve memory or look at it
otherwise.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ladder
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, HIDDEN = 1003, 96  # of tests/tiny.py
# they touch no element
FREE = ("empty", "t", "transpose", "view", "_unsafe_view", "detach", "alias", "expand")


class Tables(TorchDispatchMode):
    """Collects names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward and isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == HIDDEN:
            name = func.name().removeprefix("aten::").split(".")[0]
            if out.shape[0] in (ROWS, (ROWS + 1) // 2) and name.removesuffix("_like") not in FREE:
                self.found.append(name)
        return out


def main(cases_path: str) -> None:
    """One set of groups for each case, in order."""
    path = Path(cases_path)
    for index, case in enumerate(json.loads(path.read_text())):
        single = path.with_suffix(f".{os.environ['RANK']}.{index}.case")
        single.write_text(json.dumps([case]))
        with Tables() as tables:
            ladder.run_all(str(single))
        path.with_suffix(f".{os.environ['RANK']}.{index}.tables").write_text(json.dumps(tables.found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
