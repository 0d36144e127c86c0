"""Starts a run on the simulated NPU under torchrun and writes what its process groups were made with.

`python runtime_worker.py FOLDER ARGUMENTS...`: FOLDER/RANK.json receives HCCL's configuration of each group, its
timeout in seconds, the environment of HCCL, and whether private memory formats are allowed. With TRUE_GROUPS=1 ranks
join over the simulated HCCL, and all other groups are torch_npu's own, which find no HCCL.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch_npu  # noqa: E402
from simulator import simulated_npu  # noqa: E402

from modellink.config import run_command  # noqa: E402
from modellink.config.settings import parse_settings  # noqa: E402
from modellink.device.select import select_device  # noqa: E402
from modellink.parallel.join import join  # noqa: E402
from modellink.parallel.rank import Rank  # noqa: E402
from modellink.runtime import prepare_run  # noqa: E402
from modellink.start import start  # noqa: E402


def described(group: Any) -> dict[str, Any] | None:
    return None if group.options is None else {"config": group.options.hccl_config,
                                               "class": type(group.options).__qualname__, "calls": sorted(group.calls)}


def main(folder: str, arguments: list[str]) -> None:
    true_groups = dist.Backend._plugins["HCCL"]
    with simulated_npu():
        # the first device sets torch_npu's own default, which differs between releases and products
        torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
        torch.npu.config.allow_internal_format = True
        if "TRUE_GROUPS" in os.environ:
            join(select_device("npu"), Rank.from_environment(), timedelta(minutes=1))
            dist.Backend._plugins["HCCL"] = true_groups
        start(prepare_run(parse_settings("worker", "", arguments), int(os.environ["WORLD_SIZE"]), "train"))
        from megatron.core import parallel_state

        found = {
            "world": described(dist.distributed_c10d._get_default_group()),
            "tp": described(parallel_state.get_tensor_model_parallel_group()),
            "dp": described(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            "mp": described(parallel_state.get_model_parallel_group()),
        }
        environment = {name: os.environ.get(name) for name in (
            "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC")}
        path = Path(folder) / f"{os.environ['RANK']}.json"
        formats = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT").decode()
        path.write_text(json.dumps({"groups": found, "environment": environment, "internal formats": formats}))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(run_command(lambda words: main(sys.argv[1], sys.argv[2:])))
