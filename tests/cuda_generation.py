"""Answers of the engine on the device of the `cuda` tests: `python cuda_generation.py FOLDER MODEL`.

Writes FOLDER/MODEL.json: greedy answers to PROMPTS, the same with prompts in chunks, and their log-probabilities; and
longer ones in fp32 and bf16, step by step and recorded.
"""

import json
import sys
from pathlib import Path

import torch
from cuda_environment import DEVICE
from inference_cases import NUM_NEW, PROMPTS

from modellink.config.settings import parse_settings
from modellink.inference.request import Request, SamplingSettings
from modellink.models.run import Run
from modellink.parallel.groups import stop_groups
from modellink.runtime import prepare_run
from modellink.start import start

LONG = 40
LONGER = ("--fp32", "--fp32 --cuda-graphs", "--bf16", "--bf16 --cuda-graphs")


def main(folder: Path, name: str) -> None:
    def prepared(flags: str = "") -> Run:
        line = f"--load {folder / name} --tokenizer-name-or-path {folder / 'tokenizer'} --device {DEVICE} {flags}"
        return prepare_run(parse_settings("worker", "test", line.split()), 1, "generate")

    run = prepared()
    device = start(run)
    from modellink.inference import steps
    from modellink.inference.load import load_engine

    engine = load_engine(run, device)
    requests = [Request(prompt, SamplingSettings(max_new_tokens=NUM_NEW, logprobs=True)) for prompt in PROMPTS]
    answers = engine.generate(requests)
    engine.prefill_chunk_size, engine.replica.cache = 3, None
    chunked = engine.generate(requests)
    steps.WORTH_RECORDING = 2
    settings = SamplingSettings(max_new_tokens=LONG, logprobs=True)
    long = {flags: [[answer.tokens, answer.logprobs] for answer in load_engine(prepared(flags), device).generate(
        [Request(prompt, settings) for prompt in PROMPTS])] for flags in LONGER}
    (folder / f"{name}.json").write_text(json.dumps({
        "long": long, "plans": torch.backends.cuda.cudnn_sdp_enabled(),
        "tokens": [answer.tokens for answer in answers], "logprobs": [answer.logprobs for answer in answers],
        "chunked": [answer.tokens for answer in chunked], "device": engine.device.type}))
    stop_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
