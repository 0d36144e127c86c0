"""Runs many training runs inside one set of worker processes: `python ladder.py CASES.json`, under the launcher.

CASES.json is a list of command lines for pretrain_gpt.py; each writes its own metrics and checkpoints. With the word
RESAVE in front no step is taken: what --load holds is saved again. Workers start once a world size, because a process
costs seconds of imports.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

RESAVE = "resave"
REPO = Path(__file__).resolve().parent.parent


def run_cases(cases: list[list[str]], world_size: int, folder: Path, worker: Path = Path(__file__)) -> None:
    """Start `world_size` workers and run every case in them; a failing case fails the call with its output.

    Args:
        worker: the script that they run with the path of the cases.
    """
    path = folder / f"cases{world_size}-{time.time_ns()}.json"
    path.write_text(json.dumps(cases))
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
               str(worker), str(path)]
    if world_size == 1:
        command = [sys.executable, str(worker), str(path)]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def read_metrics(path: Path) -> list[dict]:
    """The training records of a metrics file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def run_all(cases_path: str, around: Callable[[list[str]], AbstractContextManager] | None = None) -> None:
    """Every case in turn, with fresh process groups of its own layout, inside what `around` gives for its words."""
    import torch

    torch.set_num_threads(1)
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for case in json.loads(Path(cases_path).read_text()):
        words = case[1:] if case[0] == RESAVE else case
        with around(words) if around is not None else nullcontext():
            run = prepare_run(parse_settings("ladder", "", words), world_size, "train")
            device = start(run)
            from megatron.core import parallel_state

            from modellink.training.loop import build_state, train
            from modellink.training.state import load, save

            if case[0] == RESAVE:
                state = build_state(run, device)
                load(state, Path(str(run.settings.checkpoint.load)))
                save(state, Path(str(run.settings.checkpoint.save)))
            else:
                train(run, device)
            parallel_state.destroy_model_parallel()


def main(cases_path: str, around: Callable[[list[str]], AbstractContextManager] | None = None) -> None:
    """Worker: all cases, then the end of torch's default group."""
    run_all(cases_path, around)
    import torch

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
