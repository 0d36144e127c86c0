"""Generation in one process against transformers' generate: prefill and decode tokens/s, and bytes of the KV cache.

    python benchmarks/decode.py [--device cpu|cuda|npu] [--shape small|0.5b|1.8b|4b|7b] [--layers N] [--batch 1 8 32]
                                [--precision fp32|bf16] [--rounds N] [--no-int8-cache] [--flags="--cuda-graphs"]
                                [--output FILE]

Both sides load the same random weights, made once in the precision asked for, each in a process of its own, in turn;
the best of the rounds counts, and the ratio is that of the same run. Our side runs once more with an int8 cache, unless
`--no-int8-cache` is given. Two jobs for each batch size:

- equal: prompts of one length, answers of one length. Prefill is the time to the first token of every row; decode is
  the rest.
- unequal: twice as many requests as the batch, prompts of 16 to 240 tokens, answers of 8 to 120, all lengths known in
  advance to both sides. transformers takes them in the order they come, in padded batches, each of which runs until its
  longest answer; here a row that ends makes room for the next request. Tokens/s are those of answers that were asked
  for, over the whole job.

The peer is transformers' Qwen2 with SDPA and its dynamic cache, greedy; both sides decode greedily, and ours computes
every prompt anew (the prompts have nothing in common). Both must give as many tokens as were asked for, and ours must
be those that transformers finds best, in all of the last answers of every job: tokens that rounding alone separates
from the best one count as that, since answers differ behind them.

A second table says how well our side uses the device: TFLOP/s (attention counted causally) and MFU of prefill, and the
bytes of weights and cache that a decode step must read, against a large copy measured in the same run.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flags import PRECISIONS, add_output, add_place, check_further_flags, check_place, number, open_output
from shapes import GENERATION, add_shape, shape_of
from sides import largest, peak_bytes, run_side

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

UNEQUAL_PROMPT, UNEQUAL_ANSWER = (16, 240), (8, 120)  # fewest and most tokens
JUDGED = 4  # answers of every job
ANSWERS = "answers.json"
# how far below its best logit transformers may have a token of ours, of the distance between the best and the mean
# logit; rounding makes 1e-6 of it in fp32 and 1e-2 in bf16, a wrong token about 1
GAP_LIMITS = {"fp32": 1e-3, "bf16": 0.1}
Job = list[tuple[list[int], int]]  # (prompt, tokens of its answer)
Answers = list[list[int]]


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """The config.json of what both sides load."""
    longest = max(options.prompt_length + options.new_tokens, UNEQUAL_PROMPT[1] + UNEQUAL_ANSWER[1])
    return shape_of(options.shape, GENERATION, layers=options.layers, positions=longest)


def make_jobs(options: argparse.Namespace, batch: int) -> dict[str, Job]:
    """The same requests for both sides."""
    rng, words = random.Random(batch), shape(options)["vocab_size"]

    def prompt(length: int) -> list[int]:
        return [rng.randrange(words) for _ in range(length)]

    return {"equal": [(prompt(options.prompt_length), options.new_tokens) for _ in range(batch)],
            "unequal": [(prompt(rng.randint(*UNEQUAL_PROMPT)), rng.randint(*UNEQUAL_ANSWER))
                        for _ in range(2 * batch)]}


def measure_side(options: argparse.Namespace, answer: Callable[[Job, int], Answers]) -> tuple[dict[str, Any],
                                                                                              dict[str, Answers]]:
    """Measure one side.

    Args:
        answer: does a job with at most so many requests at a time.

    Returns:
        Tokens/s for every batch size, and the last answers of every job.
    """
    found: dict[str, Any] = {}
    answers: dict[str, Answers] = {}
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for batch in options.batch:
        jobs = make_jobs(options, batch)
        equal, unequal = jobs["equal"], jobs["unequal"]
        answer([(prompt, 2) for prompt, _ in equal], batch)  # warm-up
        seconds = []
        for name, job in (("first", [(prompt, 1) for prompt, _ in equal]), ("equal", equal), ("unequal", unequal)):
            times = []
            for _ in range(options.repeats):
                start = clock()
                given = answer(job, batch)
                times.append(clock() - start)
            seconds.append(min(times))
            if [len(tokens) for tokens in given] != [count for _, count in job]:
                raise RuntimeError(f"{options.side}: the answers of the job {name!r} have not the lengths asked for")
            answers[f"{batch} {name}"] = given[-JUDGED:]
        prefill, whole, mixed = seconds
        found[str(batch)] = {
            "prefill": batch * options.prompt_length / prefill,
            "decode": batch * (options.new_tokens - 1) / (whole - prefill),
            "unequal": sum(count for _, count in unequal) / mixed,
        }
    return found, answers


def largest_gap(options: argparse.Namespace, model: Any, answers: dict[str, Answers]) -> float:
    """How far below its best logit transformers has any token of `answers`, of the distance of that to the mean."""
    import torch

    gaps = []
    for name, given in answers.items():
        batch, kind = name.split()
        job = make_jobs(options, int(batch))["unequal" if kind == "unequal" else "equal"][-JUDGED:]
        for (prompt, _), tokens in zip(job, given, strict=True):
            ids = torch.tensor([prompt + tokens[:-1]], device=options.device)
            with torch.inference_mode():
                logits = model(ids, logits_to_keep=len(tokens)).logits[0].float()
            best, own = logits.amax(-1), logits.gather(-1, torch.tensor(tokens, device=options.device)[:, None])[:, 0]
            gaps += ((best - own) / (best - logits.mean(-1))).tolist()
    return largest(gaps)


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers, left-padded batches."""
    import torch
    from transformers import Qwen2ForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model: Any = Qwen2ForCausalLM.from_pretrained(options.folder, dtype=dtype, attn_implementation="sdpa")
    if options.device == "npu":
        import torch_npu  # noqa: F401  # makes the device known
    model = model.to(options.device).eval()

    def answer(job: Job, batch: int) -> Answers:
        answers = []
        for start in range(0, len(job), batch):
            part = job[start:start + batch]
            width = max(len(prompt) for prompt, _ in part)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in part], device=options.device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part],
                                device=options.device)
            count = max(count for _, count in part)
            done = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)[:, width:].tolist()
            answers += [tokens[:own] for tokens, (_, own) in zip(done, part)]
        return answers

    found, _ = measure_side(options, answer)
    ours = json.loads((Path(options.folder) / ANSWERS).read_text())
    return found | {"largest_gap": largest_gap(options, model, ours)}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """modellink's engine."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    run = prepare_run(parse_settings("bench", "", [
        "--load", options.folder, "--tokenizer-name-or-path", options.folder, "--device", options.device,
        "--kv-cache-dtype", options.kv_cache_dtype, f"--{options.precision}", *shlex.split(options.flags)]),
        1, "generate")
    device = start(run)
    from modellink.inference.load import load_engine
    from modellink.inference.request import Request, SamplingSettings

    engine = load_engine(run, device, prefix_reuse=False)

    def answer(job: Job, batch: int) -> Answers:
        engine.max_batch_size = batch
        return [given.tokens for given in engine.generate(
            [Request(prompt, SamplingSettings(max_new_tokens=count)) for prompt, count in job])]

    found, answers = measure_side(options, answer)
    if options.kv_cache_dtype == "auto":  # those of an int8 cache may differ
        (Path(options.folder) / ANSWERS).write_text(json.dumps(answers))
    assert engine.replica.cache is not None
    found["cache"] = {"bytes": engine.replica.cache.num_bytes, "bytes_per_token": engine.replica.token_bytes}
    return found | {"device": measure_device(options, run.model, device)}


def measure_device(options: argparse.Namespace, model: Any, device: Any) -> dict[str, Any]:
    """Peak memory so far, the device's ceilings, and what `model` (a `ModelConfig`) asks of it."""
    from operations import ceilings

    from modellink.device.specs import find_spec
    from modellink.ops.forms import DTYPES
    from modellink.training.metrics import flops_per_token

    peak = peak_bytes(device)  # before the ceilings, which take memory of their own
    spec = find_spec(device.product_name())
    flops, copied = ceilings(options, device, DTYPES[options.precision])
    return {
        "name": device.product_name(), "flops": flops, "bytes_per_second": copied,
        "datasheet_flops": spec.bf16_flops if spec and options.precision == "bf16" else None,
        "peak_bytes": peak,
        # forward alone: a third of training; the head works on the last token of a prompt only
        "flops_per_token": flops_per_token(model, 0) / 3 - 2 * model.vocab_size * model.hidden_size * (
            1 - 1 / options.prompt_length),
        "flops_per_context_token": (flops_per_token(model, 2) - flops_per_token(model, 0)) / 3,
        "weight_bytes": flops_per_token(model, 0) / 6 * (4 if options.precision == "fp32" else 2)}


def use_of(options: argparse.Namespace, batch: int, rates: dict[str, float], device: dict[str, Any],
           token_bytes: int) -> dict[str, float | None]:
    """How much of the device our side uses; see the table's heading."""
    prefill = rates["prefill"] * (device["flops_per_token"]
                                  + device["flops_per_context_token"] * options.prompt_length / 2)
    context = options.prompt_length + options.new_tokens / 2
    read = rates["decode"] / batch * (device["weight_bytes"] + batch * context * token_bytes)
    peak = device["datasheet_flops"]
    return {"prefill_flops": prefill, "prefill_mfu": prefill / peak if peak else None,
            "prefill_share": prefill / device["flops"], "decode_bytes_per_second": read,
            "decode_share": read / device["bytes_per_second"]}


def make_model(folder: Path, config: dict[str, Any], precision: str) -> None:
    """Random weights, drawn and saved in `precision`, and a tokenizer that nobody uses."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**config | {"bos_token_id": 0, "eos_token_id": 0}),
                                               dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<unk>").save_pretrained(folder)


def measure(side: str, options: argparse.Namespace, folder: Path, kv_cache_dtype: str = "auto") -> dict[str, Any]:
    """Run one side in its own process and return its numbers."""
    command = [sys.executable, str(Path(__file__)), "--side", side, "--folder", str(folder), "--precision",
               options.precision, "--device", options.device, "--repeats", str(options.repeats), "--prompt-length",
               str(options.prompt_length), "--new-tokens", str(options.new_tokens), "--kv-cache-dtype", kv_cache_dtype,
               "--clock", options.clock, "--shape", options.shape,
               *(["--layers", str(options.layers)] if options.layers else []), f"--flags={options.flags}",
               "--batch", *map(str, options.batch)]
    return run_side(command, {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | os.environ)


def best_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The highest rate of every figure."""
    return {batch: {name: max(turn[batch][name] for turn in turns) for name in turns[0][batch]}
            for batch in turns[0] if batch.isdigit()}


def make_parser() -> Parser:
    parser = Parser(prog="decode.py", description="Generation against transformers, in one run.")
    add_place(parser)
    add_shape(parser, "6 layers of the 0.5B's width, vocabulary 32000")
    parser.add_argument("--batch", type=number, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and arithmetic")
    parser.add_argument("--prompt-length", type=number, default=128, help="tokens of a prompt of the equal job")
    parser.add_argument("--new-tokens", type=number, default=64, help="tokens of an answer of the equal job")
    parser.add_argument("--repeats", type=number, default=2, help="times a job runs in a process; the fastest counts")
    parser.add_argument("--rounds", type=number, default=2, help="turns of each side; the best counts")
    parser.add_argument("--no-int8-cache", action="store_true", help="leave out the run with an int8 KV cache")
    parser.add_argument("--flags", default="", help="further flags of inference.py for our side, in one string")
    add_output(parser, "decode.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kv-cache-dtype", default="auto", help=argparse.SUPPRESS)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises:
        ConfigError: flags that cannot be met here.
    """
    if options.new_tokens < 2:
        raise ConfigError(f"--new-tokens {options.new_tokens}: the first token is the prompt's; give 2 or more.")
    check_further_flags(options.flags)
    check_place(options)
    open_output(options.output)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.side:
        print(json.dumps(run_ours(options) if options.side == "ours" else run_peer(options)), flush=True)
        return 0
    check(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder, shape(options), options.precision)
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            for side in turns:
                turns[side].append(measure(side, options, folder))
        small = None if options.no_int8_cache else measure("ours", options, folder, "int8")
    gap = largest([turn["largest_gap"] for turn in turns["peer"]])
    if not gap <= GAP_LIMITS[options.precision]:
        raise SystemExit(f"a token of ours lies {gap:.1e} of the way from transformers' best logit to the mean, which "
                         f"rounding in {options.precision} does not explain: the two sides do not compute the same")
    ours, peer, int8 = best_of(turns["ours"]), best_of(turns["peer"]), best_of([small]) if small else None
    results: dict[str, Any] = {"shape": shape(options), "precision": options.precision, "flags": options.flags,
                               "clock": options.clock, "ours": ours, "transformers": peer, "ours_int8_cache": int8,
                               "largest_gap": gap}
    results["ratio"] = {batch: {name: rate / peer[batch][name] for name, rate in rates.items()}
                        for batch, rates in ours.items()}
    full = turns["ours"][0]["cache"]
    results["cache"] = {"full": full}
    said = f"KV cache: {full['bytes_per_token']} bytes a token"
    if small:
        results["cache"] |= {"int8": small["cache"], "int8_to_full": small["cache"]["bytes"] / full["bytes"]}
        said += f", int8 {small['cache']['bytes_per_token']}: {results['cache']['int8_to_full']:.3f}x"
    print(f"{options.precision}, tokens a second ({options.clock})")
    print(f"{'':18} {'ours':>9} {'transformers':>13} {'ratio':>6}" + (f"   {'int8 cache':>10}" if int8 else ""))
    for batch, rates in ours.items():
        for name, rate in rates.items():
            print(f"batch {batch:>3} {name:8} {rate:9.1f} {peer[batch][name]:13.1f} "
                  f"{results['ratio'][batch][name]:5.2f}x" + (f"   {int8[batch][name]:10.1f}" if int8 else ""))
    print(said)
    device = turns["ours"][0]["device"]
    results["device"], results["use"] = device, {
        batch: use_of(options, int(batch), rates, device, full["bytes_per_token"])
        for batch, rates in ours.items()}
    print(f"{device['name']}: {device['flops'] / 1e12:.3f} TFLOP/s and {device['bytes_per_second'] / 1e9:.1f} GB/s "
          f"measured; peak memory {device['peak_bytes'] / 2**30:.2f} GiB")
    print(f"{'':10} {'prefill TFLOP/s':>16} {'MFU':>7} {'of measured':>12} {'decode GB/s':>12} {'of measured':>12}")
    for batch, use in results["use"].items():
        mfu = "n/a" if use["prefill_mfu"] is None else f"{100 * use['prefill_mfu']:.1f} %"
        print(f"batch {batch:>3}  {use['prefill_flops'] / 1e12:16.3f} {mfu:>7} {100 * use['prefill_share']:10.1f} % "
              f"{use['decode_bytes_per_second'] / 1e9:12.1f} {100 * use['decode_share']:10.1f} %")
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
