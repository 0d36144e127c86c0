"""One rank of the generation tests: runs every case in the layouts of its world size and saves what it saw.

torchrun ... inference_worker.py FOLDER: FOLDER/cases.json holds the layouts and models; each rank writes
FOLDER/world{W}_rank{R}.pt: {(layout, model): {case: result}}.
"""

import dataclasses
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from group_worker import GroupsInUse, Operators
from inference_cases import BEAMS, HALVES, HEADER, NUM_NEW, PAIRS, PASSES, PROMPTS, SAMPLED, SHARING, STOPS

from modellink.config.errors import ConfigError
from modellink.config.settings import parse_settings
from modellink.inference.request import Request, SamplingSettings
from modellink.models.run import Run
from modellink.parallel.groups import start_groups, stop_groups
from modellink.parallel.rank import Rank
from modellink.runtime import prepare_run
from modellink.start import start

GREEDY = SamplingSettings(max_new_tokens=NUM_NEW)


def make_run(folder: Path, load: str, tokenizer: Path, layout: list[int], world: int, more: str = ""
             ) -> Run:
    line = (f"--load {folder / load} --tokenizer-name-or-path {tokenizer} --device cpu --sequence-parallel "
            f"--tensor-model-parallel-size {layout[0]} --pipeline-model-parallel-size {layout[1]} "
            f"--make-vocab-size-divisible-by 64 {more}")
    return prepare_run(parse_settings("worker", "test", line.split()), world, "generate")


def logits_of(engine: Any, passes: list[tuple[int, list[list[int]]]], num_rows: int) -> list[torch.Tensor | None]:
    """Logits of the last token after each pass (first row, tokens of each row)."""
    from modellink.inference.cache import Piece

    engine.replica.cache = None
    cache, found = engine.replica.reserve(num_rows, 64), list[Any]()
    for first, rows in passes:
        ends = [sum(map(len, rows[:count + 1])) - 1 for count in range(len(rows))]
        hidden = engine.replica.run(cache, [Piece(row, len(cache.tokens[row]), tokens)
                                      for row, tokens in enumerate(rows, first)], ends)
        found.append(None if hidden is None else engine.replica.logits(hidden))
    return found


def tokens_of(engine: Any, requests: list[Request]) -> list[list[int]]:
    return [answer.tokens for answer in engine.generate(requests)]


def raise_padding_rows(model: Any, tensor: int) -> None:
    """Weights of the head that make a padding row the best word of every position, if padding took part."""
    from megatron.core import parallel_state

    if not model.post_process:
        return
    weight = model.output_layer.weight
    start = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    with torch.no_grad():
        for row, value in ((model.real_vocab_size, 50.0), (model.real_vocab_size + 1, -50.0)):
            if start <= row < start + weight.shape[0]:
                weight[row - start] = value


class Quitter:
    """A watch that sends this process SIGINT when an answer has three tokens, as often as signals are left."""

    def __init__(self, left: list[Any]):
        self.left, self.seen = left, 0

    def add(self, token: int) -> bool:
        self.seen += 1
        if self.seen == 3 and self.left:
            self.left.pop()
            os.kill(os.getpid(), signal.SIGINT)
        return False


def recomputed(engine: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers without a cache: every token from a pass over the whole text."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        engine.replica.cache = None
        for row, tokens in zip(rows, tokens_of(engine, [Request(row, SamplingSettings(max_new_tokens=1))
                                                        for row in rows])):
            row += tokens
    return [row[len(prompt):] for row, prompt in zip(rows, prompts)]


def run_cases(engine: Any) -> dict[str, Any]:
    lengths = [NUM_NEW - index for index in range(len(PROMPTS))]  # rows end at different steps
    uneven = [Request(prompt, dataclasses.replace(GREEDY, max_new_tokens=length))
              for prompt, length in zip(PROMPTS, lengths)]
    drawing = SamplingSettings(max_new_tokens=NUM_NEW, greedy=False, temperature=1.5, top_k=50, top_p=0.9, seed=7)
    sampled = [Request(prompt, drawing) for prompt in PROMPTS]
    beams = [Request(prompt, SamplingSettings(max_new_tokens=NUM_NEW, stop_ids=frozenset(STOPS), num_beams=3,
                                              length_penalty=-1.0, logprobs=True)) for prompt in PROMPTS]
    signals = [signal.SIGINT] if engine.replica.is_first else []
    quitting = [Request(prompt, dataclasses.replace(GREEDY, max_new_tokens=40), lambda: Quitter(signals))
                for prompt in PROMPTS]
    out: dict[str, Any] = {
        "single": [tokens_of(engine, [Request(prompt, GREEDY)])[0] for prompt in PROMPTS],
        "batched": tokens_of(engine, [Request(prompt, GREEDY) for prompt in PROMPTS]),
        "uneven": tokens_of(engine, uneven),
        "sampled": tokens_of(engine, sampled),
        "sampled_alone": [tokens_of(engine, [request])[0] for request in sampled],
        "sharing": tokens_of(engine, [Request(prompt, GREEDY) for prompt in SHARING]),
        "beams": engine.generate(beams),
        "scores": engine.score(PAIRS),
        "logprobs": engine.generate([Request(prompt, dataclasses.replace(GREEDY, logprobs=True, repetition_penalty=1.5))
                                     for prompt in PROMPTS]),
        "interrupted": engine.generate(quitting),
        "afterwards": tokens_of(engine, [Request(prompt, GREEDY) for prompt in PROMPTS]),
        "logits": logits_of(engine, PASSES, 3),
    }
    engine.replica.prefix_reuse = False
    out["without_reuse"] = tokens_of(engine, [Request(prompt, GREEDY) for prompt in SHARING])
    out["scores_without_reuse"] = engine.score(PAIRS)
    out["without_cache"] = recomputed(engine, PROMPTS, 4)
    engine.replica.prefix_reuse = True
    engine.max_batch_size, engine.prefill_chunk_size = 2, 3
    out["queued_and_chunked"] = tokens_of(engine, uneven)
    out["scores_chunked"] = engine.score(PAIRS)
    stopping = dataclasses.replace(GREEDY, stop_ids=frozenset({out["single"][0][3]}))
    out["stopped"] = tokens_of(engine, [Request(PROMPTS[0], stopping)])[0]
    return out


def run_raised(engine: Any) -> dict[str, Any]:
    """Cases of a model whose padding rows would win."""
    hot = dataclasses.replace(GREEDY, greedy=False, temperature=100.0)
    return {"raised_padding": tokens_of(engine, [Request(PROMPTS[0], GREEDY)])[0],
            "raised_padding_sampled": tokens_of(engine, [Request(PROMPTS[0], hot)])[0]}


def run_alone(make: Any) -> dict[str, Any]:
    """Cases of one process. `make`: an engine with some options."""
    engine = make()
    stops = frozenset(STOPS)
    out: dict[str, Any] = {
        "beams": [engine.generate([Request(prompt, SamplingSettings(max_new_tokens=NUM_NEW, stop_ids=stops, **case))
                                   for prompt in PROMPTS]) for case in BEAMS],
        "sampled": [tokens_of(engine, [Request(PROMPTS[0], SamplingSettings(
            max_new_tokens=NUM_NEW, greedy=False, stop_ids=stops, seed=seed, **case))])[0]
            for case in SAMPLED for seed in (1, 2)],
    }
    for name, reuse in (("reused", True), ("computed", False)):
        engine = make(prefix_reuse=reuse)
        samples = [Request(HEADER, SamplingSettings(max_new_tokens=3, greedy=False, seed=seed)) for seed in range(5)]
        out[f"samples_{name}"] = tokens_of(engine, samples), engine.replica.num_computed
        engine = make(prefix_reuse=reuse)
        sharing = tokens_of(engine, [Request(prompt, GREEDY) for prompt in SHARING])
        out[f"sharing_{name}"] = sharing, engine.replica.num_computed
        engine = make(prefix_reuse=reuse)
        first = tokens_of(engine, [Request(HEADER, GREEDY)])[0]
        before = engine.replica.num_computed
        engine.generate([Request([*HEADER, *first, 5, 6], SamplingSettings(max_new_tokens=1))])  # the next turn
        out[f"turn_{name}"] = engine.replica.num_computed - before
        engine = make(prefix_reuse=reuse)
        engine.prefill_chunk_size = 48
        engine.score(PAIRS)
        out[f"scored_{name}"] = engine.replica.num_computed
    token = 2 * 4 * 6 * 16  # values: key and value of 4 layers, 6 heads of 16
    longest = len(PROMPTS[3]) + NUM_NEW - 1
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    limited = make(max_kv_cache_bytes=2 * longest * token * 4)
    out["limited"] = tokens_of(limited, requests), limited.replica.cache.num_rows, limited.replica.cache.num_bytes
    for name, ask in (("generate", lambda engine: engine.generate(requests)),
                      ("stream", lambda engine: engine.stream(requests)),
                      ("beams", lambda engine: engine.generate([Request(PROMPTS[3], dataclasses.replace(
                          GREEDY, num_beams=2))])),
                      ("score", lambda engine: engine.score(PAIRS))):
        try:
            ask(make(max_kv_cache_bytes=longest * token * 4 - 1))
        except ConfigError as error:
            out[f"too_long_{name}"] = str(error)
    small = make(kv_cache_dtype="int8")
    out["int8_logits"], out["logits"] = logits_of(small, PASSES, 3), logits_of(make(), PASSES, 3)
    small.replica.cache = None
    out["int8"] = tokens_of(small, requests), small.replica.cache.num_bytes
    full = make()
    out["full"] = tokens_of(full, requests), full.replica.cache.num_bytes
    return out


def groups_of(run: Run, make: Any) -> tuple[Operators, Operators, list[str]]:
    """What ran on the groups in starting, what in loading and generating, and the groups that the run counts."""
    from megatron.core import parallel_state

    with GroupsInUse() as groups:
        start(run)  # again: the groups are there
        started = groups.take()
        tokens_of(make(), [Request(prompt, GREEDY) for prompt in PROMPTS])
        return started, groups.take(), run.groups(parallel_state.get_pipeline_model_parallel_rank())


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    rank = Rank.from_environment()
    results: dict[tuple[str, str], dict[str, Any]] = {}
    device = None
    for layout in cases["layouts"][str(rank.world_size)]:
        for name, load in cases["models"].items():
            run = make_run(folder, load, folder / "tokenizer", layout, rank.world_size)
            if device is None:
                device = start(run)
            else:
                start_groups(device, run.dims, 10)
            from megatron.core import parallel_state

            from modellink.inference.engine import Engine
            from modellink.inference.load import load_chunks, load_engine

            key = f"TP{layout[0]} PP{layout[1]}", name
            if rank.world_size == 1 and name == "untied":
                results["alone", name] = run_alone(functools.partial(load_engine, run, device))
            results[key] = run_cases(load_engine(run, device))
            results[key]["groups"] = groups_of(run, functools.partial(load_engine, run, device))
            if name == "untied":
                chunks, raised = load_chunks(run, device)
                raise_padding_rows(chunks[0], run.dims.tensor)
                results[key] |= run_raised(Engine(chunks, raised, device.current()))
            if rank.world_size == 1:
                settings = dataclasses.replace(run.settings, checkpoint=dataclasses.replace(
                    run.settings.checkpoint, load=str(folder / name)))  # the HF folder
                engine = load_engine(dataclasses.replace(run, settings=settings), device)
                results[key]["from_hf"] = tokens_of(engine, [Request(prompt, GREEDY) for prompt in PROMPTS])
                flagged = load_engine(make_run(folder, load, folder / "tokenizer", layout, 1, "--max-kv-cache-gb 0.5 "
                                               "--kv-cache-dtype int8 --no-prefix-reuse --max-batch-size 3"), device)
                flagged.generate([Request(prompt, GREEDY) for prompt in PROMPTS])
                results[key]["flags"] = (flagged.replica.max_kv_cache_bytes, flagged.replica.prefix_reuse,
                                         flagged.max_batch_size, flagged.replica.cache.is_int8)
            if name == "untied":
                for dtype in HALVES:
                    half = load_engine(make_run(folder, "bf16", folder / "tokenizer", layout, rank.world_size,
                                                f"--{dtype}"), device)
                    results[key][dtype] = {
                        "dtype": next(half.model.parameters()).dtype, "logits": logits_of(half, PASSES, 3),
                        "tokens": tokens_of(half, [Request(prompt, GREEDY) for prompt in PROMPTS])}
            if key == ("TP1 PP1", "tied") and rank.world_size == 1:
                unasked = load_engine(make_run(folder, "bf16", folder / "tokenizer", layout, 1), device)
                results[key]["own_dtype"] = next(unasked.model.parameters()).dtype
            parallel_state.destroy_model_parallel()
    torch.save(results, folder / f"world{rank.world_size}_rank{rank.rank}.pt")
    stop_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
