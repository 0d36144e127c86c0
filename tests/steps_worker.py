"""Generation with recorded steps on the CPU: `python steps_worker.py FOLDER` writes FOLDER/steps.json.

The CUDA device's own recorder runs, over the stand-in for torch.cuda's graphs of `cuda_graphs.py`; once also over that
for flash attention of `flash_on_cpu.py`.
"""

import dataclasses
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from cuda_graphs import LAUNCHES, POOLS, RECORDED, graphs_on_cpu
from flash_on_cpu import flash_on_cpu
from inference_cases import MODELS, PROMPTS, SHARING

from modellink.config.settings import parse_settings
from modellink.device.cuda import GraphCapture
from modellink.inference.request import Request, SamplingSettings
from modellink.ops.forms import use_forms
from modellink.ops.limits import FLOATS, HALF
from modellink.ops.table import choose
from modellink.parallel.groups import stop_groups
from modellink.runtime import prepare_run
from modellink.start import start

LONG = SamplingSettings(max_new_tokens=60)


def answers(engine: Any) -> dict[str, Any]:
    """Rows of other lengths that end at other steps; more requests than rows; what was answered goes on; beams."""
    uneven = [Request(prompt, dataclasses.replace(LONG, max_new_tokens=60 - 11 * index, logprobs=True))
              for index, prompt in enumerate(PROMPTS)]
    first = engine.generate(uneven)
    engine.max_batch_size = 3
    queued = engine.generate([Request(prompt, LONG) for prompt in (*PROMPTS, *SHARING)])
    again = engine.generate([Request([*prompt, *answer.tokens, 5], dataclasses.replace(LONG, max_new_tokens=40))
                             for prompt, answer in zip(PROMPTS, first)])
    beams = engine.generate([Request(PROMPTS[0], dataclasses.replace(LONG, max_new_tokens=20, num_beams=3))])
    engine.score([(PROMPTS[0], PROMPTS[1])])
    old = weakref.ref(engine.replica.cache)
    engine.replica.prefix_reuse = False
    engine.replica.reserve(1, 200)
    assert old() is None  # a longer cache took its place, and no recording holds the old one
    return {"tokens": [answer.tokens for part in (first, queued, again, beams) for answer in part],
            "logprobs": [value for answer in first for value in answer.logprobs]}


def results_stay(replica: Any) -> bool:
    """Whether what a step gave is the same after later steps, of one shape and of another."""
    from modellink.inference.cache import Piece

    cache = replica.reserve(2, 40)
    cache.tokens[:2] = [[], []]
    given = [replica.run(cache, [Piece(row, step, [step]) for row in range(2)], [0, 1]) for step in range(20)]
    cache.tokens[:2] = [[], []]
    again = [replica.run(cache, [Piece(row, step, [step]) for row in range(2)], [0, 1]).clone() for step in range(20)]
    return all(torch.allclose(one, other, atol=1e-2) for one, other in zip(given, again)) and not torch.allclose(
        given[-2], given[-1], atol=0.1)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    device: Any = None
    for name, attention in [*((name, "plain") for name in MODELS), ("untied", "flash")]:
        line = f"--load {folder / name} --tokenizer-name-or-path {folder / 'tokenizer'} --device cpu"
        run = prepare_run(parse_settings("worker", "test", line.split()), 1, "generate")
        device = device or start(run)
        from modellink.inference import steps
        from modellink.inference.engine import Engine
        from modellink.inference.load import load_chunks
        from modellink.models.forms import situation_of

        def engine(run: Any = run, device: Any = device, **options: Any) -> Any:
            """In the forms that a GPU would get."""
            chunks, run = load_chunks(run, device)
            use_forms(choose(dataclasses.replace(situation_of(run, device), device="cuda")), "cpu")
            return Engine(chunks, run, device.current(), **options)

        steps.READ_TOGETHER, steps.WORTH_RECORDING = 16, 4  # so that rows grow over several shapes
        for kind in ("auto", "int8") if name == "tied" else ("auto",):
            expected = answers(engine(kv_cache_dtype=kind))
            takes = FLOATS if attention == "flash" else HALF
            with flash_on_cpu(takes) as flash, graphs_on_cpu():
                recording = engine(kv_cache_dtype=kind, recorder=GraphCapture)
                got = answers(recording)
                pools, recorded, launches = len(POOLS), list(RECORDED), len(LAUNCHES)
                is_kept = results_stay(recording.replica)
            found[f"{name} {kind} {attention}"] = {"got": got, "expected": expected, "recorded": recorded,
                                       "launches": launches, "pools": pools, "is_kept": is_kept, "flash": len(flash)}
    (folder / "steps.json").write_text(json.dumps(found))
    stop_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
