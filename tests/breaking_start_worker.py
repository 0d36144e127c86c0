"""Jobs of two ranks in which a group does not start: `python breaking_start_worker.py FOLDER`.

gloo is the library in each of them. FOLDER/KIND.RANK.log receives what a rank says, and FOLDER/KIND.json for each rank
its exit code and the seconds it took.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from modellink.config.errors import run_command
from modellink.config.settings import parse_settings
from modellink.device.select import select_device
from modellink.launch.ranks import free_port
from modellink.models.run import Run
from modellink.parallel.groups import start_groups
from modellink.parallel.join import join
from modellink.parallel.rank import Rank
from modellink.runtime import prepare_run
from modellink.start import prepare_core, start

LIMIT_SECONDS = 30.0
DEAD = 7
WORDS = ["--model", "qwen15-0.5b", "--mock-data", "--seq-length", "16", "--train-iters", "1", "--lr", "1e-3",
         "--device", "cpu", "--tensor-model-parallel-size", "2"]


def no_interface(run: Run) -> None:
    """Between joining and the groups, the interface that is named for gloo goes away."""
    rank = Rank.from_environment()
    join(select_device("cpu"), rank, timedelta(seconds=LIMIT_SECONDS))
    if rank.rank == 0:  # which keeps the store of the job, so that the other one notices at once
        os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"


def no_peer(run: Run) -> None:
    """The groups are made, and at the first collective of the second one a rank is gone."""
    start_groups(select_device("cpu"), run.dims, 1)
    if Rank.from_environment().rank == 1:
        dist.all_reduce(torch.zeros(1))
        time.sleep(1.0)  # the other one reads its sum first, and waits in the next group
        os._exit(DEAD)


KINDS = {"made": no_interface, "first": no_peer}


def be_rank(rank: int, kind: str, port: int, log: Path, run: Run) -> int:
    """A rank of its own, from the start of the job; returns its exit code."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def main(words: object) -> None:
        KINDS[kind](run)
        start(run)
        print("started")

    return run_command(main)


def wait_for(process: int, end: float) -> tuple[int, float]:
    """(exit code, when it was noticed) of a process, which is killed when it runs past its end."""
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), time.monotonic()


def main(folder: Path) -> int:
    run = prepare_run(parse_settings("worker", "", WORDS), 2, "train")
    prepare_core(select_device("cpu"))
    from megatron.core import parallel_state  # noqa: F401  # once for all ranks: they are forked

    for kind in KINDS:
        port = free_port()
        begin = time.monotonic()
        processes = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                return be_rank(rank, kind, port, folder / f"{kind}.{rank}.log", run)
            processes.append(process)
        ended = [wait_for(process, begin + LIMIT_SECONDS) for process in processes]
        (folder / f"{kind}.json").write_text(json.dumps([(code, at - begin) for code, at in ended]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
