"""The worker of `ladder.py` that writes down which process groups each case uses: `python group_worker.py CASES.json`.

CASES.<rank>.json receives, for each case, the descriptions of the groups of more than one rank whose accelerator
backend ran a collective, or a send or receive.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ladder
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class GroupsInUse(TorchDispatchMode):
    """Collects the descriptions of groups; those of gloo that stand beside others on an accelerator do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            for value in args:
                if not hasattr(value, "_type") or "ProcessGroup" not in str(value._type()):
                    continue
                group = dist.ProcessGroup.unbox(value)
                if group.size() > 1 and "GLOO" not in group.group_desc:
                    self.found.add(group.group_desc)
        return func(*args, **(kwargs or {}))


def main(cases_path: str) -> None:
    """One set of groups for each case, in order."""
    path = Path(cases_path)
    found = []
    for index, case in enumerate(json.loads(path.read_text())):
        single = path.with_suffix(f".{os.environ['RANK']}.{index}.case")
        single.write_text(json.dumps([case]))
        with GroupsInUse() as groups:
            ladder.run_all(str(single))
        found.append(sorted(groups.found))
    path.with_suffix(f".{os.environ['RANK']}.groups").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
