"""Answers of many engines on the simulated NPU or the CPU: `python generation_worker.py CASES.json`, or by torchrun.

CASES.json is a list of [name, *words]: the words of inference.py's command line, all of one device. CASES.answers holds
{name: {"first": ..., "tokens": ..., "sampled": ..., "beams": ..., "logprobs": ...}} and under "calls" which npu::
operators ran.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from inference_cases import PAIRS, PROMPTS, SHARING, STOPS  # noqa: E402

from modellink.config.settings import parse_settings  # noqa: E402
from modellink.inference.request import Request, SamplingSettings  # noqa: E402
from modellink.parallel.groups import start_groups, stop_groups  # noqa: E402
from modellink.runtime import prepare_run  # noqa: E402
from modellink.start import start  # noqa: E402

NEW = 8


def answers(engine: Any) -> dict[str, Any]:
    def ask(prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        return [answer.tokens for answer in engine.generate(
            [Request(prompt, SamplingSettings(max_new_tokens=NEW, **settings)) for prompt in prompts])]

    engine.prefill_chunk_size = 24  # several tokens at an offset
    first = SamplingSettings(max_new_tokens=1, logprobs=True)
    return {
        "first": [answer.logprobs for answer in engine.generate([Request(prompt, first) for prompt in PROMPTS])],
        "tokens": ask([*PROMPTS, *SHARING]),
        "sampled": ask(PROMPTS, greedy=False, temperature=1.5, top_k=50, top_p=0.9, seed=7),
        "beams": ask(PROMPTS, num_beams=3, length_penalty=-1.0, stop_ids=frozenset(STOPS)),
        "logprobs": [score.logprobs for score in engine.score(PAIRS)],
    }


def main(cases_path: str) -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(cases_path).read_text())
    simulation: Any = nullcontext()
    if any("npu" in words for words in cases):
        from simulator import simulated_npu

        simulation = simulated_npu()
    found: dict[str, Any] = {}
    device: Any = None
    with simulation as kernels:
        for name, *words in cases:
            run = prepare_run(parse_settings("generation", "", words), int(os.environ.get("WORLD_SIZE", 1)), "generate")
            if device is None:
                device = start(run)
            else:
                start_groups(device, run.dims, 10)
            from megatron.core import parallel_state

            from modellink.inference.load import load_engine

            found[name] = answers(load_engine(run, device))
            parallel_state.destroy_model_parallel()
        stop_groups()
    if os.environ.get("RANK", "0") == "0":
        found["calls"] = kernels.calls if kernels else {}
        Path(cases_path).with_suffix(".answers").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
