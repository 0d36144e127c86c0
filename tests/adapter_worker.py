"""One rank of the adapter proofs: logits of many command lines of inference.py.

torchrun ... adapter_worker.py FOLDER: FOLDER/logits.json holds the command lines and the prompts; the last rank writes
FOLDER/world{W}.pt, {case: [prompts, vocabulary]}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from modellink.config.settings import parse_settings
from modellink.parallel.groups import start_groups, stop_groups
from modellink.parallel.rank import Rank
from modellink.runtime import prepare_run
from modellink.start import start


def last_logits(engine: Any, prompts: list[list[int]]) -> torch.Tensor | None:
    """Logits behind the last token of each prompt; None on a rank that does not compute them."""
    from modellink.inference.cache import Piece

    found = []
    for prompt in prompts:
        replica = engine.replica
        hidden = replica.run(replica.reserve(1, 64), [Piece(0, 0, prompt)], [len(prompt) - 1])
        found.append(None if hidden is None else replica.logits(hidden))
    return None if found[0] is None else torch.cat(found)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    wanted = json.loads((folder / "logits.json").read_text())
    rank = Rank.from_environment()
    results: dict[str, torch.Tensor] = {}
    device = None
    for name, words in wanted["cases"].items():
        run = prepare_run(parse_settings("worker", "test", words), rank.world_size, "generate")
        if device is None:
            device = start(run)
        else:
            start_groups(device, run.dims, 10)
        from megatron.core import parallel_state

        from modellink.inference.load import load_engine

        logits = last_logits(load_engine(run, device), wanted["prompts"])
        if logits is not None:
            results[name] = logits
        parallel_state.destroy_model_parallel()
    if rank.rank == rank.world_size - 1:
        torch.save(results, folder / f"world{rank.world_size}.pt")
    stop_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
