"""The worker of `ladder.py` with every operation in its NPU form, on CPU tensors and over operator contracts.

Of ours only two things are different from a run on the CPU: the choice of forms is told of an NPU, and the name of a
communicator, which HCCL would give, is made up here. Cases with --use-symm-mem are here because these workers have
started anyway: they have the CPU's forms, and of CUDA's the two linear layers.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ladder
import npu_contracts
import torch.distributed as dist
from symmetric_memory import symmetric_linears

from modellink.models import forms
from modellink.ops.forms import Situation
from modellink.ops.npu import parallel_linear

PRODUCT = "Ascend910B2"
real_situation = forms.situation_of


def situation_on_npu(run: Any, device: Any) -> Situation:
    situation = real_situation(run, device)
    if run.settings.device.use_symm_mem:
        return situation
    return dataclasses.replace(situation, device="npu", product=PRODUCT)


def communicator(group: dist.ProcessGroup) -> str:
    name = f"group of {dist.get_process_group_ranks(group)}, {id(group)}"
    npu_contracts.COMMUNICATORS[name] = group
    return name


@contextmanager
def npu_forms() -> Iterator[None]:
    """Models built inside the block use the forms of an NPU."""
    with (npu_contracts.contracts(), patch.object(forms, "situation_of", situation_on_npu),
          patch.object(parallel_linear, "communicator", communicator)):
        yield


def main(cases_path: str) -> None:
    """Runs the cases; CASES.called holds the operators whose kernels ran on rank 0."""
    with npu_forms(), symmetric_linears(Path(cases_path).parent) as called:
        ladder.main(cases_path)
    if os.environ.get("RANK", "0") == "0":
        Path(cases_path).with_suffix(".called").write_text(json.dumps(sorted({*npu_contracts.CALLED, *called})))


if __name__ == "__main__":
    main(sys.argv[1])
