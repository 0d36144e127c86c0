"""LoRA step in one process against PEFT on transformers: tokens/s and peak memory.

    python benchmarks/lora_step.py [--precision fp32|bf16] [--output FILE]

Both sides train rank 16 on all seven projections of the same weights, on the same samples; each runs in a process of
its own, in turn, and the turn with the least CPU time counts. The loss of the first step, in which adapters change
nothing yet, must be equal up to rounding. In bf16 the peer's base is bf16 and
its adapters fp32, which is PEFT's default; here adapters are bf16 with fp32 main weights.

Where other jobs share the cores, wall time says nothing (it varied tenfold between turns): compare the CPU seconds of a
step, with OMP_NUM_THREADS=1, because waiting threads spin.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import PRECISIONS, add_output, number, open_output
from shapes import TRAINING
from sides import peak_memory, require_same_losses, run_side

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

WARMUP = 2  # steps
SEED = 1234
RANK, ALPHA = 16, 32


def now() -> Any:
    """(wall, CPU of this process) seconds."""
    import numpy as np

    return np.array([time.perf_counter(), time.process_time()])


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """PEFT and transformers: forward, backward, clip, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from weights import DrawnWeights

    from modellink.config.model import ModelConfig
    from modellink.data.mock import MockDataset

    base: Any = Qwen2ForCausalLM(Qwen2Config(**TRAINING, use_cache=False))
    DrawnWeights(ModelConfig.from_hf(TRAINING, "the benchmark"), torch.device("cpu")).fill(base)
    base = base.to(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                            task_type="CAUSAL_LM")).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    data = MockDataset(TRAINING["vocab_size"], options.seq_length, options.steps * options.batch, SEED)
    samples = iter(range(len(data)))
    times, losses = [], []
    for _ in range(options.steps):
        start = now()
        total = torch.zeros(())
        for _ in range(options.batch // options.micro_batch):
            rows = [data[next(samples)] for _ in range(options.micro_batch)]
            tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
            loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss * len(rows) / options.batch
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        times.append(now() - start)
    return summary(options, times, losses, sum(parameter.numel() for parameter in parameters))


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """modellink: the training loop's own step."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TRAINING))
        run = prepare_run(parse_settings("bench", "", [
            "--model", folder, "--mock-data", "--seq-length", str(options.seq_length), "--seed", str(SEED),
            "--train-iters", str(options.steps), "--lr", "1e-4", "--lr-decay-style", "constant",
            "--micro-batch-size", str(options.micro_batch), "--global-batch-size", str(options.batch),
            f"--{options.precision}", "--eval-iters", "0", "--split", "100,0,0", "--device", "cpu",
            "--lora-target-modules", "all-linear", "--lora-r", str(RANK), "--lora-alpha", str(ALPHA)]), 1, "train")
    device = start(run)
    from weights import DrawnWeights

    from modellink.training.adapters import start_adapters
    from modellink.training.loop import Trainer, build_state, load_data
    from modellink.training.state import load_weights

    state = build_state(run, device)
    load_weights(state, DrawnWeights(run.model, device.current()))
    start_adapters(state)
    trainer = Trainer(state)
    reader = trainer.reader(load_data(run)[0])
    times, losses = [], []
    for _ in range(options.steps):
        begin = now()
        losses.append(trainer.step(reader, [0, 0])[0].loss)
        times.append(now() - begin)
    trained = sum(parameter.numel() for parameter in state.chunks[0].module.parameters() if parameter.requires_grad)
    return summary(options, times, losses, trained)


def summary(options: argparse.Namespace, times: list[Any], losses: list[float], trained: int) -> dict[str, Any]:
    median, cpu = (statistics.median(float(pair[index]) for pair in times[WARMUP:]) for index in (0, 1))
    return {"tokens_per_second": options.batch * options.seq_length / median, "seconds": median, "cpu_seconds": cpu,
            "losses": losses, "trained": trained, "peak_bytes": peak_memory()}


def measure(side: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in its own process and return its numbers."""
    command = [sys.executable, str(Path(__file__)), "--side", side, "--precision", precision]
    for name in ("steps", "batch", "micro_batch", "seq_length"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return run_side(command)


def make_parser() -> Parser:
    parser = Parser(prog="lora_step.py", description="LoRA step against PEFT and transformers, in one run.")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision (default: both)")
    parser.add_argument("--steps", type=number, default=8, help=f"steps a side, the first {WARMUP} are warm-up")
    parser.add_argument("--batch", type=number, default=4, help="samples a step")
    parser.add_argument("--micro-batch", type=number, default=2, help="samples of one forward pass")
    parser.add_argument("--seq-length", type=number, default=512, help="tokens a sample")
    parser.add_argument("--rounds", type=number, default=2, help="turns of each side; the least CPU time counts")
    add_output(parser, "lora_step.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.side:
        print(json.dumps(run_ours(options) if options.side == "ours" else run_peer(options)), flush=True)
        return 0
    if options.steps <= WARMUP:
        raise ConfigError(f"--steps {options.steps}: the first {WARMUP} are warm-up; give more.")
    if options.batch % options.micro_batch:
        raise ConfigError(f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}; "
                          "change one of them.")
    open_output(options.output)
    results: dict[str, Any] = {}
    for precision in [options.precision] if options.precision else PRECISIONS:
        turns: dict[str, list[dict]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            for side, found in turns.items():
                found.append(measure(side, precision, options))
        best = {side: min(found, key=lambda record: record["cpu_seconds"]) for side, found in turns.items()}
        assert best["ours"]["trained"] == best["peer"]["trained"]
        # A is random on either side, and B is 0 until the first update
        require_same_losses(best["ours"]["losses"][:1], best["peer"]["losses"][:1], precision)
        results[precision] = best
        for side, record in best.items():
            print(f"{precision} {side:5} {record['tokens_per_second']:8.0f} tokens/s  "
                  f"{record['cpu_seconds']:.2f} CPU s a step  "
                  f"peak {record['peak_bytes'] / 2**30:.2f} GiB  {record['trained']:,} parameters trained")
        print(f"{precision} ratio {best['ours']['tokens_per_second'] / best['peer']['tokens_per_second']:.2f}x "
              f"tokens/s, {best['ours']['cpu_seconds'] / best['peer']['cpu_seconds']:.2f}x CPU time, "
              f"{best['ours']['peak_bytes'] / best['peer']['peak_bytes']:.2f}x peak memory", flush=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
