"""A `--runner` of tools/npu_acceptance.py under which things break: `python breaking_runner.py SCRIPT ARGUMENTS...`.

Attention over a cache raises what a kernel would, in generation it does so in bf16 and gives wrong numbers in fp16; a
signal ends the collectives, the training of the speed part raises, and that of a loss curve ends well without having
trained. With BREAKING_RUNNER in the environment attention over a cache takes the device with it: nothing that torch is
asked works from then on.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modellink.ops import attention

attend_rows = attention.attend_rows


def refuse(*tensors: Any, **options: Any) -> Any:
    raise RuntimeError("no kernel\nfor these shapes")


class Lost(TorchDispatchMode):
    """A device whose context is gone."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("error code is 507015")


def lose(*tensors: Any, **options: Any) -> Any:
    Lost().__enter__()
    raise RuntimeError("vector core exception")


def attend_badly(*tensors: Any, **options: Any) -> Any:
    if tensors[0].dtype == torch.bfloat16:
        refuse()
    out = attend_rows(*tensors, **options)
    return -out if out.dtype == torch.float16 else out


def train() -> None:
    try:
        {}["step"]
    except KeyError as error:
        raise RuntimeError("out of memory: 2 GiB\nare missing") from error


def main() -> None:
    script, *arguments = sys.argv[1:]
    if Path(script).name == "pretrain_gpt.py":
        if "speed.jsonl" in " ".join(arguments):
            train()
        return
    if "collectives" in arguments and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    breaks = lose if "BREAKING_RUNNER" in os.environ else refuse
    attention.attend_rows = attend_badly if Path(script).name == "npu_acceptance_generation.py" else breaks
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
