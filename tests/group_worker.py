"""The worker of `ladder.py` that writes down which process groups each case uses: `python group_worker.py CASES.json`.

CASES.<rank>.groups receives, for each case, for its start and for what follows, the operators of torch.distributed
that ran on each group of more than one rank.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ladder
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import modellink.start
from modellink.device.base import Device
from modellink.models.run import Run

Operators = dict[str, list[str]]
MESSAGES = {"c10d::send", "c10d::recv_"}
# megatron-core's descriptions -> our names
DESCRIBED = {"default_pg": "world", "TENSOR_MODEL_PARALLEL_GROUP": "tp", "DATA_PARALLEL_GROUP_WITH_CP": "dp",
             "PIPELINE_MODEL_PARALLEL_GROUP": "pp", "MODEL_PARALLEL_GROUP": "mp", "EMBEDDING_GROUP": "embd",
             "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer"}


class GroupsInUse(TorchDispatchMode):
    """Collects the operators of groups; those of gloo that stand beside others on an accelerator do not count."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            for value in args:
                if not hasattr(value, "_type") or "ProcessGroup" not in str(value._type()):
                    continue
                group = dist.ProcessGroup.unbox(value)
                if group.size() > 1 and "GLOO" not in group.group_desc:
                    self._found.setdefault(group.group_desc, set()).add(func.name())
        return func(*args, **(kwargs or {}))

    def take(self) -> Operators:
        """What was found since the last call, by our names of the groups."""
        found, self._found = self._found, {}
        return {DESCRIBED[name]: sorted(operators) for name, operators in found.items()}


def with_collectives(operators: Operators) -> set[str]:
    """The groups that ran more than messages from one rank to another."""
    return {name for name, of_group in operators.items() if set(of_group) - MESSAGES}


def with_messages(operators: Operators) -> set[str]:
    return {name for name, of_group in operators.items() if set(of_group) & MESSAGES}


def main(cases_path: str) -> None:
    """One record for each case, in order."""
    path = Path(cases_path)
    found = []
    own_start = modellink.start.start
    with GroupsInUse() as groups:
        started: list[Operators] = []

        def start(run: Run) -> Device:
            device = own_start(run)
            started.append(groups.take())
            return device

        modellink.start.start = start
        for index, case in enumerate(json.loads(path.read_text())):
            single = path.with_suffix(f".{os.environ['RANK']}.{index}.case")
            single.write_text(json.dumps([case]))
            ladder.run_all(str(single))
            found.append({"start": started.pop(), "run": groups.take()})
    path.with_suffix(f".{os.environ['RANK']}.groups").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
